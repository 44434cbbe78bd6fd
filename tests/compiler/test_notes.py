"""Notes: each thing is said once, and of the line that called."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import plait
from plait.compiler.notes import Notes


def test_a_warning_names_the_line_that_called() -> None:
    model = plait.compile(nn.Linear(4, 4))  # in training mode: the original runs, which is said
    user = {"__name__": "user", "model": model, "x": torch.randn(2, 4)}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        exec(compile("y = 1\nmodel(x)\nmodel(x)", "user.py", "exec"), user)
    [told] = [w for w in caught if "PLT-CAP-016" in str(w.message)]
    assert (told.filename, told.lineno) == ("user.py", 2)


def test_the_same_remark_is_recorded_once() -> None:
    notes = Notes()
    notes.add("PLT-CAP-014", "one")
    notes.add("PLT-CAP-014", "one")
    notes.add("PLT-CAP-014", "another")
    assert [r.reason for r in notes.remarks] == ["one", "another"]
