"""The loading half of compiled kernels: shared libraries in, function addresses out.

Nothing here imports TVM or torch, so a saved plan runs where no compiler is installed. A kernel is
a plain C function (`kernels.abi`); its library needs libc and libm only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs


class LoadError(RuntimeError):
    """A kernel library that cannot be used: damaged, of another machine, or without the symbol."""


def digest(data: bytes) -> str:
    """The content hash under which a library is stored (sha256, hexadecimal)."""
    return hashlib.sha256(data).hexdigest()


class Library:
    """Compiled kernels in memory; they stay mapped as long as this object lives, and longer.

    ``keep`` holds whatever owns the code when it does not come from a file.
    """

    def __init__(self, handle: ctypes.CDLL | None, addresses: Mapping[str, int], keep: Any = None):
        self._handle = handle
        self._addresses = dict(addresses)
        self._keep = keep

    def address(self, symbol: str) -> int:
        """The address of kernel ``symbol``. Raises LoadError when the library has none."""
        found = self._addresses.get(symbol)
        if found is None:
            try:
                function = getattr(self._handle, symbol)
            except (AttributeError, TypeError):
                raise LoadError(f"no kernel {symbol!r} in this library: compile again") from None
            found = ctypes.cast(function, ctypes.c_void_p).value
            assert found is not None
            self._addresses[symbol] = found
        return found


def load(path: str | os.PathLike[str], sha256: str | None = None) -> Library:
    """Loads the kernel library at ``path``, which must have the content hash ``sha256`` if given.

    Give the hash for every file that something else may have touched: a library that was cut short
    would crash the process while it is being mapped. Raises LoadError.
    """
    if sha256 is not None:
        try:
            actual = digest(Path(path).read_bytes())
        except OSError as error:
            raise LoadError(f"cannot read the kernel library {path}: {error}") from error
        if actual != sha256:
            raise LoadError(f"kernel library {path} is damaged: compile again")
    try:
        # Unresolved symbols show here, not in the middle of a call: ctypes loads with RTLD_NOW.
        return Library(shared_library(path), {})
    except OSError as error:
        raise LoadError(f"cannot load the kernel library {path}: {error}") from error


def load_bytes(data: bytes, sha256: str | None = None) -> Library:
    """Loads a kernel library from memory. Raises LoadError, as `load` does."""
    if sha256 is not None and digest(data) != sha256:
        raise LoadError("the kernel library is damaged: compile again")
    try:
        descriptor, path = tempfile.mkstemp(prefix="plait-", suffix=".so")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return load(path)
        finally:
            os.unlink(path)  # the mapping outlives the name
    except OSError as error:
        try:
            return Library(_unnamed(data), {})
        except OSError:
            raise LoadError(f"cannot write a kernel library to load it: {error}") from error


def shared_library(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """The library at ``path``, also on file systems where nothing is executed. Raises OSError."""
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        try:
            return _unnamed(Path(path).read_bytes())
        except OSError:
            raise error from None


def _unnamed(data: bytes) -> ctypes.CDLL:
    """A library from memory alone, which needs no folder. Raises OSError.

    Its descriptor stays open, for the dynamic linker knows libraries by their names: one number
    for two of them would make the second one the first.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no files in memory")
    descriptor = os.memfd_create("plait-kernels")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def function(address: int, arguments: int) -> Any:
    """A ctypes function ``f(lo, hi, *words)`` for a kernel of ``arguments`` words after the range.

    It takes Python ints (pointers and symbol values alike) and releases the GIL.
    """
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * (2 + arguments))(address)


def cache_directory() -> Path:
    """``$PLAIT_CACHE_DIR``, or plait's directory in the user's cache."""
    return Path(os.environ.get("PLAIT_CACHE_DIR") or platformdirs.user_cache_dir("plait"))
