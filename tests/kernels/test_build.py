"""A batch of kernels becomes one library of plain C functions."""

from __future__ import annotations

import ctypes
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from plait.kernels import build as build_module
from plait.kernels import loader
from plait.kernels.abi import Kernel, TensorArg
from plait.kernels.build import BuildError, build
from plait.kernels.emit import Emitter
from plait.kernels.target import host

ROWS, LANES = 8, 16
ARG = TensorArg(torch.float32, (ROWS, LANES), (LANES, 1))


def scale(name: str, factor: float, call: str | None = None) -> Kernel:
    """``out = in * factor``; a task is a row of 16. ``call`` adds a call of that C function."""
    em = Emitter(name, [ARG], [ARG])
    with em.function() as task:
        if call:
            T.evaluate(tir.call_extern("int32", call))
        with T.vectorized(LANES) as j:
            value = em.inputs[0].load([task, j]) * em.f32(factor)
            em.outputs[0].store(value, [task, j])
    return Kernel(name, em.finish(), (ARG,), (ARG,), (), ROWS)


def run(address: int) -> torch.Tensor:
    x, y = torch.arange(ROWS * LANES, dtype=torch.float32), torch.zeros(ROWS * LANES)
    call = loader.function(address, 2)
    call(0, 3, x.data_ptr(), y.data_ptr())
    call(3, ROWS, x.data_ptr(), y.data_ptr())
    return y / x.clamp(min=1)


def check(address: int, factor: float) -> None:
    expected = torch.full((ROWS * LANES,), factor)
    expected[0] = 0
    assert torch.equal(run(address), expected)


def test_every_kernel_of_a_batch_runs() -> None:
    bundle = build([scale(f"k{i}", float(2**i)) for i in range(11)], host(), jobs=2)
    assert bundle.persistent and bundle.failed == {}
    assert bundle.symbols == tuple(f"k{i}" for i in range(11))
    for i in range(11):
        check(bundle.address(f"k{i}"), float(2**i))


def test_the_same_batch_gives_the_same_bytes() -> None:
    kernels = [scale(f"k{i}", float(i)) for i in range(3)]
    assert build(kernels, host(), jobs=1).sha256 == build(kernels, host(), jobs=1).sha256


def test_without_a_c_compiler_code_lives_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "c_compiler", lambda: None)
    bundle = build([scale("a", 2.0), scale("b", 4.0), scale("c", 8.0)], host(), jobs=2)
    assert not bundle.persistent and bundle.data is None and bundle.sha256 == ""
    for name, factor in (("a", 2.0), ("b", 4.0), ("c", 8.0)):
        check(bundle.address(name), factor)
    with pytest.raises(loader.LoadError, match="no kernel 'd'"):
        bundle.address("d")


def test_where_files_may_not_be_large_none_are_written() -> None:
    """LLVM would end the process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        bundle = build([scale("a", 2.0)], host())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not bundle.persistent
    check(bundle.address("a"), 2.0)


def test_the_linker_works_where_files_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    bundle = build([scale("a", 2.0)], host())
    assert bundle.persistent
    check(bundle.address("a"), 2.0)


def test_libraries_load_where_nothing_in_a_folder_is_executed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on file systems mounted with "noexec", or where there is no place for temporary files."""
    bundles = [build([scale("a", factor)], host()) for factor in (2.0, 3.0)]
    real = ctypes.CDLL

    def refused(name: str) -> ctypes.CDLL:
        if not name.startswith("/proc/self/fd/"):
            raise OSError(f"{name}: failed to map segment from shared object")
        return real(name)

    def no_folder(**_: object) -> object:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(ctypes, "CDLL", refused)
    for bundle, factor in zip(bundles, (2.0, 3.0), strict=True):
        assert bundle.data is not None
        path = tmp_path / f"{factor}.so"
        path.write_bytes(bundle.data)
        check(loader.load(path, bundle.sha256).address("a"), factor)
        check(loader.load_bytes(bundle.data).address("a"), factor)
    monkeypatch.setattr(loader.tempfile, "mkstemp", no_folder)
    for bundle, factor in zip(bundles, (2.0, 3.0), strict=True):
        check(bundle.address("a"), factor)
    with pytest.raises(loader.LoadError, match="cannot write a kernel library"):
        loader.load_bytes(b"no library")


def test_cc_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    build_module.c_compiler.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler-anywhere -m64")
    assert build_module.c_compiler() is None
    build_module.c_compiler.cache_clear()
    monkeypatch.setenv("CC", f"{sys.executable} -m something")
    assert build_module.c_compiler() == (sys.executable, "-m", "something")
    build_module.c_compiler.cache_clear()


@pytest.mark.parametrize("command", [(sys.executable, "-c", "exit('bad')"), ("/proc/bad",)])
def test_where_the_linker_fails_code_lives_in_the_process(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "c_compiler", lambda: command)
    bundle = build([scale("a", 2.0)], host())
    assert not bundle.persistent and "bad" in bundle.unlinked
    check(bundle.address("a"), 2.0)


def test_without_a_path_the_linker_finds_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    bundle = build([scale("a", 2.0)], host())
    assert bundle.persistent and not bundle.unlinked


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
def test_the_library_needs_nothing_of_tvm(tmp_path) -> None:
    kernel = scale("k", 2.0)
    em = Emitter("tanh", [ARG], [ARG])
    with em.function() as task, T.serial(LANES) as j:
        em.outputs[0].store(tir.tanh(em.inputs[0].load([task, j])), [task, j])
    tanh = Kernel("tanh_kernel", em.finish(), (ARG,), (ARG,), (), ROWS)
    path = tmp_path / "k.so"
    path.write_bytes(build([kernel, tanh], host()).data or b"")
    listing = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in listing.splitlines() if " U " in line}
    assert not {s for s in undefined if "TVM" in s or "tvm" in s}
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import importlib.util as u\n"
        "spec = u.spec_from_file_location('loader', sys.argv[3]); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "assert m.load(sys.argv[1]).address('k') and not {'tvm', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, path, str(tmp_path), loader.__file__], check=True)


def test_a_kernel_that_does_not_compile_spares_the_others() -> None:
    em = Emitter("packed", [ARG], [ARG])
    with em.function() as task:
        T.evaluate(tir.call_packed("runtime.something", task))
    bad = Kernel("packed", em.finish(), (ARG,), (ARG,), (), ROWS)
    bundle = build([scale("a", 2.0), bad, scale("b", 4.0)], host(), jobs=1)
    assert bundle.symbols == ("a", "b") and list(bundle.failed) == ["packed"]
    check(bundle.address("b"), 4.0)
    with pytest.raises(BuildError, match="none of 1 kernels compiled; packed"):
        build([bad], host())


def test_heap_allocation_is_refused() -> None:
    em = Emitter("heap", [ARG], [ARG])
    with em.function() as task:
        big = T.alloc_buffer((1 << 16,), "float32")
        with T.serial(1 << 16) as j:
            T.buffer_store(big, em.inputs[0].load([task, j % LANES]), [j])
        em.outputs[0].store(big[task], [task, task])
    bad = Kernel("heap", em.finish(), (ARG,), (ARG,), (), ROWS)
    with pytest.raises(BuildError, match="none of 1 kernels compiled; heap"):
        build([bad], host())


def test_code_that_needs_tvm_at_run_time_is_refused() -> None:
    with pytest.raises(BuildError, match="neither assert nor allocate"):
        build([scale("k", 2.0, call="TVMBackendParallelBarrier")], host())


def test_multi_dimensional_and_bool_temporaries_are_flattened() -> None:
    em = Emitter("k", [ARG], [ARG])
    with em.function() as task:
        tile = T.alloc_buffer((200, LANES), "float32", annotations={"disable_lower_builtin": 1})
        mask = T.alloc_buffer((LANES,), "bool", annotations={"disable_lower_builtin": 1})
        with T.serial(LANES) as j:
            T.buffer_store(tile, em.inputs[0].load([task, j]), [199, j])
            T.buffer_store(mask, j < em.i64(4), [j])
        with T.serial(LANES) as j:
            em.outputs[0].store(T.Select(mask[j], tile[199, j], em.f32(0.0)), [task, j])
    func = em.finish()
    assert not build_module._is_flat(func.body) and build_module._is_flat(scale("s", 1.0).func.body)
    bundle = build([Kernel("k", func, (ARG,), (ARG,), (), ROWS)], host())
    expected = torch.zeros(ROWS, LANES)
    expected[:, :4] = 1
    expected[0, 0] = 0
    assert torch.equal(run(bundle.address("k")).view(ROWS, LANES), expected)


def test_names_must_be_unique_identifiers() -> None:
    with pytest.raises(ValueError, match="two kernels are called 'a'"):
        build([scale("a", 1.0), scale("a", 2.0)], host())
    with pytest.raises(ValueError, match="not a C identifier"):
        build([scale("a-b", 1.0)], host())


def test_an_empty_batch_is_an_empty_library() -> None:
    bundle = build([], host())
    assert bundle.symbols == () and bundle.load() is not None


def test_damaged_libraries_are_refused(tmp_path) -> None:
    bundle = build([scale("a", 2.0)], host())
    assert bundle.data is not None
    path = tmp_path / "a.so"
    path.write_bytes(bundle.data[:1000])
    with pytest.raises(loader.LoadError, match="damaged"):
        loader.load(path, bundle.sha256)
    with pytest.raises(loader.LoadError, match="damaged"):
        loader.load_bytes(bundle.data + b"x", bundle.sha256)
    with pytest.raises(loader.LoadError, match="cannot read"):
        loader.load(tmp_path / "none.so", bundle.sha256)
    path.write_bytes(b"not a library")
    with pytest.raises(loader.LoadError, match="cannot load"):
        loader.load(path)
    check(loader.load_bytes(bundle.data, bundle.sha256).address("a"), 2.0)
    with pytest.raises(loader.LoadError, match="compile again"):
        loader.load_bytes(bundle.data).address("zzz")
