"""The engines under comparison. Each takes a model and its inputs and returns a ready call.

An engine may change the model it is given: the harness gives each one a copy. What an engine
raises, the harness records as BASELINE_ERROR; it never stops the others.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .bounds import Machine
from .workloads import FORMS

if TYPE_CHECKING:  # it needs the passes, which listing the engines does not
    from .limits import Limits

Call = Callable[[], Any]


class NotApplicable(Exception):
    """The engine has nothing to say about this model or is not installed."""


@dataclass(frozen=True)
class Peer:
    """An engine: ``prepare(model, inputs)`` compiles and returns a call without arguments.

    ``form`` is the form of the model that it is given (`workloads.FORMS`), "" for the model itself.
    """

    name: str
    summary: str
    prepare: Callable[[nn.Module, tuple[Any, ...]], Call]
    family: str = "torch"
    form: str = ""


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in a model's output, in order (containers, dataclasses and model outputs)."""
    leaves: list[torch.Tensor] = []
    if hasattr(output, "to_tuple"):  # transformers' ModelOutput
        output = output.to_tuple()
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            leaves.append(leaf)
    return leaves


def _eager(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
    return lambda: model(*inputs)


def _channels_last(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise NotApplicable("no 2-d convolution")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    return lambda: model(*images)


def _torch_compile(freeze: bool, mode: str | None) -> Callable[[nn.Module, tuple[Any, ...]], Call]:
    def prepare(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
        import torch._inductor.config as inductor

        def call_model(*args: Any) -> Any:
            return model(*args)

        # Dynamo keeps what it compiled at the code object, without looking at Inductor's options:
        # a code object of its own keeps this mode from running what another one compiled.
        call_model.__code__ = call_model.__code__.replace(co_name=f"call_{mode}_{freeze}")
        options = {"freezing": freeze, "force_disable_caches": True}  # caches would hide the cost
        compiled = torch.compile(call_model, mode=mode)
        with inductor.patch(options), _quiet():
            compiled(*inputs)
        return lambda: compiled(*inputs)

    return prepare


def _onnxruntime(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
    _need("onnxruntime", "onnx", "onnxscript")
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    _exportable(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, inputs, path, dynamo=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, [x.numpy() for x in inputs], strict=True))
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def _openvino(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
    _need("openvino")
    import openvino  # pyright: ignore[reportMissingImports]

    dtypes = {p.dtype for p in model.parameters()}
    precision = {torch.bfloat16: "bf16", torch.float16: "f16"}
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": next((h for d, h in precision.items() if d in dtypes), "f32"),
    }
    _exportable(model)
    with _quiet():
        converted = openvino.convert_model(model, example_input=inputs)
        for node, x in zip(converted.inputs, inputs, strict=True):
            node.get_node().set_partial_shape(openvino.PartialShape(list(x.shape)))
        converted.validate_nodes_and_infer_types()
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
    request = compiled.create_infer_request()
    arrays = [x.numpy() for x in inputs]

    def call() -> list[torch.Tensor]:
        # Both share memory with OpenVINO: the fastest way that it offers.
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(results[port]) for port in compiled.outputs]

    return call


def _plait(
    without: str = "",
    routes: Callable[[nn.Module, tuple[Any, ...]], Any] | None = None,
    groups: bool = True,
) -> Callable[[nn.Module, tuple[Any, ...]], Call]:
    """plait, with one pass of its default pipeline left out, or with a profile that ``routes``
    makes; without bets on ``groups`` of branches.
    """

    def prepare(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
        from ..compiler.api import compile
        from ..compiler.pipeline import DEFAULT_PIPELINE

        pipeline = ",".join(p for p in DEFAULT_PIPELINE.split(",") if p != without)
        if not groups:
            pipeline = pipeline.replace("speculate-routes", "speculate-routes{groups=false}")
        with _quiet():
            profile = None if routes is None else routes(model, inputs)
            compiled = compile(model, example_inputs=inputs, pipeline=pipeline, profile=profile)
        if compiled.plan is None:  # the original would run, and nothing of ours be measured
            why = next((r.reason for r in reversed(compiled.remarks) if r.kind == "missed"), "")
            raise RuntimeError(f"not compiled: {why}")
        return functools.partial(compiled, *inputs)

    return prepare


def limits_of(call: Call, machine: Machine) -> Limits | None:
    """What bounds a call that an engine of plait's family prepared; None where that is unknown."""
    if not isinstance(call, functools.partial):
        return None
    from .limits import limits

    program = call.func.programs[-1]  # type: ignore[attr-defined]
    tensors = [x for x in tensors_of(call.args) if isinstance(x, torch.Tensor)]
    return limits(program.executable.executor, [*tensors, *program.captured.states], machine)


def _profile_of(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    from ..compiler.routing.profile import profile

    return profile(model, resampled(inputs))


def resampled(inputs: tuple[Any, ...], batches: int = 16) -> list[tuple[Any, ...]]:
    """Batches like ``inputs``: their samples (first dimension) drawn with replacement, so that
    loads vary from batch to batch as those of samples at random do.
    """
    generator = torch.Generator().manual_seed(0)
    count = inputs[0].shape[0]
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(batches)]
    return [tuple(x[rows] if x.shape[0] == count else x for x in inputs) for rows in drawn]


_ENGINES = (
    Peer("plait", "plait.compile", _plait(), "plait"),
    Peer("plait-in-order", "plait.compile without its pass schedule", _plait("schedule"), "plait"),
    Peer(
        "plait-profiled",
        "plait.compile with a profile to bet on",
        _plait(routes=_profile_of),
        "plait",
    ),
    Peer(
        "plait-no-groups",
        "plait-profiled without bets on branches that run together",
        _plait(routes=_profile_of, groups=False),
        "plait",
    ),
    Peer("eager", "PyTorch eager", _eager),
    Peer("eager-cl", "PyTorch eager, channels last", _channels_last),
    Peer("compile", "torch.compile, default", _torch_compile(False, None)),
    Peer("compile-freeze", "torch.compile, freezing", _torch_compile(True, None)),
    Peer("compile-max", "freezing and max-autotune", _torch_compile(True, "max-autotune")),
    Peer("ort", "ONNX Runtime", _onnxruntime, "engine"),
    Peer("openvino", "OpenVINO", _openvino, "engine"),
)


def _forms(peer: Peer) -> list[Peer]:
    """``peer``, and for one of PyTorch's modes the same with the model's other forms."""
    if peer.family != "torch":
        return [peer]
    return [peer] + [
        replace(peer, name=f"{peer.name}-{form}", summary=f"{peer.summary}; {what}", form=form)
        for form, what in FORMS.items()
    ]


PEERS: dict[str, Peer] = {p.name: p for engine in _ENGINES for p in _forms(engine)}


def select(names: Sequence[str]) -> list[Peer]:
    """The engines with these names, in this order; behind one of PyTorch's modes the same mode on
    the other forms of a model, for workloads that have any.

    Raises ValueError naming the closest match when a name is unknown.
    """
    for name in names:
        if name not in PEERS:
            close = difflib.get_close_matches(name, PEERS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use some of {', '.join(PEERS)}"
            raise ValueError(f"unknown peer {name!r}: {hint}")
    chosen: dict[str, Peer] = {}
    for name in names:
        chosen.update({p.name: p for p in _forms(PEERS[name])} if not PEERS[name].form else {})
        chosen[name] = PEERS[name]
    return list(chosen.values())


def _exportable(model: nn.Module) -> None:
    """Chooses the form of transformers' experts that ONNX and OpenVINO have operators for."""
    select = getattr(model, "set_experts_implementation", None)
    if select is not None:
        select("batched_mm")


def _need(*modules: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise NotApplicable(f"{', '.join(missing)} is not installed")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and autotuners print pages; their errors still arrive as exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
