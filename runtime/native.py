"""Native functions from LLVM IR, compiled by TVM: what plait runs beside its kernels.

They are compiled once per machine and kept in the cache directory as a shared library; without a
linker they are compiled into this process instead. Nothing loaded is ever unloaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

WORDS = """
define internal i64 @plait_get(ptr %words, i64 %k) {
  %p = getelementptr i64, ptr %words, i64 %k
  %v = load i64, ptr %p
  ret i64 %v
}

define internal ptr @plait_pointer(ptr %words, i64 %k) {
  %v = call i64 @plait_get(ptr %words, i64 %k)
  %p = inttoptr i64 %v to ptr
  ret ptr %p
}

define internal void @plait_set(ptr %words, i64 %k, i64 %v) {
  %p = getelementptr i64, ptr %words, i64 %k
  store i64 %v, ptr %p
  ret void
}

define internal void @plait_add(ptr %words, i64 %k, i64 %v) {
  %old = call i64 @plait_get(ptr %words, i64 %k)
  %new = add i64 %old, %v
  call void @plait_set(ptr %words, i64 %k, i64 %new)
  ret void
}
"""
"""LLVM IR of what reads and changes a word of an array: get, pointer, set, add."""


@dataclass(frozen=True)
class Function:
    """A native function ``name`` of pointers ``params`` that returns nothing.

    ``ir`` is LLVM IR text that defines it as ``@<name>_body``.
    """

    name: str
    params: tuple[str, ...]
    ir: str


_ROOM = 8 << 20  # without it LLVM, which cannot write an object file, ends the process
_kept: list[Any] = []  # modules whose code must stay mapped


def load(stem: str, functions: Sequence[Function]) -> dict[str, int]:
    """Addresses of ``functions`` by name. The file in the cache directory begins with ``stem``.

    Imports TVM where nothing fit is kept. Raises what TVM raises for IR that it cannot compile.
    """
    directory = Path(os.environ.get("PLAIT_CACHE_DIR") or platformdirs.user_cache_dir("plait"))
    digest = hashlib.sha256("".join(dict.fromkeys(f.ir for f in functions)).encode()).hexdigest()
    path = directory / f"{stem}-{digest[:16]}.so"
    if not _is_whole(path):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if min(map(_room, (directory, Path(tempfile.gettempdir())))) < _ROOM:
                return _in_process(functions)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
                built = Path(scratch) / f"{stem}.so"
                _compile(functions, with_addresses=False).export_library(str(built))
                with built.open("ab") as file:  # loaders ignore what follows the sections
                    file.write(hashlib.sha256(built.read_bytes()).hexdigest().encode())
                built.replace(path)
        except Exception:  # no linker (TVM raises TypeError), no room, no rights
            return _in_process(functions)
    try:
        library = ctypes.CDLL(str(path))
        return {
            f.name: ctypes.cast(getattr(library, f.name), ctypes.c_void_p).value or 0
            for f in functions
        }
    except (OSError, AttributeError):  # cut short or from another machine: build it afresh
        with contextlib.suppress(OSError):  # a folder that can only be read
            path.unlink()
        return _in_process(functions)


def _room(folder: Path) -> float:
    """Bytes that a file in ``folder`` may have."""
    free = shutil.disk_usage(folder).free
    try:
        import resource  # not on Windows
    except ImportError:
        return free
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return free if limit == resource.RLIM_INFINITY else min(free, limit)


def _is_whole(path: Path) -> bool:
    """Whether a kept library ends in its own checksum: mapping one cut short kills the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-64]).hexdigest().encode() == content[-64:]


def _in_process(functions: Sequence[Function]) -> dict[str, int]:
    module = _compile(functions, with_addresses=True)
    _kept.append(module)
    return {f.name: module[f"{f.name}_address"]() for f in functions}


def _compile(functions: Sequence[Function], with_addresses: bool) -> Any:
    """Compiles ``functions`` with TVM's LLVM; returns the module. Imports TVM.

    TVM inlines imported IR into the function that calls it and drops the rest, so each entry point
    is a PrimFunc of one call. ``<name>_address`` functions serve machines without a linker.
    """
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    def entry(name: str, params: Sequence[str], ir: str, packed: bool = False) -> Any:
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            args = [T.arg(p, T.handle()) for p in params]
            T.func_attr({"global_symbol": name, **({} if packed else {"calling_conv": 1})})
            with T.attr(0, "pragma_import_llvm", ir):
                if packed:
                    T.Return(T.call_extern("int64", name + "_body"))
                else:
                    T.evaluate(T.call_extern("void", name + "_body", *args))
        return builder.get()

    def address(function: Function) -> Any:
        params = ", ".join("ptr" for _ in function.params)
        ir = (
            f"declare void @{function.name}({params})\n"
            f"define i64 @{function.name}_address_body() "
            f"{{ ret i64 ptrtoint (ptr @{function.name} to i64) }}\n"
        )
        return entry(f"{function.name}_address", (), ir, packed=True)

    parts = {f.name: entry(f.name, f.params, f.ir) for f in functions}
    if with_addresses:
        parts |= {f"{f.name}_address": address(f) for f in functions}
    return tvm.compile(tvm.IRModule(parts), target=tvm.target.Target({"kind": "llvm"}))
