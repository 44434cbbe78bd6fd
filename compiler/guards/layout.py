"""Where in memory torch and CPython keep what guards compare, found out by trying.

No header promises these places. Each is searched among the first words of objects whose contents
are known, over objects that differ in everything, and counts only if exactly one place fits all of
them; else guards ask Python and torch, object by object. Nothing is read beyond what an object must
at least hold.

An attribute of a tensor lives in one of four objects: the Python object points to the
``TensorImpl`` (sizes, strides, offset), and that to the ``StorageImpl`` (memory) and to the counter
of in-place changes, which views share. A dictionary holds a number that is new with every change of
it (PEP 509); CPython 3.13 stopped counting stores of attributes, so none is found there.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

WORD = 8
INLINE = 5
"""Tensors of more dimensions keep their sizes and strides in memory of their own."""

# What the objects hold at the very least, in words; all begin with a vtable and counts.
_IMPL = (
    20  # + four pointers, Python's object, INLINE sizes and strides, their number, offset, numel
)
_STORAGE = 6  # + the memory's address, its owner with a deleter, the device
_COUNTER = 3  # + the count


@dataclass(frozen=True)
class TensorLayout:
    """Places of 64-bit words, in bytes from the start of the object named first."""

    object_impl: int
    impl_storage: int
    impl_counter: int
    impl_offset: int
    impl_ndim: int
    impl_sizes: int
    impl_strides: int
    storage_data: int
    counter_version: int
    """Its lower half is the version; nobody writes the upper half."""


def read(address: int, count: int) -> list[int]:
    """``count`` words of memory."""
    return list((ctypes.c_uint64 * count).from_address(address))


def supported() -> bool:
    """Whether this interpreter's objects may be read like this at all: CPython with its lock, and
    64-bit words of little endian, as on every machine that torch is built for.
    """
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    words = ctypes.sizeof(ctypes.c_void_p) == WORD and sys.byteorder == "little"
    return sys.implementation.name == "cpython" and locked and words


class _Ambiguous(Exception):
    """No place fits what is searched, or more than one."""


def _only(places: Iterator[int]) -> int:
    found = list(places)
    if len(found) != 1:
        raise _Ambiguous
    return found[0]


@functools.cache
def tensor_layout() -> TensorLayout | None:
    """The places that fit this torch; None where one is not certain."""
    if not supported():
        return None
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        try:
            return _tensor_layout()
        except _Ambiguous:
            return None


def _samples() -> list[Tensor]:
    """Tensors that share nothing but what they must, of 0 to INLINE dimensions."""
    shapes = [(), (7,), (3, 11), (2, 5, 13), (4, 6, 9, 3), (5, 7, 3, 8, 2)]
    kinds = [torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.complex64]
    samples: list[Tensor] = []
    for k, shape in enumerate(shapes):
        for kind in kinds:
            samples.append(torch.zeros(shape, dtype=kind, device="cpu"))
        base = torch.zeros([n + 3 for n in shape], device="cpu")
        samples.append(base[(slice(1, -2),) * k])
        samples.append(nn.Parameter(base.clone()))
        samples.append(base.transpose(0, -1) if shape else base.detach())
    # The owner of memory that torch did not allocate lies elsewhere than the memory itself.
    samples.append(torch.frombuffer(bytearray(640), dtype=torch.float32)[3:])
    return samples


def _tensor_layout() -> TensorLayout:
    samples = _samples()
    for k, sample in enumerate(samples):
        for _ in range(k % 5):
            sample.zero_()
    impls = [read(t._cdata, _IMPL) for t in samples]

    def place(objects: Sequence[Sequence[int]], wanted: Sequence[int], start: int = 2) -> int:
        rows = list(zip(objects, wanted, strict=True))
        length = min(map(len, objects))
        return _only(i for i in range(start, length) if all(w[i] == x for w, x in rows))

    def run(wanted: Callable[[Tensor], Sequence[int]]) -> int:
        rows = [(w, list(wanted(t))) for w, t in zip(impls, samples, strict=True)]
        starts = range(2, _IMPL - INLINE + 1)
        return _only(i for i in starts if all(w[i : i + len(x)] == x for w, x in rows))

    words = Tensor.__basicsize__ // WORD
    counter = _only(i for i in range(2, _IMPL) if _counts(i, impls, samples))
    storages = [t.untyped_storage() for t in samples]
    return TensorLayout(
        *(
            WORD * i
            for i in (
                place([read(id(t), words) for t in samples], [t._cdata for t in samples]),
                place(impls, [s._cdata for s in storages]),
                counter,
                place(impls, [t.storage_offset() for t in samples]),
                place(impls, [t.ndim for t in samples]),
                run(Tensor.size),
                run(Tensor.stride),
                place(
                    [read(s._cdata, _STORAGE) for s in storages], [s.data_ptr() for s in storages]
                ),
                _version(counter, samples),
            )
        )
    )


def _counts(i: int, impls: Sequence[Sequence[int]], samples: Sequence[Tensor]) -> bool:
    """Whether word ``i`` may point to the counter: it is what a tensor shares with its views and
    detached copies, and with nothing that only has its memory; inference tensors have none.
    """
    for tensor, words in zip(samples, impls, strict=True):
        view, copy, apart = tensor.view_as(tensor), tensor.detach(), tensor.data
        same = [read(t._cdata, _IMPL)[i] for t in (view, copy)]
        if not words[i] or words[i] % WORD or same != [words[i]] * 2:
            return False
        if read(apart._cdata, _IMPL)[i] in (0, words[i]):
            return False
    with torch.inference_mode():
        bare = torch.zeros(3, device="cpu")
    return read(bare._cdata, _IMPL)[i] == 0


def _version(counter: int, samples: Sequence[Tensor]) -> int:
    """The word of the counter that holds the version, through some more in-place changes."""
    places = set(range(1, _COUNTER))
    for tensor in samples:
        before = None
        for _ in range(3):
            now = read(read(tensor._cdata, _IMPL)[counter], _COUNTER)
            wanted = tensor._version
            fits = (i for i in places if now[i] & 0xFFFFFFFF == wanted)
            places = {i for i in fits if before is None or now[i] >> 32 == before[i] >> 32}
            before = now
            tensor.zero_()
    return _only(iter(places))


@functools.cache
def dict_tag() -> int | None:
    """The byte where a dictionary keeps the number that is new with every change; None if every
    place misses a change.
    """
    if not supported():
        return None
    places = set(range(2, dict.__basicsize__ // WORD))
    for make in (dict, OrderedDict, lambda: vars(nn.Module())):
        table = make()
        for change in _changes(table):
            places &= _moved(table, change)
    for module in [nn.Module() for _ in range(3)]:
        for _ in range(40):  # until the interpreter has specialised the store
            places &= _moved(vars(module), functools.partial(_store, module, object()))
        for change in (module.eval, module.train, lambda m=module: delattr(m, "part")):
            places &= _moved(vars(module), change)
    return WORD * places.pop() if len(places) == 1 else None


def _store(module: nn.Module, value: Any) -> None:
    module.part = value


def _changes(table: Any) -> Iterator[Callable[[], Any]]:
    """Every way of changing a dictionary, in an order in which each is a change."""
    first, second = object(), object()
    yield lambda: table.__setitem__("a", first)
    yield lambda: table.__setitem__("a", second)
    yield lambda: table.__setitem__("a", first)
    yield lambda: table.__delitem__("a")
    yield lambda: table.setdefault("a", first)
    yield lambda: table.update(a=second)
    yield lambda: table.update({"a": first, "b": first})
    yield lambda: table.__ior__({"b": second})
    yield lambda: table.pop("a")
    yield table.popitem
    yield lambda: table.update(dict.fromkeys(map(str, range(50)), first))
    yield table.clear


def _moved(table: dict[str, Any], change: Callable[[], Any]) -> set[int]:
    """Words of a dictionary that grow with a change: a number never used twice does."""
    count = dict.__basicsize__ // WORD
    before = read(id(table), count)
    change()
    return {i for i, (a, b) in enumerate(zip(before, read(id(table), count), strict=True)) if b > a}
