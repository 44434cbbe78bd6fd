"""Places in memory: those found are right for tensors that were not used to find them."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from plait.compiler.guards import layout
from plait.compiler.guards.layout import dict_tag, read, tensor_layout

KINDS = [torch.float64, torch.float16, torch.uint8, torch.complex128, torch.int32]


def word(address: int) -> int:
    return read(address, 1)[0]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    "shape", [(), (0,), (19,), (6, 4), (2, 0, 3), (3, 2, 2, 5), (1, 2, 3, 4, 5)]
)
@pytest.mark.parametrize("make", ["plain", "parameter", "part", "flipped", "inference", "numpy"])
def test_words_are_what_torch_says(dtype: torch.dtype, shape: tuple[int, ...], make: str) -> None:
    at = tensor_layout()
    assert at is not None
    tensor = torch.ones(shape, dtype=dtype)
    if make == "parameter":
        tensor = nn.Parameter(tensor, requires_grad=False)
    elif make == "part":
        tensor = torch.ones([n + 2 for n in shape], dtype=dtype)[(slice(1, -1),) * len(shape)]
    elif make == "flipped":
        tensor = tensor.permute([*range(len(shape))][::-1])
    elif make == "inference":
        with torch.inference_mode():
            tensor = torch.ones(shape, dtype=dtype)
    elif make == "numpy":
        tensor = torch.from_numpy(tensor.numpy().copy())
    impl = tensor._cdata
    storage = tensor.untyped_storage()
    assert word(id(tensor) + at.object_impl) == impl
    assert word(impl + at.impl_storage) == storage._cdata
    assert word(impl + at.impl_offset) == tensor.storage_offset()
    assert word(impl + at.impl_ndim) == tensor.ndim
    assert read(impl + at.impl_sizes, tensor.ndim) == list(tensor.shape)
    assert read(impl + at.impl_strides, tensor.ndim) == list(tensor.stride())
    assert word(storage._cdata + at.storage_data) == storage.data_ptr()
    counter = word(impl + at.impl_counter)
    if make == "inference":
        assert not counter
        return
    for _ in range(5):
        assert word(counter + at.counter_version) & 0xFFFFFFFF == tensor._version
        tensor.mul_(1)


def test_nothing_is_found_where_two_places_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_samples", lambda: [torch.zeros(3)])  # numel and size are equal
    with pytest.raises(layout._Ambiguous):
        layout._tensor_layout()


def test_other_interpreters_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert tensor_layout.__wrapped__() is None
    assert dict_tag.__wrapped__() is None


def test_the_probe_leaves_modes_of_its_caller_out() -> None:
    with torch.inference_mode(), torch.device("meta"):
        assert tensor_layout.__wrapped__() == tensor_layout()


def test_dictionaries_have_a_number_for_every_change() -> None:
    tag = dict_tag()
    if sys.version_info >= (3, 13):  # stores of attributes are not counted there
        assert tag is None
        return
    assert tag is not None
    for table in ({}, OrderedDict(), vars(nn.Linear(2, 2))):
        seen = {word(id(table) + tag)}
        for value in (object(), object()):
            for change in (lambda t, v: t.update(key=v), lambda t, v: t.pop("key")):
                change(table, value)
                seen.add(word(id(table) + tag))
        assert len(seen) == 5
        table.get("key")
        assert word(id(table) + tag) in seen


def test_a_place_that_misses_one_change_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    count = layout._moved

    def blind(table: Any, change: Any) -> set[int]:
        """As where attribute stores are not counted."""
        found = count(table, change)
        return set() if isinstance(change, functools.partial) else found

    monkeypatch.setattr(layout, "_moved", blind)
    assert dict_tag.__wrapped__() is None
