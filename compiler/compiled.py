"""`Compiled`: what `plait.compile` returns, a module like the one it was made from."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.fx as fx
from torch import nn

from ..passes.remarks import Remark, render
from .capture.arguments import as_call
from .dispatch import Dispatcher
from .errors import InputError, PlaitError
from .options import Bettable, Options
from .program import Program
from .twin import rebound, twin_of

if TYPE_CHECKING:
    from ..runtime.tier import Tier

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OWN = ("_original", "_dispatcher", "_explicit", "_twin")


class Compiled(nn.Module):
    """A compiled module or function.

    Calling it gives the original's result for every input. Parameters, buffers, submodules and
    attributes *are* the original's (not copies): training the original, loading a state dict or
    moving it is seen at the next call. In training mode, or when an input requires gradients, the
    original runs; results of compiled calls carry no gradients. Methods that call the module
    (`generate` of a language model) run its compiled program.

    A call's Python numbers and texts, and attributes the forward reads, are constants of the
    compiled program. Different arguments compile again by themselves, and so do other numbers,
    texts and tuples of such as attributes of a module or of its configuration. What else the
    forward reads (an item of a list, a global) needs `recompile` when it is changed, and so do
    weights changed in place through ``.data``, which torch does not count. While a call captures,
    no other thread may run the original itself.
    """

    def __init__(
        self,
        original: Callable[..., Any] | None,
        options: Options,
        dynamic_shapes: Any = None,
        shell: nn.Module | None = None,
        signature: inspect.Signature | None = None,
    ) -> None:
        """Wraps ``original``.

        A loaded program has none: ``shell`` holds its weights and ``signature`` its arguments.
        """
        if isinstance(options.profile, Bettable) and original is not None:
            options.profile.check(original)
        module = original if isinstance(original, nn.Module) else shell
        vars(self)["_original"] = original if original is not None else shell
        vars(self)["_dispatcher"] = Dispatcher(original, options, dynamic_shapes, signature, shell)
        vars(self)["_explicit"] = dynamic_shapes
        vars(self)["_twin"] = None
        if module is None:
            super().__init__()
            vars(self).pop("training", None)
            for name in functools.WRAPPER_ASSIGNMENTS:
                if hasattr(original, name):
                    vars(self)[name] = getattr(original, name)
            vars(self)["__wrapped__"] = original
        else:
            for name in _SHARED:
                vars(self)[name] = getattr(module, name)  # torch.jit's keep them elsewhere
            vars(self)["__doc__"] = module.__doc__

    # -- calling --------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result for these arguments."""
        if len(args) == 1 and not kwargs:
            return self._dispatcher.one(args[0])
        return self._dispatcher(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling."""
        return self._dispatcher(*args, **kwargs)

    def prepare(self, example_inputs: Any) -> Compiled:
        """Compiles for ``example_inputs`` now instead of at the first call, and returns self.

        A tuple or list holds positional arguments, a dict keyword arguments, anything else is the
        only argument. Raises InputError if the original cannot run on them, and what compiling
        raises.
        """
        args, kwargs = as_call(example_inputs)
        try:
            self._dispatcher(*args, **kwargs)
        except PlaitError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            raise InputError(
                "PLT-INP-005",
                f"the model fails on example_inputs: {type(error).__name__}: {text[0]}",
                "give it inputs that it takes",
            ) from error
        return self

    def recompile(self) -> None:
        """Forgets every compiled program; the next call captures again. A loaded one stays."""
        self._dispatcher.forget()

    # -- looking inside -------------------------------------------------------------------------

    @property
    def original(self) -> Any:
        """What was compiled (for a loaded program: a module that only holds its weights)."""
        return self._original

    @property
    def programs(self) -> tuple[Program, ...]:
        """What was compiled so far, one for each structure and range of sizes met, oldest first."""
        return tuple(self._dispatcher.programs)

    @property
    def options(self) -> Options:
        """The options it was compiled with."""
        return self._dispatcher.options

    @property
    def profile(self) -> Any:
        """The `plait.Profile` that it bets on, "online" where it learns by itself, or None."""
        return self.options.profile

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was done, or not done and why, oldest first."""
        programs = self.programs
        return (
            *self._dispatcher.notes.remarks,
            *(r for p in programs for r in p.executable.remarks),
        )

    @property
    def graph(self) -> fx.GraphModule | None:
        """The graph of the newest program after all passes; None before the first call."""
        programs = self.programs
        return programs[-1].executable.graph if programs else None

    @property
    def plan(self) -> Any:
        """The plan of the newest program; None before the first call."""
        programs = self.programs
        return programs[-1].executable.plan if programs else None

    @property
    def weight_tier(self) -> Tier | None:
        """What keeps a ``weight_budget``, with its counters; None without one, and before the first
        call.
        """
        store = self._dispatcher.specialiser.store
        return None if store is None else store.tier

    def explain(self) -> str:
        """A text for people: programs, what they are specialised on, and remarks."""
        lines = []
        for number, program in enumerate(self.programs, 1):
            captured = program.captured
            lines.append(f"program {number}: ({captured.signature()})")
            for name, (low, high) in captured.ranges.items():
                lines.append(f"  {name}: {low} to {'any' if high is None else high}")
            lines += [f"  needs {guard}" for guard in captured.guards]
            operators = [n for n in captured.graph_module.graph.nodes if n.op == "call_function"]
            lines.append(f"  captured: {len(operators)} operators")
            visits = getattr(program.executable, "visits", None)
            lines += [f"  {text}" for text in ([] if visits is None else visits())]
            if captured.mutations:
                names = ", ".join(captured.inputs[m.input].name for m in captured.mutations)
                lines.append(f"  written back: {names}")
        if not lines:
            lines.append("nothing compiled yet: the first call compiles")
        if self.weight_tier is not None:
            lines.append(f"weights of a slower tier: {self.weight_tier.counters}")
        return "\n".join([*lines, render(self.remarks)])

    def save(self, path: str | Path) -> None:
        """Writes every compiled program to one file that `plait.load` reads.

        Raises FileError if nothing was compiled yet or the file cannot be written; an existing
        file is then as it was.
        """
        from .serialize.program_file import save

        save(self._dispatcher, Path(path))

    def check_code(self, done: str) -> None:
        """Raises InputError for a loaded program, which cannot be ``done`` without the code."""
        if self._dispatcher.target is None:
            raise InputError(
                "PLT-INP-003",
                f"a loaded program has no Python code, so it cannot be {done}",
                "load its file again, or use the model that it was made from",
            )

    # -- the original's interface ---------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        value = getattr(self._original, name)
        if not inspect.ismethod(value) or not isinstance(self._original, nn.Module):
            return value
        if self._twin is None:
            vars(self)["_twin"] = twin_of(self._original, self._dispatcher)
        return value if self._twin is None else rebound(value, self._original, self._twin, self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __getitem__(self, key: Any) -> Any:
        return self._original[key]

    def __len__(self) -> int:
        return len(self._original)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._original)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._original)})

    def __repr__(self) -> str:
        return f"Compiled({self._original!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        self.check_code("copied")
        return Compiled(copy.deepcopy(self._original, memo), self.options, self._explicit)

    def __reduce__(self) -> Any:
        self.check_code("pickled")
        return Compiled, (self._original, self.options, self._explicit)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A compiled function in a class body is a method, as a plain function is."""
        if instance is None or isinstance(self._original, nn.Module):
            return self
        return functools.partial(self, instance)


def _delegate(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(nn.Module, name))
    def method(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        original = self._original
        if not isinstance(original, nn.Module):
            raise AttributeError(f"a compiled function has no {name}()")
        if name in _HOOKED:
            self.check_code("hooked")
        result = getattr(original, name)(*args, **kwargs)
        return self if result is original else result

    return method


_HOOKED = """register_backward_hook register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook""".split()
_METHODS = """add_module apply bfloat16 buffers children cpu cuda double eval extra_repr float
    get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict modules
    mtia named_buffers named_children named_modules named_parameters parameters
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook
    requires_grad_ set_extra_state set_submodule share_memory state_dict to to_empty train type
    xpu zero_grad""".split()
for _name in _METHODS:
    if hasattr(nn.Module, _name):
        setattr(Compiled, _name, _delegate(_name))
