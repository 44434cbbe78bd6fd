"""From a Python call to the right specialisation: guards, dynamic shapes, fallbacks.

A call's *key* holds everything a graph may have been specialised on: the structure of the
arguments, numbers and texts by value, and of every tensor the shape and dtype. Known keys go
straight to their program. An unknown key first tries the existing programs of the same structure
(whose guards decide); then a new one is captured, with the dimensions that have been seen to vary
left open.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import forked
from .build import store_for
from .capture.arguments import (
    SCALARS,
    Order,
    argument_names,
    canonical,
    canonical_tree,
    defaults,
    is_plain,
    is_wrapped,
    positional,
    signature_of,
    watched,
)
from .capture.captured import misfit
from .capture.checked import INVALID
from .capture.dynamic import Declared, declared_dims, varying, with_small_open
from .capture.state import states_of
from .capture.tree import Tree, flatten_call, unflatten
from .errors import CaptureError, ChangeError, InputError
from .guards.keys import FLOATS, autocast_key, crowded, structure_key
from .guards.watch import Structure, modules_of
from .modes import collector_paused
from .notes import Notes
from .options import Options
from .program import Program, Unfit
from .specialise import Bucket, Refused, Specialiser

MAX_PROGRAMS = 8
"""Programs captured for one structure of arguments before the original runs instead."""
MAX_SETTLED = 4
"""How often a model may change its attributes, each time a reason to capture it anew."""
MAX_FLEETING = 8
"""How often a model may change before any program served twice; then the original runs."""
MAX_KEYS = 4096
"""Remembered keys; the table is emptied when full."""

_VALUES = frozenset(SCALARS)
_autocast = torch._C._is_any_autocast_enabled


class Dispatcher:
    """Runs ``target`` compiled where it can be, else as it is. Safe under threads."""

    def __init__(
        self,
        target: Callable[..., Any] | None,
        options: Options,
        dynamic_shapes: Any = None,
        signature: inspect.Signature | None = None,
        shell: nn.Module | None = None,
    ) -> None:
        """A loaded program has no ``target``; ``shell`` holds its weights."""
        self.target, self.options, self.dynamic_shapes = target, options, dynamic_shapes
        self.notes = Notes()
        self.modules = modules_of(target)
        self._table: dict[Any, tuple[Program, Order | None] | None] = {}
        self._buckets: dict[Any, Bucket] = {}
        self._unlock()
        forked.in_child(self._unlock)
        self._settled = 0  # how often the original had to run first; see MAX_SETTLED
        self._restless = False  # whether it changes itself at every call
        self._fleeting = 0  # how often in a row no program served two calls; see MAX_FLEETING
        self._structure = Structure(self.modules)
        self._defaults = defaults()
        self.signature = signature_of(target) if signature is None else signature
        owners = self.modules if shell is None else [shell]
        self.specialiser = Specialiser(
            target, options, self.signature, self.notes, store_for(options), owners
        )

    def _unlock(self) -> None:
        self._lock = threading.RLock()

    # -- the call -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of ``target(*args, **kwargs)``."""
        if len(args) == 1 and not kwargs:
            return self.one(args[0])
        return self._call(args, kwargs)

    def one(self, leaf: Any) -> Any:
        """The result of ``target(leaf)``: the shortest way for the most frequent kind of call."""
        if type(leaf) is not Tensor or _autocast():
            return self._call((leaf,), {})
        try:
            key = (leaf.shape, leaf.dtype, leaf.device)
        except RuntimeError:  # a nested tensor has no shape
            return self._original((leaf,), {})
        return self._dispatch(key, [leaf], leaf.requires_grad, (leaf,), {})

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        key: list[Any] = [len(args), *kwargs]
        grad = False
        for leaf in (*args, *kwargs.values()) if kwargs else args:
            kind = type(leaf)
            if kind is Tensor:
                tensors.append(leaf)
                try:
                    key.append(leaf.shape)
                except RuntimeError:
                    return self._original(args, kwargs)
                key.append(leaf.dtype)
                key.append(leaf.device)
                if leaf.requires_grad:
                    grad = True
            elif kind is int or leaf is None or kind is bool:
                key.append(kind)
                key.append(leaf)
            else:
                return self._call_nested(args, kwargs)
        if _autocast():
            key.append(autocast_key())
        return self._dispatch(tuple(key), tensors, grad, args, kwargs)

    def _call_nested(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call with containers, texts, floats or parameters among its arguments."""
        tensors: list[Tensor] = []
        grad = False
        try:
            leaves, tree = flatten_call((args, kwargs))
            key: list[Any] = [tree]
            for leaf in leaves:
                kind = type(leaf)
                if kind is Tensor or kind is nn.Parameter:
                    tensors.append(leaf)
                    key += (leaf.shape, leaf.dtype, leaf.device)
                    grad = grad or leaf.requires_grad
                elif isinstance(leaf, Tensor):
                    return self._original(args, kwargs)  # fake tensors, other tracers' proxies
                elif kind in FLOATS:
                    key += (kind, repr(leaf))  # 0.0 and -0.0 differ, nan equals itself
                elif kind in _VALUES or isinstance(leaf, type):
                    key += (kind, leaf)
                else:
                    return self._refuse(kind.__name__, args, kwargs)
            if _autocast():
                key.append(autocast_key())
            whole = tuple(key)
            hash(whole)
        except (TypeError, ValueError, RuntimeError) as error:
            return self._refuse(str(error), args, kwargs)
        return self._dispatch(whole, tensors, grad, args, kwargs, states_of((args, kwargs)))

    def _refuse(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the original on arguments that cannot be part of a key."""
        self.notes.say(
            "PLT-CAP-009",
            f"an argument cannot be compared between calls ({what}), so the original ran",
            "pass tensors, numbers, texts and containers of them",
        )
        return self._original(args, kwargs)

    def _dispatch(
        self,
        key: tuple[Any, ...],
        tensors: list[Tensor],
        grad: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        objects: Sequence[Any] = (),
    ) -> Any:
        if grad and torch.is_grad_enabled():
            if self.target is None:
                raise InputError(
                    "PLT-INP-003",
                    "an input requires gradients, for which a loaded program has no Python code",
                    "call it under torch.no_grad() or torch.inference_mode()",
                )
            self.notes.say(
                "PLT-CAP-003",
                "an input requires gradients, so the original ran",
                "call under torch.no_grad() or torch.inference_mode()",
            )
            return self._original(args, kwargs)
        if watched():
            return self._original(args, kwargs)
        if self._outgrown():
            self._outgrow()
        if self._structure.trains:
            self.notes.say(
                "PLT-CAP-016",
                "the model is in training mode, so the original ran",
                "call .eval() first",
            )
            return self._original(args, kwargs)
        found = self._table.get(key, self)
        if found is self:
            if torch.compiler.is_dynamo_compiling():
                return self._original(args, kwargs)
            refused = None
            try:
                found = self._find(key, tensors, args, kwargs)
            except Refused as error:  # of which errors of the original's own should not tell
                refused = error
            if refused is not None:
                return self._first_refusal(refused, key, tensors, args, kwargs)
        if found is None:
            return self._original(args, kwargs)
        if found[0].choosy:  # type: ignore[index]
            refused = None
            try:
                found = self._decided(found, key, tensors, args, kwargs)  # type: ignore[arg-type]
            except Refused as error:
                refused = error
            if refused is not None:
                return self._first_refusal(refused, key, tensors, args, kwargs)
            if found is None:
                return self._original(args, kwargs)
        program, order = found  # type: ignore[misc]
        if program.watch is not None and program.watch.changed():
            with self._lock:
                fresh = self._refresh(program)
            if not fresh:
                if key not in self._table:
                    return self._dispatch(key, tensors, grad, args, kwargs, objects)
                return self._original(args, kwargs)
        if order is not None:
            tensors = [tensors[i] for i in order.tensors]
            objects = [objects[i] for i in order.objects]
        invalid = False
        try:
            return program.run(tensors, objects)
        except Unfit as error:
            unfit = error
        except RuntimeError as error:
            invalid = INVALID in str(error) and self.target is not None
            if not invalid and all(map(is_plain, tensors)):
                raise
            # The key does not tell sparse tensors from dense ones; kernels notice before they start
            unfit = Unfit("PLT-CAP-008", "an argument is not a plain dense tensor")
        if invalid:
            return self._original(args, kwargs)  # it raises what the user expects
        return self._unfit(unfit, args, kwargs)

    def _unfit(self, unfit: Unfit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's result, or error, for arguments that a program must not be given."""
        if self.target is None:
            raise InputError(unfit.remark, unfit.reason, unfit.hint)
        result = self._original(args, kwargs)
        self.notes.say(unfit.remark, f"{unfit.reason}, so the original ran", unfit.hint)
        return result

    def _first_refusal(
        self,
        refused: Refused,
        key: Any,
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The original's result. It runs once, for it may change things, and before anything is
        said or kept: what was wrong may be this call's arguments.
        """
        result = self._original(args, kwargs)
        noticed = isinstance(refused.error, ChangeError) and refused.error.noticed
        if refused.settles and self._settled < MAX_SETTLED:
            # The original has now made what it keeps: tables for a length, shapes of weights.
            self._settled += 1
            if not noticed:
                self.forget()
            if states_of((args, kwargs)):
                return result  # the next call can be captured: this one's arguments have changed
            try:
                self._find(key, tensors, args, kwargs)
            except Refused as again:
                refused = again
            else:
                return result
        error = refused.error
        with self._lock:
            if isinstance(error, ChangeError) and not error.noticed:
                self.forget()  # programs may have been made with what is different now
                self._restless = True
            if refused.bucket is not None:
                refused.bucket.hopeless = True
            self._leave(key)
        self.notes.say(error.remark, f"{error.reason}; the original runs", error.hint)
        return result

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.target is None:
            raise InputError("PLT-INP-003", "a loaded program has no Python code to fall back on")
        with self.specialiser.tracing:
            pass  # another thread's trace has its end
        return self.target(*args, **kwargs)

    # -- a key seen for the first time ----------------------------------------------------------

    def _find(
        self,
        key: tuple[Any, ...],
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Program, Order | None] | None:
        with self._lock:
            if len(self._table) >= MAX_KEYS:
                self._table.clear()
            if self._restless:
                return None
            try:
                args, kwargs, order = canonical(
                    self.signature, args, kwargs, is_wrapped(self.target)
                )
            except TypeError as error:
                if self.target is None:
                    raise InputError(
                        "PLT-INP-001", str(error), f"its arguments are {self.signature}"
                    ) from None
                # The original raises what the user expects, or a hook changes the arguments first.
                reason = f"arguments differ from the signature: {error}"
                raise Refused(CaptureError("PLT-CAP-001", reason)) from None
            if order is not None:
                tensors = [tensors[i] for i in order.tensors]
            with collector_paused():
                program = self._program(tensors, args, kwargs)
            if program is None:
                self._leave(key)
                return None
            self._table[key] = program, order
            return program, order

    def _leave(self, key: tuple[Any, ...]) -> None:
        """Later calls with this key run the original, unless it is values that tell."""
        if any(p.choosy for p in self.programs):
            self._table.pop(key, None)
        else:
            self._table[key] = None

    def _decided(
        self,
        found: tuple[Program, Order | None],
        key: tuple[Any, ...],
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Program, Order | None] | None:
        """What was found, or what it takes where the call's values decide otherwise."""
        program, order = found
        if program.holds(tensors if order is None else [tensors[i] for i in order.tensors]):
            return found
        return self._find(key, tensors, args, kwargs)

    def _program(
        self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Program | None:
        leaves, tree = flatten_call((args, kwargs))
        structure = structure_key(leaves, tree, self.target is not None)
        bucket = self._buckets.setdefault(structure, Bucket())
        shapes = [t.shape for t in tensors]
        for program in bucket.programs:
            if program.matches(shapes) and program.holds(tensors):
                return program
        if self.target is None:
            known = [p.captured for p in bucket.programs or self.programs]
            names = argument_names(tree, positional(self.signature))
            raise misfit(known, tensors, zip(names, leaves, strict=True))
        if bucket.hopeless:
            return None
        if not bucket.programs and crowded(
            structure, [key for key, other in self._buckets.items() if other.programs]
        ):
            del self._buckets[structure]
            self.notes.say(
                "PLT-CAP-013",
                "programs exist already for many values of the numbers among the arguments, so the "
                "original runs for others",
                "pass numbers that vary as tensors",
            )
            return None
        if len(bucket.programs) >= MAX_PROGRAMS or bucket.fickle():
            self.notes.say(
                "PLT-CAP-013",
                f"{len(bucket.programs)} programs exist already for this structure of arguments, "
                "so the original runs for other sizes and values",
                "declare the varying dimensions by dynamic_shapes=",
            )
            return None
        declared = declared_dims(self.dynamic_shapes, self.signature, args, kwargs, tensors)
        bucket.seen.append(shapes)
        automatic = varying(bucket.seen, declared)
        if any(t.is_cuda for t in tensors):
            automatic = [{} for _ in declared]  # kernels for GPUs are made for known sizes
        program = self.specialiser.specialise(bucket, args, kwargs, declared, automatic)
        if program is None:
            bucket.hopeless = True
            return None
        self._keep(program, bucket)
        if any(d.small for d in declared):
            self._add_open(bucket, tree, args, kwargs, declared)
        return program

    def _keep(self, program: Program, bucket: Bucket) -> None:
        self._structure.settings.read(program.captured.reads)
        bucket.programs.append(program)

    def _add_open(
        self,
        bucket: Bucket,
        tree: Tree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        declared: list[Declared],
    ) -> None:
        """Adds, beside the program for a size of 0 or 1, one for the sizes that were declared."""
        larger, opened = with_small_open(flatten_call((args, kwargs))[0], declared)
        shapes = [x.shape for x in larger if isinstance(x, Tensor)]
        if any(p.matches(shapes) for p in bucket.programs):
            return
        args, kwargs = unflatten(tree, larger)
        try:
            program = self.specialiser.specialise(
                bucket, args, kwargs, opened, [{} for _ in opened]
            )
        except Refused as refused:
            error = refused.error
            self.notes.say(error.remark, f"{error.reason}; the original runs", error.hint)
            return
        if program is not None:
            self._keep(program, bucket)

    def _refresh(self, program: Program) -> bool:
        """Prepares ``program`` again from the weights of now; False if that is no use."""
        if program.watch is None or not program.watch.changed():
            return True  # another thread did it
        if self.target is not None and program.restless():
            self.notes.say(
                "PLT-CAP-017",
                "weights change at almost every call, so the original runs",
                "make what changes an input of the model",
            )
            return False
        if not program.adopt_weights():
            if self.target is None:
                raise InputError(
                    "PLT-INP-007",
                    "a weight of a loaded program is of another shape, layout, dtype or device",
                    "put back one like it, or load the model again",
                )
            self.forget()
            return False
        if not self.specialiser.renew(program):
            return False
        self.notes.add("PLT-CAP-014", "weights changed; they were prepared again", kind="note")
        return True

    def _outgrown(self) -> bool:
        """Whether the model, or what its tensors are made like, is another now."""
        return self._structure.changed() or defaults() != self._defaults

    def _outgrow(self) -> None:
        """Drops the programs of a model that is another now. Where it is at nearly every call, the
        original runs from now on.
        """
        with self._lock:
            if not self._outgrown():
                return  # it was being captured in another thread, for which settings change
            programs = self.programs
            served = any(p.calls > 1 for p in programs)
            self._fleeting = 0 if served else self._fleeting + bool(programs)
            if self._fleeting == MAX_FLEETING:
                self._restless = True
                self.notes.say(
                    "PLT-CAP-026",
                    "parts or attributes change at almost every call, so the original runs",
                    "make what changes an argument or a tensor",
                )
            self.forget()

    def forget(self) -> None:
        """Drops every program that can be made anew: the next call captures again."""
        with self._lock:
            self._table.clear()
            if self.target is not None:
                self._buckets.clear()
                self.specialiser.forget_weights()
            self._structure.snapshot()
            self._defaults = defaults()

    @property
    def programs(self) -> list[Program]:
        """Every program, oldest first."""
        return [p for b in self._buckets.values() for p in b.programs]

    def current(self) -> list[Program]:
        """`programs` with the weights of now; those that the model has outgrown are dropped."""
        with self._lock:
            if self._structure.changed():
                self.forget()
            return [p for p in self.programs if self._refresh(p)]

    def adopt(self, program: Program) -> None:
        """Adds a program made elsewhere (loaded from a file)."""
        captured = program.captured
        captured.in_tree = canonical_tree(self.signature, captured.in_tree)
        specs = iter(captured.inputs)
        fixed = [next(specs) if slot is None else slot[0] for slot in captured.in_leaves]
        structure = structure_key(fixed, captured.in_tree, False)
        self._buckets.setdefault(structure, Bucket()).programs.append(program)
