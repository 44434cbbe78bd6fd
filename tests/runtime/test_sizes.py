"""Size text is integer arithmetic and nothing else."""

import ast

import pytest

from plait.runtime.sizes import evaluate


def test_arithmetic_over_symbols():
    assert evaluate("4*s0*(s0 + 1)//2 - max(s1, 3)", {"s0": 5, "s1": 2}) == 57


def test_a_number_is_itself():
    assert evaluate(7, {}) == 7


@pytest.mark.parametrize(
    "text", ["__import__('os')", "s0.real", "[1][0]", "(lambda: 1)()", "print(1)"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        evaluate(text, {"s0": 1})


def test_an_unknown_symbol_is_named():
    with pytest.raises(ValueError, match="s9"):
        evaluate("s9 + 1", {"s0": 1})


def test_threads_that_meet_within_the_parser_try_again(monkeypatch):
    real, failures = ast.parse, iter([True] * 3)

    def parse(*args, **options):
        if next(failures, False):
            raise SystemError("AST constructor recursion depth mismatch (before=66, after=61)")
        return real(*args, **options)

    with monkeypatch.context() as patched:  # others parse, too
        patched.setattr(ast, "parse", parse)
        found = evaluate("4*s0 + 987654", {"s0": 5})
    assert found == 987674
