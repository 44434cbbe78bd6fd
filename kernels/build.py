"""From PrimFuncs to machine code: a batch of kernels becomes one shared library.

Compilation is TVM's lowering, LLVM, and one run of the C compiler as a linker. TVM releases the
GIL, so parts of a batch compile in threads. Where there is no C compiler, LLVM's in-process linker
serves: the same code, but it cannot be kept on disk (``Bundle.persistent`` is False).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import loader
from .abi import Kernel
from .c_compiler import c_compiler
from .files import scratch_folder
from .target import Target

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Names of TVM's runtime in an object file: such code waits for TVM's loader to fill in pointers and
# would crash when it is loaded as plain C.
_RUNTIME_MARKS = (b"__TVM", b"TVMFFI", b"TVMBackend")

_ROOM = 32 << 20
"""Bytes that must be free where object files are written."""


class BuildError(RuntimeError):
    """No kernel of a batch could be compiled, or the linker failed; says why."""


@dataclass
class Bundle:
    """Compiled kernels.

    ``data`` is the shared library (None when it exists in this process only), ``symbols`` the
    kernels in it, ``failed`` the others with the compiler's message, ``seconds`` the wall time,
    ``unlinked`` why there is no shared library although there is a C compiler.
    """

    data: bytes | None
    symbols: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    library: loader.Library | None = None
    unlinked: str = ""

    @property
    def persistent(self) -> bool:
        """Whether the code can be stored and loaded by another process."""
        return self.data is not None

    @property
    def sha256(self) -> str:
        """The content hash of the library ("" when there is none)."""
        return loader.digest(self.data) if self.data is not None else ""

    def load(self) -> loader.Library:
        """The library, loaded at the first call."""
        if self.library is None:
            assert self.data is not None
            self.library = loader.load_bytes(self.data)
        return self.library

    def address(self, symbol: str) -> int:
        """The address of a kernel's C function. Raises `loader.LoadError` for unknown symbols."""
        return self.load().address(symbol)


def build(
    kernels: Sequence[Kernel], target: Target, *, jobs: int | None = None, link: bool = True
) -> Bundle:
    """Compiles kernels into one `Bundle`.

    Every kernel must have a name of its own that is a C identifier (ValueError otherwise); it
    becomes the symbol. A kernel that does not compile is left out and named in ``Bundle.failed``.
    ``jobs`` threads are used (default: the CPUs this process may run on); ``link=False`` compiles
    into this process without the C compiler, as is done where that cannot link. Raises BuildError
    when nothing compiled.
    """
    started = time.perf_counter()
    functions: dict[str, Any] = {}
    for kernel in kernels:
        if not _IDENTIFIER.match(kernel.name):
            raise ValueError(f"kernel name {kernel.name!r} is not a C identifier")
        if kernel.name in functions:
            raise ValueError(f"two kernels are called {kernel.name!r}")
        functions[kernel.name] = kernel.func
    jobs = jobs or available_cpus()
    compiler = c_compiler() if link else None
    failed: dict[str, str] = {}
    with scratch_folder("plait-build-") as scratch:
        if _room(scratch) < _ROOM:
            compiler = None  # LLVM ends the process when it cannot write an object file
        parts = _split(list(functions), jobs)

        def compile_part(number: int) -> list[Any]:
            path = scratch / f"{number}.o" if compiler else None
            return _compile(parts[number], functions, target, path, failed)

        with ThreadPoolExecutor(max_workers=min(jobs, max(len(parts), 1))) as pool:
            products = [p for part in pool.map(compile_part, range(len(parts))) for p in part]
        symbols = tuple(name for name in functions if name not in failed)
        if functions and not symbols:
            name, why = next(iter(failed.items()))
            raise BuildError(f"none of {len(failed)} kernels compiled; {name}: {why}")
        if compiler:
            try:
                data = _link(compiler, products, scratch / "bundle.so")
            except (BuildError, OSError) as error:
                bundle = build(kernels, target, jobs=jobs, link=False)
                return replace(bundle, unlinked=str(error), seconds=time.perf_counter() - started)
            return Bundle(data, symbols, failed, time.perf_counter() - started)
    addresses = {n: int(m[f"{n}__address"]()) for m, names in products for n in names}
    library = loader.Library(None, addresses, keep=products)
    return Bundle(None, symbols, failed, time.perf_counter() - started, library)


def _room(directory: Path) -> float:
    """Bytes that a file in ``directory`` may have."""
    free = shutil.disk_usage(directory).free
    try:
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    except ImportError:
        return free
    return free if limit == resource.RLIM_INFINITY else min(free, limit)


def available_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _split(names: list[str], jobs: int) -> list[list[str]]:
    """Round-robin parts, more than threads, so that a slow one does not hold up the rest."""
    count = min(len(names), 1 if jobs == 1 else 2 * jobs)
    return [names[i::count] for i in range(count)]


def _compile(
    names: list[str],
    functions: dict[str, Any],
    target: Target,
    path: Path | None,
    failed: dict[str, str],
) -> list[Any]:
    """Object files (or in-process modules with their symbols) for ``names``.

    When the part does not compile as a whole, its kernels are compiled one by one to find the
    guilty ones, which go to ``failed``.
    """
    try:
        module = lower_to_llvm({n: functions[n] for n in names}, target, addresses=path is None)
        if path is None:
            return [(module, names)]
        module.write_to_file(str(path), "o")
        content = path.read_bytes()
        marks = [m.decode() for m in _RUNTIME_MARKS if m in content]
        if marks:
            raise BuildError(
                f"the code calls TVM's runtime ({', '.join(marks)}): a kernel may neither assert"
                " nor allocate from the heap"
            )
        return [path]
    except Exception as error:  # TVM raises RuntimeError, ValueError, TypeError and others
        if len(names) == 1:
            failed[names[0]] = f"{type(error).__name__}: {error}"
            return []
    products: list[Any] = []
    for i, name in enumerate(names):
        single = path.with_name(f"{path.stem}_{i}.o") if path else None
        products += _compile([name], functions, target, single, failed)
    return products


def _link(compiler: Iterable[str], objects: list[Path], output: Path) -> bytes:
    flags = ["-shared", "-nostartfiles"] if sys.platform != "darwin" else ["-dynamiclib"]
    command = [*compiler, *flags, "-o", str(output), *map(str, objects), "-lm"]
    if not objects:  # an empty batch still is a library
        command[-1:] = ["-x", "c", os.devnull]
    # Compilers have working files of their own, for which they know fewer places than Python.
    # Where no PATH is set, they were found in the usual places, where their parts are, too.
    surroundings = {"PATH": os.defpath, **os.environ, "TMPDIR": str(output.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode != 0:
        tail = done.stderr.strip()[-2000:]
        raise BuildError(f"the linker failed ({shlex.join(command[:3])} ...): {tail}")
    return output.read_bytes()


def lower_to_llvm(functions: dict[str, Any], target: Target, *, addresses: bool = False) -> Any:
    """Compiles PrimFuncs by symbol name to one TVM runtime module of kind "llvm".

    With ``addresses`` the module also has a packed function ``<name>__address`` for each kernel.
    """
    import tvm
    from tvm.tirx.build import tir_to_runtime

    from .ops.rounding import with_instruction

    bound = target.tvm()
    bound = bound.with_host(bound)
    if target.bf16_pairs and functions:
        first = next(iter(functions))
        functions = {**functions, first: with_instruction(functions[first])}
    lowered: dict[Any, Any] = {}
    for flat in (True, False):
        part = {n: f for n, f in functions.items() if _is_flat(f.body) == flat}
        if addresses and flat:
            part |= {f"{n}__address": _address_function(n) for n in functions}
        named = {n: part[n].with_attr("global_symbol", n) for n in sorted(part)}
        module = tvm.tirx.transform.BindTarget(bound)(tvm.IRModule(named))
        with bound:  # some operators ask what it has
            lowered.update(_pipeline(flat)(module).functions)
    return tir_to_runtime(tvm.IRModule(lowered), {}, bound)


def _is_flat(stmt: Any) -> bool:
    """Whether a body has only buffers of one dimension that are not bool.

    Flattening such buffers would do nothing but cost a quarter of TVM's time. Any statement that
    is not known here counts as not flat.
    """
    pending = [stmt]
    while pending:
        node = pending.pop()
        kind = type(node).__name__
        if kind == "SeqStmt":
            pending.extend(node.seq)
        elif kind in ("For", "While", "AttrStmt"):
            pending.append(node.body)
        elif kind == "IfThenElse":
            pending.append(node.then_case)
            if node.else_case is not None:
                pending.append(node.else_case)
        elif kind in ("AllocBuffer", "DeclBuffer"):
            if len(node.buffer.shape) != 1 or str(node.buffer.dtype).startswith("bool"):
                return False
        elif kind not in ("BufferStore", "Evaluate", "Bind"):
            return False
    return True


def _pipeline(flat: bool) -> Any:
    """What plain loops need of TVM's default pipeline, at less than half of its time.

    Common subexpressions, dead code and loop-invariant conditions are left to LLVM. TVM's storage
    rewriting must not run: it forgets which temporaries were promised to lie on the stack.
    """
    import tvm
    from tvm import s_tir

    from .signs import divide_plainly

    tir = tvm.tirx.transform
    return tvm.ir.transform.Sequential(
        [
            *([] if flat else [tir.StmtSimplify(), tir.FlattenBuffer()]),
            tir.BF16ComputeLegalize(),
            tir.VectorizeLoop(True),
            tir.UnrollLoop(),
            tir.StmtSimplify(),
            s_tir.transform.RewriteUnsafeSelect(),
            divide_plainly(),
            tir.FP8ComputeLegalize(),
            tir.SplitHostDevice(),
            tir.MakePackedAPI(),
            tir.FP8StorageLegalize(),
            tir.BF16StorageLegalize(),
            tir.LowerTVMBuiltin(),
            tir.LowerIntrin(),
        ]
    )


def _address_function(name: str) -> Any:
    """A packed function that returns the address of the C function ``name`` of its module."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    ir = (
        f"declare void @{name}()\n"
        f"define i64 @{name}__address_body() {{ ret i64 ptrtoint (ptr @{name} to i64) }}\n"
    )
    with IRBuilder() as builder, T.prim_func():
        T.func_name(f"{name}__address")
        T.func_attr({"global_symbol": f"{name}__address"})
        with T.attr(0, "pragma_import_llvm", ir):
            T.Return(T.call_extern("int64", f"{name}__address_body"))
    return builder.get()
