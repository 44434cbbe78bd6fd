"""Imports run downwards only, and the package is cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import plait

ROOT = Path(plait.__file__).resolve().parent
LAYERS = ("bench", "compiler", "kernels", "passes", "runtime")
MAY_USE = {
    "cli": {"cli", "bench", "compiler", "kernels", "passes", "runtime"},
    "bench": {"bench", "compiler", "kernels", "passes", "runtime"},
    "compiler": {"compiler", "kernels", "passes", "runtime"},
    "passes": {"passes", "kernels"},
    "kernels": {"kernels"},
    "runtime": {"runtime"},
}
FILES = sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(p) for p in FILES}


def layer_of(module: tuple[str, ...]) -> str:
    if module[0] == "compiler" and len(module) > 1 and module[1] == "cli":
        return "cli"
    return module[0]


def imports(path: Path, everywhere: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and target of every import of plait's own modules; without ``everywhere`` only those
    that run when the module is imported."""
    package = path.relative_to(ROOT).parent.parts
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if not everywhere:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                pending += node.orelse
                continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == "plait":
                    yield node.lineno, parts[1:]
        elif isinstance(node, ast.ImportFrom):
            named = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + named
            elif named[:1] == ("plait",):
                base = named[1:]
            else:
                continue
            for alias in node.names:
                target = (*base, alias.name)
                yield node.lineno, target if target in MODULES else base


def test_every_layer_has_modules() -> None:
    assert {m[0] for m in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.relative_to(ROOT).parts))
def test_imports_run_downwards(path: Path) -> None:
    mine = layer_of(module_of(path))
    for line, target in imports(path, everywhere=True):
        if not target:  # the root package only forwards to names below
            continue
        assert layer_of(target) in MAY_USE[mine], (
            f"{path.relative_to(ROOT)}:{line}: {mine} may not import {'.'.join(target)}"
        )


def test_no_module_imports_itself_through_others() -> None:
    edges = {
        module_of(p): {t for _, t in imports(p, everywhere=True) if t in MODULES} - {module_of(p)}
        for p in FILES
    }
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: list[tuple[str, ...]]) -> None:
        if module in trail:
            cycle = [*trail[trail.index(module) :], module]
            pytest.fail("cycle: " + " -> ".join(".".join(m) for m in cycle))
        if module in done:
            return
        for target in sorted(edges.get(module, ())):
            visit(target, [*trail, module])
        done.add(module)

    for module in sorted(edges):
        visit(module, [])


HEAVY = ("torch", "tvm", "transformers", "numpy", "matplotlib")


@pytest.mark.parametrize(
    ("statement", "argv"),
    [
        ("import plait", []),
        ("import plait.compiler.cli as c; c.main()", ["--help"]),
        ("import plait.compiler.cli as c; c.main()", ["bench", "--help"]),
        ("import plait.compiler.cli as c; c.main()", ["--version"]),
    ],
    ids=["import", "help", "bench-help", "version"],
)
def test_what_must_be_fast_imports_nothing_heavy(statement: str, argv: list[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {argv!r}\n"
        f"try:\n    {statement}\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_importing_a_workload_needs_nothing_optional() -> None:
    names = [".".join(("plait", *m)) for m in MODULES if m[:2] == ("bench", "workloads")]
    code = (
        "import importlib, sys\n"
        "for n in ('transformers', 'onnxruntime', 'openvino', 'pytest', 'torchvision'):\n"
        "    sys.modules[n] = None\n"
        f"for n in {sorted(names)!r}:\n    importlib.import_module(n)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.relative_to(ROOT).parts))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
