"""Weights on a slower tier: a private file whose pages are mapped while they are wanted.

A `Bank` is a constant of a plan, cut into units. The whole of it has addresses, so that kernels
read it like any other memory, but only units that were loaded occupy the process: `Bank.load` maps
a unit's pages and reads those that the page cache lacks, `Bank.drop` gives them back. A unit that
is read without having been loaded is read in by page faults: slower, never wrong.

The file has no name, so nobody can change, cut or remove it, and it goes when the process ends,
however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PAGE = mmap.PAGESIZE
HUGE = 1 << 21
"""A huge page. Pages written at once and mapped at such an address are mapped at once, too."""
SMALL = 1 << 16
"""What is written at once elsewhere: no more than that is mapped around what was asked for."""
_DONTNEED, _POPULATE_READ, _FIXED = 4, 22, 0x10  # of <linux/mman.h>


class BankError(OSError):
    """Weights cannot be kept in a file here, or cannot be read back."""


def supported() -> bool:
    """Whether this system gives mapped pages back when it is told to."""
    return sys.platform == "linux"


class PrivateFile:
    """A file without a name in ``folder``, for contents that are mapped.

    Raises BankError where no file can be made.
    """

    def __init__(self, folder: Path) -> None:
        if not supported():
            raise BankError(f"weights can be kept in a file on Linux only, this is {sys.platform}")
        self.size = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = _unnamed(folder)
        except OSError as error:
            raise BankError(f"cannot make a file in {folder}: {error.strerror}") from error

    def close(self) -> None:
        """Gives up the descriptor, of which a process has few; what is mapped stays."""
        descriptor, self.descriptor = vars(self).get("descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    def write(self, content: Any, piece: int = SMALL) -> None:
        """Appends bytes, ``piece`` at a time. Raises BankError, as when the disk is full."""
        view = memoryview(content).cast("B")
        try:
            while view:
                count = os.write(self.descriptor, view[:piece])
                view, self.size = view[count:], self.size + count
        except OSError as error:
            raise BankError(f"cannot write weights to a file: {error.strerror}") from error

    def settle(self) -> None:
        """Waits until the disk has everything, so that pages can leave the page cache."""
        os.fdatasync(self.descriptor)

    def map(self) -> Mapped:
        """The contents in memory. Raises BankError."""
        return Mapped(self)


class Mapped:
    """What a `PrivateFile` holds, at addresses; pages come when they are touched.

    What is written to it stays private to this process.
    """

    def __init__(self, file: PrivateFile) -> None:
        length = -(-file.size // PAGE) * PAGE
        # Address space of our own, in which the file is then mapped where huge pages can be.
        self.space = mmap.mmap(-1, length + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        """What every tensor keeps alive."""
        base = torch.frombuffer(self.space, dtype=torch.uint8).data_ptr()
        self._start = -base % HUGE
        place, flags = base + self._start, mmap.MAP_PRIVATE | _FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc().mmap(place, length, protection, flags, file.descriptor, 0) != place:
            raise BankError(f"cannot map weights: {os.strerror(ctypes.get_errno())}")

    def tensor(self, begin: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, with a storage of its own, of what lies at byte ``begin``."""
        count = math.prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self.space, dtype=dtype, count=count, offset=self._start + begin)
        return flat.view(tuple(shape))


class Bank:
    """A tensor ``[units, ...]`` whose units are loaded and dropped one by one.

    ``units`` gives them in order, all of one shape and type; ``alone`` tells that it is only one.
    ``cached`` tells whether dropped units may stay in the operating system's page cache (else they
    leave the machine's memory, too). Raises BankError.
    """

    def __init__(
        self,
        folder: Path,
        units: Iterable[torch.Tensor],
        cached: bool = True,
        alone: bool = False,
    ) -> None:
        self.file = PrivateFile(folder)
        self.cached = cached
        count, piece = 0, HUGE
        shape, dtype = torch.Size(), torch.uint8
        for unit in units:
            shape, dtype = unit.shape, unit.dtype
            if unit.nbytes % HUGE and not alone:
                piece = SMALL  # parts of a huge page could not be dropped
            self.file.write(raw_bytes(unit.contiguous()), piece)
            count += 1
        if not self.file.size:
            raise ValueError("a bank has units, and these have elements")
        self.count, self.unit_bytes = count, self.file.size // count
        self.tensor = self.file.map().tensor(0, (count, *shape), dtype)
        self._base = self.tensor.data_ptr()
        if cached:
            self.file.close()
        else:
            self.file.settle()
            self._forget(0, self.file.size)

    @property
    def nbytes(self) -> int:
        """All units together."""
        return self.file.size

    def load(self, unit: int) -> None:
        """Maps a unit, reading it where it is not in memory. Raises BankError if that fails."""
        if _libc().madvise(*self.span(unit), _POPULATE_READ):
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.EINTR):  # before Linux 5.14 page faults read it
                raise BankError(f"weights cannot be read back: {os.strerror(code)}")

    def span(self, unit: int) -> tuple[int, int]:
        """Address and bytes of all pages that a unit has a part of."""
        begin = unit * self.unit_bytes
        end = begin + self.unit_bytes
        begin -= begin % PAGE
        return self._base + begin, end - begin

    def pages(self, unit: int) -> tuple[int, int]:
        """Address and bytes of the pages of a unit that no other unit has a part of."""
        begin = -(-unit * self.unit_bytes // PAGE) * PAGE
        end = (unit + 1) * self.unit_bytes
        end = end // PAGE * PAGE if unit + 1 < self.count else -(-end // PAGE) * PAGE
        return self._base + begin, max(0, end - begin)

    def forget(self, unit: int) -> None:
        """Lets the pages of a dropped unit leave the page cache, where that is wanted."""
        if not self.cached:
            address, length = self.pages(unit)
            self._forget(address - self._base, length)

    def _forget(self, begin: int, length: int) -> None:
        os.posix_fadvise(self.file.descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def drop(parts: Sequence[tuple[Bank, int]]) -> None:
    """Gives back the pages of units of banks."""
    ranges = [bank.pages(unit) for bank, unit in parts]
    if len(ranges) < 2 or not _drop_together(ranges):
        for address, length in ranges:
            if length:
                _libc().madvise(address, length, _DONTNEED)
    for bank, unit in parts:
        bank.forget(unit)


def _drop_together(ranges: Sequence[tuple[int, int]]) -> bool:
    """Drops all ranges by one call, which interrupts other processors once (Linux 6.13 and later);
    False where that is not possible.
    """
    descriptor = own_pidfd()
    if descriptor < 0:
        return False
    words = [word for pair in ranges if pair[1] for word in pair]
    vector = (ctypes.c_size_t * len(words))(*words)
    done = _libc().syscall(PROCESS_MADVISE, descriptor, vector, len(words) // 2, _DONTNEED, 0)
    if done == sum(words[1::2]):
        return True
    _descriptors[os.getpid()] = -1
    return False


PROCESS_MADVISE = 440  # the same number on every architecture
_descriptors: dict[int, int] = {}


def own_pidfd() -> int:
    """A descriptor of this process, for `PROCESS_MADVISE`; -1 where the system refuses that."""
    process = os.getpid()  # another one behind a fork
    found = _descriptors.get(process)
    if found is None:
        try:
            found = os.pidfd_open(process)
        except OSError:  # before Linux 5.3, or forbidden
            found = -1
        _descriptors[process] = found
    return found


def waits() -> int:
    """How often the calling thread has waited, as for a disk."""
    import resource  # which Windows has not, but neither has it banks

    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_nvcsw


def raw_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def release(tensor: torch.Tensor) -> None:
    """Gives back pages of a tensor of a `Mapped` that nobody wrote to."""
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if begin < end:
        _libc().madvise(begin, end - begin, _DONTNEED)


def _unnamed(folder: Path) -> int:
    with contextlib.suppress(OSError):  # not every file system knows files without a name
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="weights-")
    os.unlink(name)
    return descriptor


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    sizes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    words = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.syscall.argtypes = [*words, ctypes.c_uint]
    library.syscall.restype = ctypes.c_long
    library.mmap.argtypes, library.mmap.restype = sizes, ctypes.c_void_p
    return library
