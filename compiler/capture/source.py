"""The source of functions that are traced in another form: read, changed as a tree, compiled."""

from __future__ import annotations

import ast
import inspect
import types
from typing import Any

import torch


def definition(function: types.FunctionType) -> tuple[ast.Module, ast.FunctionDef] | None:
    """The source of ``function``: a tree, and its one statement. None where it is not what was
    loaded, depends on more than globals, or has another ``torch``.
    """
    code = function.__code__
    if code.co_freevars or hasattr(function, "__wrapped__"):
        return None
    if function.__globals__.get("torch") is not torch:
        return None
    try:
        source = inspect.getsource(function)
        inner = source[:1].isspace()  # stays so: its texts of several lines would change
        tree = ast.parse(f"class _:\n{source}" if inner else source)
    except (OSError, SyntaxError):
        return None
    ast.increment_lineno(tree, code.co_firstlineno - 1 - inner)
    if isinstance(tree.body[0], ast.ClassDef):
        tree.body = tree.body[0].body
    found = tree.body[0]
    if not isinstance(found, ast.FunctionDef) or _written(compiled(tree, code)) != _written(code):
        return None
    return tree, found


def compiled(tree: ast.Module, like: types.CodeType) -> types.CodeType:
    """The code of the function that ``tree`` defines, in the file of ``like``."""
    for node in ast.walk(tree):  # annotations may name what is only there for checkers
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    ast.fix_missing_locations(tree)
    module = compile(tree, like.co_filename, "exec", dont_inherit=True)
    return next(x for x in module.co_consts if isinstance(x, types.CodeType))


def loads(node: ast.AST, name: str) -> int:
    """How often ``name`` is read in ``node``."""
    names = [x for x in ast.walk(node) if isinstance(x, ast.Name) and x.id == name]
    return sum(isinstance(x.ctx, ast.Load) for x in names)


def _written(code: types.CodeType) -> Any:
    """What tells functions apart. Instructions also depend on what else is in a file."""
    constants = [repr(x) for x in code.co_consts if not isinstance(x, types.CodeType)]
    return code.co_name, code.co_names, code.co_varnames, constants
