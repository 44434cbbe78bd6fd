"""Kernels for NVIDIA GPUs: definitions scheduled by DLight's rules and compiled by nvcc.

A group becomes a `GpuKernel`: launches of compiled functions, written down as data, so that running
it takes CUDA's driver and nothing of TVM (`cuda_loader`). Usually it is one launch; rules that keep
stages apart make several, with temporaries between them. Rules are tried in the order matrix
product, matrix-vector product, reduction, normalisation; what none of them takes gets one thread
for each element, so every definition has some schedule.

Feng et al., "TensorIR: An Abstraction for Automatic Tensorized Program Optimization", ASPLOS 2023.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import tvm
import tvm.tirx as tir
import tvm_ffi
from tvm import s_tir
from tvm.s_tir import dlight

from . import loader
from .build import BuildError
from .cuda_loader import GpuKernel, Launch
from .database import Database
from .definition import THREADS, Definition
from .definitions import DEFINITIONS
from .files import scratch_folder
from .group import IO, Group, Unsupported
from .target import Target

_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Usage:
    """What a compiled function takes of a multiprocessor, as ptxas tells it.

    ``registers`` of each thread, bytes of static shared memory of each block, and the bytes that
    each thread spills to memory for want of registers.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel before nvcc: the launches, and the device functions that they name, as TIR."""

    kernel: GpuKernel
    functions: dict[Any, Any]

    def function(self, launch: Launch) -> Any:
        """The device function of one of the kernel's launches."""
        return next(f for v, f in self.functions.items() if v.name_hint == launch.function)


@dataclass
class CudaBundle:
    """Compiled GPU kernels.

    ``image`` is a cubin for one GPU generation, ``source`` the CUDA C it was made from, ``kernels``
    says by name how to launch and ``usage`` by device function what it takes; ``failed`` names the
    others with the compiler's message.
    """

    image: bytes
    source: str
    kernels: dict[str, GpuKernel]
    failed: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Usage] = field(default_factory=dict)


def sm90() -> Target:
    """NVIDIA's Hopper generation (H100, H200)."""
    return Target("cuda", "sm_90", 16, 255)


def available() -> bool:
    """Whether GPU code can be compiled here."""
    return shutil.which("nvcc") is not None


@functools.cache
def architectures() -> tuple[str, ...]:
    """The GPU generations that code can be compiled for here, such as "sm_90"."""
    if not available():
        return ()
    said = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=False)
    return tuple(said.stdout.split())


def lower(group: Group, io: IO, target: Target) -> Definition:
    """What a group computes, ready for `schedule`.

    Raises `Unsupported` for kinds of groups that have no definition, and for symbolic sizes.
    """
    if group.kind not in DEFINITIONS:
        raise Unsupported("PLT-GPU-001", f"{group.kind} groups have no GPU kernel")
    try:
        return DEFINITIONS[group.kind](group, io, target)
    except NotImplementedError as error:
        raise Unsupported("PLT-GPU-002", str(error)) from error


def schedule(definition: Definition, target: Target, *, plain: bool = False) -> Any:
    """The definition's function with its loops bound to blocks and threads.

    ``plain`` gives every element of every stage a thread, which always works.
    """
    if definition.bound:
        return definition.bound[plain]
    if not plain:
        gpu = dlight.gpu
        rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction()]
        # A rule may fail on what it does not know instead of declining it.
        with target.tvm(), contextlib.suppress(Exception):
            apply: Any = dlight.ApplyDefaultSchedule(*rules)
            module = apply(tvm.IRModule({"main": definition.func}))
            if module["main"].attrs.get("tirx.is_scheduled", False):
                return module["main"]
    return _one_thread_each(definition)


def _one_thread_each(definition: Definition) -> Any:
    """Every stage a launch of its own, every element that it writes a thread."""
    made = s_tir.Schedule(definition.func)
    for name in definition.blocks:
        block = made.get_sblock(name)
        stage: Any = made.get(block)
        axes: list[Any] = list(stage.iter_vars)
        loops = made.get_loops(block)
        spatial = [
            loop
            for loop, axis in zip(loops, axes, strict=True)
            if axis.iter_type == tir.IterVar.DataPar
        ]
        loop = made.fuse(*spatial) if spatial else made.add_unit_loop(loops[0] if loops else block)
        blocks, threads = made.split(loop, [None, THREADS])
        made.bind(blocks, "blockIdx.x")
        made.bind(threads, "threadIdx.x")
    return made.mod["main"]


def device_kernel(
    name: str, definition: Definition, target: Target, *, plain: bool = False
) -> DeviceKernel:
    """A definition scheduled and lowered as far as nvcc's part. Raises what TVM raises."""
    function = schedule(definition, target, plain=plain)
    return DeviceKernel(*_split(name, function, definition, target))


def build(
    kernels: Mapping[str, DeviceKernel], target: Target, store: Database | None = None
) -> CudaBundle:
    """Compiles lowered kernels, by the names they were lowered with; ``store`` keeps images.

    What nvcc refuses is left out and named in ``failed``. Raises BuildError when nothing compiles
    or nvcc is missing.
    """
    sound, refused = dict(kernels), {}
    kept = None if store is None else _kept(sound, target, store)
    if kept is not None:
        return CudaBundle(*kept[:2], {n: k.kernel for n, k in sound.items()}, refused, kept[2])
    if not available():
        raise BuildError("nvcc is not on the PATH: install the CUDA toolkit to compile GPU kernels")
    try:
        compiled = _compile([k.functions for k in sound.values()], target)
        if store is not None:
            _keep(compiled, target, store)
    except BuildError:
        compiled = _compile_sound(sound, target, refused)
    if not sound:
        name, why = next(iter(refused.items()), ("nothing", "no definitions were given"))
        raise BuildError(f"none of {len(refused)} GPU kernels compiled; {name}: {why}")
    source, image, usage = compiled
    return CudaBundle(image, source, {n: k.kernel for n, k in sound.items()}, refused, usage)


def generate(parts: Sequence[Mapping[Any, Any]], target: Target) -> str:
    """CUDA C of device functions. Needs no nvcc."""
    functions = {k: v for part in parts for k, v in part.items()}
    write = tvm.get_global_func("target.build.cuda")
    return write(tvm.IRModule(functions), target.tvm()).inspect_source()


def _kept(
    kernels: Mapping[str, DeviceKernel], target: Target, store: Database
) -> tuple[bytes, str, dict[str, Usage]] | None:
    """The image, source and usage of an earlier build of the same CUDA C, if the store has it."""
    source = generate([k.functions for k in kernels.values()], target)
    state = store.progress(_task(source, target))
    image = None if state is None else store.get_bundle(state["object"])
    if state is None or image is None:
        return None
    return image, source, {name: Usage(*usage) for name, usage in state["usage"].items()}


def _keep(compiled: tuple[str, bytes, dict[str, Usage]], target: Target, store: Database) -> None:
    source, image, usage = compiled
    state = {"object": store.put_bundle(image), "usage": {n: astuple(u) for n, u in usage.items()}}
    store.set_progress(_task(source, target), state)


def _task(source: str, target: Target) -> str:
    return f"cuda {target.arch} {_nvcc()} {loader.digest(source.encode())}"


@functools.cache
def _nvcc() -> str:
    """The compiler's version; empty where there is none."""
    if not available():
        return ""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\bV[\d.]+", said.stdout)
    return found[0] if found else said.stdout


def _compile_sound(
    kernels: dict[str, DeviceKernel], target: Target, failed: dict[str, str]
) -> tuple[str, bytes, dict[str, Usage]]:
    """Compiles what compiles alone; the rest leaves ``kernels`` for ``failed``."""
    for name, kernel in list(kernels.items()):
        try:
            _compile([kernel.functions], target)
        except BuildError as error:
            failed[name] = str(error)
            del kernels[name]
    return _compile([k.functions for k in kernels.values()], target)


def _compile(parts: list[dict[Any, Any]], target: Target) -> tuple[str, bytes, dict[str, Usage]]:
    """CUDA C, cubin and usage of device functions. Raises BuildError with nvcc's message."""
    if not parts:
        return "", b"", {}
    source = generate(parts, target)
    with scratch_folder("plait-cuda-") as scratch:
        text, image = scratch / "kernels.cu", scratch / "kernels.cubin"
        text.write_text(source)
        command = ["nvcc", "-cubin", f"-arch={target.arch}", "-O3", "-Xptxas", "-v"]
        command += ["-o", str(image), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"nvcc failed: {_errors(done.stderr or done.stdout)}")
        return source, image.read_bytes(), _usage(done.stderr + done.stdout)


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLED = re.compile(r"(\d+) bytes spill stores")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _usage(report: str) -> dict[str, Usage]:
    """What ``ptxas -v`` says of each function; nothing of what it does not mention."""
    found: dict[str, Usage] = {}
    name, spilled = "", 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            name, spilled = entry[1], 0
        elif stores := _SPILLED.search(line):
            spilled = int(stores[1])
        elif (used := _USED.search(line)) and name:
            shared = _SHARED.search(line)
            found[name] = Usage(int(used[1]), int(shared[1]) if shared else 0, spilled)
    return found


# -- host and device --------------------------------------------------------------------------


def _split(
    name: str, function: Any, definition: Definition, target: Target
) -> tuple[GpuKernel, dict[Any, Any]]:
    """Separates what the host does, as data, from the device's functions."""
    _register()
    # With a C calling convention TVM leaves the host's part as it is: a list of launches.
    function = _wide(function).with_attr("global_symbol", name).with_attr("calling_conv", 1)
    bound = target.tvm()
    module = tvm.tirx.transform.BindTarget(bound)(tvm.IRModule({name: function}))
    pipeline: Any = tvm.tirx.get_default_tir_pipeline(bound)
    module = pipeline[0](module)
    host = module[name]
    others = {v: f for v, f in module.functions_items() if v.name_hint != name}
    device = pipeline[2]()(tvm.IRModule(others))
    arguments = (*definition.inputs, *definition.outputs)
    reader = _HostReader(host, [p.arg.dtype.itemsize * p.offset for p in arguments])
    # Variants of one definition share variables, which one source may not bind twice.
    functions = {v: s_tir.renew_defs(_exact(f)) for v, f in device.functions_items()}
    return reader.kernel(name), functions


def _exact(function: Any) -> Any:
    """``function`` with extremes of 64-bit integers whose operands have exactly that type in C, and
    with all digits of doubles.

    TVM writes its constants as ``long long``, its types as ``int64_t``, which is ``long``: C++ has
    an overload of ``min`` for either, and for a pair of both no reason to prefer one. Of doubles it
    writes 15 digits behind the point, which of a small one are zeros: they are given as bits.
    """

    def extreme(value: Any, mutator: Any) -> Any:
        value = mutator.default_mutate(value)
        dtype = str(value.ty.dtype)
        if dtype not in ("int64", "uint64"):
            return value
        return type(value)(_typed(value.a, dtype), _typed(value.b, dtype))

    def constant(value: Any, mutator: Any) -> Any:
        if str(value.ty.dtype) != "float64":
            return value
        (word,) = struct.unpack("<q", struct.pack("<d", value.value))
        return tir.call_pure_extern(
            "float64", "__longlong_as_double", _typed(tir.IntImm("int64", word), "int64")
        )

    rules = ((tir.Min, extreme), (tir.Max, extreme), (tir.FloatImm, constant))
    body = tvm_ffi.structural_mutate(function.body, rules)
    return function.with_body(body)


def _wide(function: Any) -> Any:
    """``function`` where integers whose bits are read as a double keep their 64 bits.

    TVM narrows what it finds to fit 32 bits, such as a widened int32, and looks at the types of
    integers only to know whether it may.
    """

    def call(value: Any, mutator: Any) -> Any:
        value = mutator.default_mutate(value)
        if getattr(value.op, "name", "") != "tirx.reinterpret" or str(value.ty.dtype) != "float64":
            return value
        return tir.reinterpret("float64", _typed(value.args[0], "int64"))

    return function.with_body(tvm_ffi.structural_mutate(function.body, ((tvm.ir.Call, call),)))


def _typed(value: Any, dtype: str) -> Any:
    """``value`` converted to a type of C by a call, about which TVM makes no assumptions."""
    return tir.call_pure_extern(dtype, f"{dtype}_t", value)


class _HostReader:
    """Reads launches and temporaries out of the host's part of a function."""

    def __init__(self, host: Any, offsets: list[int]) -> None:
        self.launches: list[Launch] = []
        self.temporaries: list[int] = []
        self._offsets = offsets
        self._known: list[tuple[Any, int]] = [(p, i) for i, p in enumerate(host.params)]
        self._read(host.body)

    def kernel(self, name: str) -> GpuKernel:
        """What was read."""
        return GpuKernel(name, tuple(self.launches), tuple(self._offsets), tuple(self.temporaries))

    def _read(self, stmt: Any) -> None:
        kind = type(stmt).__name__
        if kind == "SeqStmt":
            for part in stmt.seq:
                self._read(part)
        elif kind == "AttrStmt":
            self._read(stmt.body)
        elif kind == "AllocBuffer":
            buffer = stmt.buffer
            bits = tvm.DataType(str(buffer.dtype)).bits
            self._known.append((buffer, len(self._offsets) + len(self.temporaries)))
            self.temporaries.append(math.prod(int(e) for e in buffer.shape) * (bits // 8))
        elif kind == "DeclBuffer":
            self._known.append((stmt.buffer, self._number(stmt.data)))
        elif kind == "Evaluate" and getattr(stmt.value, "op", None) is not None:
            if stmt.value.op.name != "tirx.call_ffi_kernel":
                raise BuildError(f"the host part calls {stmt.value.op.name}")
            self._launch(stmt.value)
        else:
            raise BuildError(f"the host part has a {kind}")

    def _launch(self, call: Any) -> None:
        names = [str(p) for p in call.attrs.launch_params]
        function, *rest = call.args
        pointers, sizes = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        extents = {n: int(s) for n, s in zip(names, sizes, strict=True)}
        grid, block = (
            tuple(extents.pop(f"{kind}.{axis}", 1) for axis in _AXES)
            for kind in ("blockIdx", "threadIdx")
        )
        shared = extents.pop("tirx.use_dyn_shared_memory", 0)
        if extents:
            raise BuildError(f"unknown launch parameters {sorted(extents)}")
        buffers = tuple(self._number(p) for p in pointers)
        self.launches.append(Launch(str(function.value), grid, block, shared, buffers))

    def _number(self, pointer: Any) -> int:
        """Which buffer an expression such as ``buffer.data`` points to."""
        for buffer, number in self._known:
            if pointer.args[0].same_as(buffer):
                return number
        raise BuildError(f"the host part passes {pointer}")


_AS = {
    ("float32", "int32"): "__float_as_int",
    ("int32", "float32"): "__int_as_float",
    ("float64", "int64"): "__double_as_longlong",
    ("int64", "float64"): "__longlong_as_double",
}


@functools.cache
def _register() -> None:
    """Teaches TVM what some operators are on a GPU."""
    # CUDA's compiler keeps to IEEE 754 by itself: naming a value needs no fence there.
    tir.register_intrin_lowering("plait.named", "cuda", f=lambda call: call.args[0], level=11)
    # Threads share only reductions that TVM knows, and it starts extremes from finite numbers.
    register = tvm.get_global_func("s_tir.schedule.RegisterReducer")
    for combine, first in ((tir.max, "-inf"), (tir.min, "inf")):
        functions = [
            tvm_ffi.convert(lambda a, b, combine=combine: [combine(a[0], b[0])]),
            tvm_ffi.convert(lambda v, first=first: [tir.const(float(first), v[0].ty.dtype)]),
        ]
        for function in functions:  # TVM would free them when Python has ended already
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(function))
        register(1, *functions)
    # TVM would take the address of the operand, which need not have one.
    tir.register_intrin_lowering("tirx.reinterpret", "cuda", f=_reinterpret, level=11)
    tir.register_intrin_lowering("tirx.call_llvm_pure_intrin", "cuda", f=_intrinsic, level=11)


def _reinterpret(call: Any) -> Any:
    source, dest = (str(getattr(e.ty, "dtype", "")) for e in (call.args[0], call))
    name = _AS.get((source, dest))
    return call if name is None else tir.call_pure_extern(dest, name, call.args[0])


def _intrinsic(call: Any) -> Any:
    """LLVM's multiply-add with one rounding, by CUDA's name."""
    dtype, number, operands = str(call.ty.dtype), int(call.args[0]), call.args[1:]
    known = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.fma") == number
    return tir.call_pure_extern(dtype, "fma", *operands) if known and dtype == "float64" else call


def _errors(output: str) -> str:
    """What matters of a compiler's output: its errors, not its pages of warnings."""
    lines = [line for line in output.splitlines() if "error" in line]
    return "\n".join(lines or [output.strip()])[:2000]
