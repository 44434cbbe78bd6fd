"""Loops that solve a triangular system row by row, as one operator.

Linear attention inverts, for each chunk of a sequence, a triangular matrix of which only what is
below the diagonal is not zero. Where that is written out, ::

    attn = (...).masked_fill(mask, 0)
    for i in range(1, chunk_size):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)

a trace has thousands of operators, one after the other and each for sizes of its own. It solves
``(1 - attn) x = attn``, for which there is an operator. `substituted` puts code that calls it in
the place of the function's while a model is captured.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import types
import weakref
from collections.abc import Iterable, Iterator

from torch import nn

from .source import compiled, definition, loads

NEEDED = frozenset(("clone", "masked_fill", "range", "sum", "triu", "unsqueeze"))
_KNOWN: weakref.WeakKeyDictionary[types.FunctionType, types.CodeType | None]
_KNOWN = weakref.WeakKeyDictionary()

MASK = "torch.triu(torch.ones({n}, {n}, dtype=torch.bool, device={device}), diagonal=0)"
LOOP = """\
for {i} in range(1, {n}):
    {row} = {x}[..., {i}, :{i}].clone()
    {sub} = {x}[..., :{i}, :{i}].clone()
    {x}[..., {i}, :{i}] = {row} + ({row}.unsqueeze(-1) * {sub}).sum(-2)
"""
SOLVED = """\
if {x}.dtype in (torch.float32, torch.float64):
    {x} = torch.linalg.solve_triangular(-{x}, {x}, upper=False, unitriangular=True)
else:
    pass
"""


@contextlib.contextmanager
def substituted(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, functions beside the classes of modules below ``roots`` have no such loops.
    Whoever else calls them meanwhile gets the same numbers.
    """
    placed: list[tuple[types.FunctionType, types.CodeType]] = []
    names = {type(m).__module__ for root in roots for m in root.modules()}
    try:
        for name in names:
            for value in list(vars(sys.modules.get(name, object)).values()):
                function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
                if not isinstance(function, types.FunctionType):
                    continue
                if not NEEDED.issubset(function.__code__.co_names):
                    continue
                if function not in _KNOWN:
                    _KNOWN[function] = _code(function)
                code = _KNOWN[function]
                if code is not None and function.__code__ is not code:
                    placed.append((function, function.__code__))
                    function.__code__ = code
        yield
    finally:
        for function, code in placed:
            function.__code__ = code


def _code(function: types.FunctionType) -> types.CodeType | None:
    """The code of ``function`` with systems solved; None where there are none."""
    inner = types.FunctionType(function.__code__, function.__globals__)  # without decorators
    found = definition(inner)
    if found is None:
        return None
    tree, body = found
    numbers = [n for n in range(1, len(body.body)) if _solves(body, n)]
    for n in numbers:
        loop = body.body[n]
        (x,) = _targets(body.body[n - 1])
        made = ast.parse(SOLVED.format(x=x)).body[0]
        assert isinstance(made, ast.If)
        made.orelse = [loop]
        body.body[n] = ast.copy_location(made, loop)
    return compiled(tree, function.__code__) if numbers else None


def _solves(body: ast.FunctionDef, number: int) -> bool:
    """Whether the statement solves the system that the one before it makes."""
    made, loop = body.body[number - 1 : number + 1]
    if not isinstance(made, ast.Assign) or not isinstance(loop, ast.For) or len(loop.body) != 3:
        return False
    value = made.value
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        value = value.operand
    first, second = (_targets(x) for x in loop.body[:2])
    names = [_targets(made), first, second, [getattr(loop.target, "id", None)]]
    ends = loop.iter.args[1:] if isinstance(loop.iter, ast.Call) else []
    if any(len(x) != 1 for x in (*names, ends)) or not isinstance(ends[0], ast.Name):
        return False
    (x,), (row,), (sub,), (i,) = names
    n = ends[0].id
    if not _same(loop, LOOP.format(x=x, row=row, sub=sub, i=i, n=n)):
        return False
    others = [s for s in ast.walk(body) if isinstance(s, ast.For) and _named(s.target, i)]
    if loads(body, i) != sum(loads(s, i) for s in others):  # it may be read behind the loop
        return False
    if any(loads(body, name) != loads(loop, name) for name in (row, sub)):
        return False
    return _masked(body, number - 1, value, n)


def _masked(body: ast.FunctionDef, number: int, value: ast.expr, n: str) -> bool:
    """Whether ``value``, of that statement, is zero on and above the diagonal of ``n`` rows."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    if value.func.attr != "masked_fill" or len(value.args) != 2:
        return False
    mask, zero = value.args
    if not isinstance(mask, ast.Name) or not _same(ast.Expr(zero), "0"):
        return False
    for step in reversed(body.body[:number]):
        if n in _stored(step):
            return False
        if mask.id in _stored(step):
            if not isinstance(step, ast.Assign) or _targets(step) != [mask.id]:
                return False
            devices = [k.value for k in ast.walk(step) if isinstance(k, ast.keyword)]
            texts = (ast.unparse(x) for x in devices)
            return any(_same(ast.Expr(step.value), MASK.format(n=n, device=t)) for t in texts)
    return False


def _same(node: ast.stmt, text: str) -> bool:
    return ast.dump(node) == ast.dump(ast.parse(text).body[0])


def _targets(step: ast.stmt) -> list[str | None]:
    targets = step.targets if isinstance(step, ast.Assign) else []
    return [x.id if isinstance(x, ast.Name) else None for x in targets]


def _named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _stored(step: ast.stmt) -> set[str]:
    names = (x for x in ast.walk(step) if isinstance(x, ast.Name))
    return {x.id for x in names if not isinstance(x.ctx, ast.Load)}
