"""Masks that transformers leaves out in eager mode, where their values allow it.

An attention that is given no mask is causal or not as its module says. A causal mask that hides no
padding is left out for it, and so is one that would hide nothing at all. While a model is traced
the mask stays, for a graph cannot depend on values. That is the same for causal masks of causal
attention. Where the module says otherwise, what it attends to depends on the values: then
`MaskError` is raised, and the next trace reads them, for the library to choose as in eager mode.
So it does where positions make a mask: they may say that a row holds several sequences, each of
which attends to itself.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import CaptureError

QUESTIONS = {"_ignore_causal_mask_sdpa": True, "_ignore_bidirectional_mask_sdpa": False}
"""The library's functions that tell whether a mask can be left out, and whether it is causal."""
PACKED = "find_packed_sequence_indices"
"""The library's function that tells by positions which of several sequences a token belongs to."""
INTERFACES = (
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
)
"""Where the library keeps what makes masks, and what takes them."""


class MaskError(CaptureError):
    """What is attended to depends on a mask's values."""

    def __init__(self, module: Any) -> None:
        reason = f"what {type(module).__name__} attends to depends on the mask's values"
        super().__init__("PLT-CAP-001", reason)


@contextlib.contextmanager
def masks(read: bool) -> Iterator[None]:
    """Within it, attention for which it matters whether a mask was left out raises MaskError; with
    ``read``, values decide on that instead.
    """
    names = vars(sys.modules.get("transformers.masking_utils", object))
    found = [getattr(sys.modules.get(module), name, None) for module, name in INTERFACES]
    tables: list[Any] = [table for table in found if table is not None]
    needed = (*QUESTIONS, PACKED, "is_tracing")
    if not all(name in names for name in needed) or len(tables) < len(INTERFACES):
        yield
        return
    placed = {name: names[name] for name in needed}
    local = [table._local_mapping for table in tables]
    before = [dict(mapping) for mapping in local]
    causal = "_ignore_causal_mask_sdpa"
    notes = _Notes(names[causal])
    try:
        if read:
            names["is_tracing"] = lambda tensor=None: False
            names[causal] = functools.partial(_unpadded, names[causal])
        else:
            for question, kind in QUESTIONS.items():
                names[question] = functools.partial(notes.question, names[question], kind)
            names[PACKED] = functools.partial(notes.packed, names[PACKED])
            for table, wrapper in zip(tables, (notes.mask, notes.attention), strict=True):
                table["sdpa"] = functools.partial(wrapper, table["sdpa"])
        yield
    finally:
        names.update(placed)
        for mapping, old in zip(local, before, strict=True):
            mapping.clear()
            mapping.update(old)


def _unpadded(
    original: Any, padding: Any, q_length: int, kv_length: int, *args: Any, **kwargs: Any
) -> Any:
    """What the original gives, by a question to the values that is the same for every length."""
    if padding is not None and q_length == kv_length and padding.shape[-1] == kv_length:
        return original(None, q_length, kv_length, *args, **kwargs) and bool(padding.all())
    return original(padding, q_length, kv_length, *args, **kwargs)


class _Notes:
    """Which masks values would have left out. Other threads may run models meanwhile."""

    def __init__(self, skips: Callable[..., bool]) -> None:
        """``skips`` is the library's question for causal masks."""
        self._skips = skips
        self._thread = threading.get_ident()
        self._asked: list[tuple[bool, Callable[[], bool]]] = []
        self._packed = False
        self._kept: dict[int, tuple[bool, Callable[[], bool], torch.Tensor]] = {}

    def question(self, original: Any, causal: bool, padding: Any, *args: Any, **kwargs: Any) -> Any:
        """Whether to leave a mask out; notes how to ask the same for a padding of nothing."""
        found = original(padding, *args, **kwargs)
        if padding is not None and not found and threading.get_ident() == self._thread:
            self._asked.append((causal, functools.partial(original, None, *args, **kwargs)))
        return found

    def packed(self, original: Any, positions: torch.Tensor) -> Any:
        """Which sequence each token belongs to; notes that the next mask is made of it."""
        found = original(positions)
        if threading.get_ident() == self._thread:
            self._packed = found is not None
        return found

    def mask(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes a mask."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        self._asked.clear()
        if self._packed:  # without that, a causal mask might have been left out
            sizes = [kwargs[k] for k in ("q_length", "kv_length", "q_offset", "kv_offset")]
            ask = functools.partial(self._skips, None, *sizes, kwargs.get("local_size"))
            self._asked.append((True, ask))
            self._packed = False
        made = original(*args, **kwargs)
        if self._asked and isinstance(made, torch.Tensor):
            self._kept[_storage(made)] = (*self._asked[-1], made)
        return made

    def attention(
        self, original: Any, module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Attends, where that is the same with and without the mask."""
        mask = attention_mask
        known = self._kept.get(_storage(mask)) if isinstance(mask, torch.Tensor) else None
        if known is not None and threading.get_ident() == self._thread:
            causal = kwargs.get("is_causal", args[2] if len(args) > 2 else None)
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if bool(causal) != known[0] and query.shape[2] != 1 and known[1]():
                raise MaskError(module)
        return original(module, query, key, value, mask, *args, **kwargs)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
