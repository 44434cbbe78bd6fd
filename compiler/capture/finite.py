"""Branches on whether all numbers are finite, as choices between two results.

Layers that may overflow in half precision look whether they did, and only then clamp::

    if x.dtype == torch.float16 and not torch.isfinite(x).all():
        limit = torch.finfo(x.dtype).max - 1000
        x = torch.clamp(x, min=-limit, max=limit)

A trace has no numbers to look at. The branch does nothing but compute, so it may always run, and
`torch.where` takes its result where the question's answer is yes. `chosen` puts forwards that are
rewritten in this way on the modules of one model while it is captured.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .source import compiled, definition, loads

QUESTIONS = frozenset(("isfinite", "isinf", "isnan"))
PURE = frozenset(("clamp", "finfo", "nan_to_num", "where"))
"""Functions of torch that a branch may call."""
_KNOWN: weakref.WeakKeyDictionary[Any, types.CodeType | None] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def chosen(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, modules below ``roots`` have rewritten forwards, where they have such branches."""
    placed: list[dict[str, Any]] = []
    made: dict[Any, types.FunctionType | None] = {}
    try:
        for module in dict.fromkeys(m for root in roots for m in root.modules()):
            function = inspect.getattr_static(type(module), "forward", None)
            if "forward" in vars(module) or not isinstance(function, types.FunctionType):
                continue
            if function not in made:
                made[function] = _rewritten(function)
            new = made[function]
            if new is not None:
                vars(module)["forward"] = types.MethodType(new, module)
                placed.append(vars(module))
        yield
    finally:
        for attributes in placed:
            attributes.pop("forward", None)


def _runs(answer: Any) -> bool:
    """Whether a branch is traced: a tensor may say so when the program runs."""
    return isinstance(answer, Tensor) or bool(answer)


def _no(answer: Any) -> Any:
    return answer.logical_not() if isinstance(answer, Tensor) else not answer


def _choice(answer: Any, new: Any, old: Any) -> Any:
    if not isinstance(answer, Tensor):
        return new
    both = isinstance(new, Tensor) and isinstance(old, Tensor)
    if not both or (new.dtype, new.shape, new.device) != (old.dtype, old.shape, old.device):
        return new if answer else old
    return torch.where(answer, new, old)


def _rewritten(function: types.FunctionType) -> types.FunctionType | None:
    """``function``, or the one it was made around, with choices; None where there are none."""
    inner, closure, names = getattr(function, "__wrapped__", None), None, function.__globals__
    if isinstance(inner, types.FunctionType):
        code, new = function.__code__, _rewritten(inner)
        cells = function.__closure__ or ()
        if new is None:
            return None
        closure = tuple(types.CellType(new) if _holds(c, inner) else c for c in cells)
    else:
        if function not in _KNOWN:
            _KNOWN[function] = _code(function)
        code = _KNOWN[function]
        if code is None:
            return None
        names = {**names, "_runs": _runs, "_no": _no, "_choice": _choice}
    made = types.FunctionType(code, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _code(function: types.FunctionType) -> types.CodeType | None:
    """The code of ``function`` with choices in place of branches; None where there are none."""
    code = function.__code__
    asks = QUESTIONS.intersection(code.co_names) and {"all", "any"}.intersection(code.co_names)
    found = definition(function) if asks else None
    if found is None:
        return None
    tree, body = found
    branches = [x for x in ast.walk(body) if isinstance(x, ast.If) and _computes(x)]
    inside = sum(loads(b, n) for b in branches for n in _temporary(b))
    names = {n for b in branches for n in _temporary(b)}
    if not branches or inside != sum(loads(body, n) for n in names):
        return None  # what only a branch sets is read elsewhere
    _Choices(branches).visit(body)
    return compiled(tree, code)


def _computes(branch: ast.If) -> bool:
    """Whether a branch asks for finite numbers, and does no more than set names to results."""
    if branch.orelse or not any(_call_of(x, QUESTIONS) for x in ast.walk(branch.test)):
        return False
    for step in branch.body:
        if not isinstance(step, ast.Assign) or not isinstance(step.targets[0], ast.Name):
            return False
        calls = [x for x in ast.walk(step.value) if isinstance(x, ast.Call)]
        if len(step.targets) > 1 or not all(_call_of(x, PURE) for x in calls):
            return False
    return True


def _call_of(node: ast.AST, names: Iterable[str]) -> bool:
    """Whether ``node`` calls one of torch's functions ``names``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = node.func.value
    return isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in names


def _set(branch: ast.If) -> list[str]:
    targets = [x for step in branch.body if isinstance(step, ast.Assign) for x in step.targets]
    return list(dict.fromkeys(x.id for x in targets if isinstance(x, ast.Name)))


def _kept(branch: ast.If) -> list[str]:
    """Names that a branch sets and that are set before: it is asked about them."""
    return [n for n in _set(branch) if loads(branch.test, n)]


def _temporary(branch: ast.If) -> list[str]:
    return [n for n in _set(branch) if not loads(branch.test, n)]


class _Choices(ast.NodeTransformer):
    def __init__(self, branches: list[ast.If]) -> None:
        self.branches = branches

    def visit_If(self, node: ast.If) -> Any:
        if node not in self.branches:
            return self.generic_visit(node)
        first = [ast.parse("_answer = 0").body[0]]
        assert isinstance(first[0], ast.Assign)
        first[0].value = _Not().visit(node.test)
        kept = _kept(node)
        olds = [f"_old_{n} = {n}" for n in kept]
        news = [f"{n} = _choice(_answer, {n}, _old_{n})" for n in kept]
        body = [*_parsed(olds), *node.body, *_parsed(news)]
        test = ast.parse("_runs(_answer)", mode="eval").body
        made = [*first, ast.If(test=test, body=body, orelse=[])]
        return [ast.copy_location(x, node) for x in made]


class _Not(ast.NodeTransformer):
    """``not`` of what may be a tensor."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Call(func=ast.Name(id="_no", ctx=ast.Load()), args=[node.operand], keywords=[])


def _parsed(lines: list[str]) -> list[ast.stmt]:
    return [ast.parse(line).body[0] for line in lines]
