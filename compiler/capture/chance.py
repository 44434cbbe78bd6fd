"""Generators of random numbers that a model seeds, or asks, while it is traced.

A program draws from torch's generator as eager mode does, call by call. What a model does to the
generators otherwise is no operator: a trace would do it once, and no run again. So a model that
seeds torch's generator or reads its state is not captured, nor is one that draws numbers from
Python's or numpy's generators: these would be constants. Where such a generator was seeded by the
model first, they are constants, too, and such a model is captured.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import CaptureError

QUESTIONS = "manual_seed", "seed", "initial_seed", "get_rng_state", "set_rng_state"
"""Functions of torch that change the state of its generator, or tell of it."""


class DrawnError(CaptureError):
    """A generator's state is another one than before, be it for what another thread did."""


@contextlib.contextmanager
def chance() -> Iterator[None]:
    """Around a model's code while it is traced; generators are left as they were where it is
    refused.

    Raises CaptureError (PLT-CAP-029) where the code does what a program would not repeat.
    """
    others = [_Python(), *([_Numpy()] if "numpy.random" in sys.modules else [])]
    before = torch.default_generator.get_state()
    with contextlib.ExitStack() as stack:
        for name in QUESTIONS:
            for place in (torch, torch.random):
                stack.enter_context(_replaced(place, name, _refusing(getattr(place, name))))
        for other in others:
            stack.enter_context(_replaced(other.place, "seed", other.seed))
        try:
            yield
            if not torch.equal(torch.default_generator.get_state(), before):
                raise _refused(
                    "changes the state of torch's generator of random numbers", DrawnError
                )
            for other in others:
                if other.drawn():
                    raise _refused(f"draws random numbers of {other.name}", DrawnError)
        except BaseException:
            torch.default_generator.set_state(before)
            for other in others:
                other.restore()
            raise


class _Other:
    """A generator that torch does not know of."""

    name: str
    place: Any
    get: Callable[[], Any]
    set: Callable[[Any], None]

    def __init__(self) -> None:
        self.seeded = False
        self._seed, self._before = self.place.seed, self.get()

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """In the place of the generator's own function; without a number it is chance itself."""
        self.seeded = self.seeded or any(x is not None for x in (*args, *kwargs.values()))
        self._seed(*args, **kwargs)

    def drawn(self) -> bool:
        """Whether numbers were drawn that are others in the next call."""
        return not self.seeded and pickle.dumps(self.get()) != pickle.dumps(self._before)

    def restore(self) -> None:
        """The state that it had at first."""
        self.set(self._before)


class _Python(_Other):
    name, place = "Python's generator", random
    get, set = staticmethod(random.getstate), staticmethod(random.setstate)


class _Numpy(_Other):
    name = "numpy's generator"

    def __init__(self) -> None:
        self.place = sys.modules["numpy.random"]
        self.get, self.set = self.place.get_state, self.place.set_state
        super().__init__()


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, original)


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses calls, other than those by which torch's tracers keep the generator's state, and
    checkpoints the state for a pass backwards.
    """

    def asked(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("torch._") or caller == "torch.utils.checkpoint":
            return function(*args, **kwargs)
        raise _refused(f"calls torch.{function.__name__}")

    return asked


def _refused(does: str, kind: type[CaptureError] = CaptureError) -> CaptureError:
    return kind(
        "PLT-CAP-029", f"the model {does} while it runs", "seed outside of it, draw by torch's"
    )
