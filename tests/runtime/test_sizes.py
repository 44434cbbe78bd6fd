"""Size text is integer arithmetic and nothing else."""

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
