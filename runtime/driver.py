"""The native half of the CPU executor: an interpreter for launch tables, written as LLVM IR.

A *launch* runs many kernels in one parallel region. Every worker walks its own list of
entries; an entry is six 64-bit words::

    [op, fn, lo, hi, args, args_class]
      END      0  the list is over
      CALL     1  fn(lo, hi, args...)
      SIGNAL   2  add one to the counter at ``fn``; what was written before can be seen after
      STEAL    3  take chunks [i, i+chunk) below hi from the shared counter at ``lo`` until none is
                  left; ``args_class`` holds class | chunk << 8
      WAIT     4  until the counter at ``fn`` is at least ``lo``
      CHECKED  5  CALL, after which the launch ends early if the kernel has set its stop word:
                  what was to follow on this worker, or waits on another, does not run
      JUMP     6  go on at the entry at ``fn``

Because a table is data, a fused launch, a schedule or a balance of work needs no code generation.
Workers are the threads of torch's own OpenMP team (``GOMP_parallel``), so kernels and library
operators never fight over cores; where that entry point is missing, the launch runs serially: the
workers take turns, each until it would have to wait. Counters are zero when a launch starts.

A C function may be called with more integer arguments than it takes (the System V and AAPCS64
calling conventions let the caller clean up), which is why one call site per *class* of argument
counts is enough.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import platform
import weakref
from typing import Any

from . import forked, native

ENTRY_WORDS = 6
END, CALL, SIGNAL, STEAL, WAIT, CHECKED, JUMP = range(7)
ARG_CLASSES = (4, 8, 16, 32, 64, 128)

# Words of a launch block; worker list addresses follow, then as many scratch words (cursors).
WORKERS, GOMP, THREAD_NUM, NUM_THREADS, YIELD, COUNTERS, N_COUNTERS = range(7)
PATCHES, N_PATCHES, STOP, STOPPED, LISTS = range(7, 12)
# STOP is the address of the stop word, which is STOPPED itself where nothing else sets one.


def args_class(count: int) -> int:
    """Index of the smallest argument class that holds ``count`` words.

    Raises ValueError above 128.
    """
    for index, size in enumerate(ARG_CLASSES):
        if count <= size:
            return index
    raise ValueError(f"a kernel with {count} arguments exceeds the limit of {ARG_CLASSES[-1]}")


def _call_ir() -> str:
    """``@call``: one indirect call per argument class."""
    cases = " ".join(f"i64 {i}, label %c{i}" for i in range(1, len(ARG_CLASSES)))
    lines = [
        "define internal void @plait_call(ptr %fn, i64 %lo, i64 %hi, ptr %a, i64 %class) {",
        f"  switch i64 %class, label %c0 [{cases}]",
    ]
    for index, size in enumerate(ARG_CLASSES):
        lines.append(f"c{index}:")
        for k in range(size):
            lines.append(f"  %p{index}_{k} = getelementptr i64, ptr %a, i64 {k}")
            lines.append(f"  %v{index}_{k} = load i64, ptr %p{index}_{k}")
        values = ", ".join(f"i64 %v{index}_{k}" for k in range(size))
        lines.append(f"  call void %fn(i64 %lo, i64 %hi, {values})")
        lines.append("  ret void")
    return "\n".join([*lines, "}"])


_PREPARE_IR = """
define internal void @plait_prepare(ptr %launch, ptr %ext) {
entry:
  %ncp = getelementptr i64, ptr %launch, i64 N_COUNTERS
  %nc = load i64, ptr %ncp
  %cp = getelementptr i64, ptr %launch, i64 COUNTERS
  %counters = load ptr, ptr %cp
  %npp = getelementptr i64, ptr %launch, i64 N_PATCHES
  %patches = load i64, ptr %npp
  %pp = getelementptr i64, ptr %launch, i64 PATCHES
  %table = load ptr, ptr %pp
  br label %zero
zero:
  %z = phi i64 [ 0, %entry ], [ %z1, %clear ]
  %zmore = icmp ult i64 %z, %nc
  br i1 %zmore, label %clear, label %patch
clear:
  %zp = getelementptr i64, ptr %counters, i64 %z
  store i64 0, ptr %zp
  %z1 = add i64 %z, 1
  br label %zero
patch:
  %k = phi i64 [ 0, %zero ], [ %k1, %apply ]
  %pmore = icmp ult i64 %k, %patches
  br i1 %pmore, label %apply, label %out
apply:
  %row = mul i64 %k, 3
  %rowp = getelementptr i64, ptr %table, i64 %row
  %srcp = getelementptr i64, ptr %rowp, i64 1
  %offp = getelementptr i64, ptr %rowp, i64 2
  %word = load ptr, ptr %rowp
  %src = load i64, ptr %srcp
  %off = load i64, ptr %offp
  %basep = getelementptr i64, ptr %ext, i64 %src
  %base = load i64, ptr %basep
  %addr = add i64 %base, %off
  store i64 %addr, ptr %word
  %k1 = add i64 %k, 1
  br label %patch
out:
  ret void
}
"""

_CORE_IR = """
define internal ptr @plait_segment(ptr %first, ptr %stop) {
entry:
  br label %loop
loop:
  %e = phi ptr [ %first, %entry ], [ %next, %done ], [ %fn, %jump ]
  %next = getelementptr i64, ptr %e, i64 6
  %op = load i64, ptr %e
  %fnp = getelementptr i64, ptr %e, i64 1
  %lop = getelementptr i64, ptr %e, i64 2
  %hip = getelementptr i64, ptr %e, i64 3
  %argp = getelementptr i64, ptr %e, i64 4
  %clsp = getelementptr i64, ptr %e, i64 5
  %fn = load ptr, ptr %fnp
  %lo = load i64, ptr %lop
  %hi = load i64, ptr %hip
  %args = load ptr, ptr %argp
  %cls = load i64, ptr %clsp
  switch i64 %op, label %end [
    i64 1, label %run
    i64 2, label %signal
    i64 3, label %steal
    i64 4, label %wait
    i64 5, label %checked
    i64 6, label %jump
  ]
run:
  call void @plait_call(ptr %fn, i64 %lo, i64 %hi, ptr %args, i64 %cls)
  br label %done
checked:
  call void @plait_call(ptr %fn, i64 %lo, i64 %hi, ptr %args, i64 %cls)
  %stopped = load atomic i64, ptr %stop monotonic, align 8
  %go = icmp eq i64 %stopped, 0
  br i1 %go, label %done, label %end
jump:
  br label %loop
steal:
  %counter = inttoptr i64 %lo to ptr
  %chunk = lshr i64 %cls, 8
  %class = and i64 %cls, 255
  br label %take
take:
  %i = atomicrmw add ptr %counter, i64 %chunk monotonic
  %left = icmp slt i64 %i, %hi
  br i1 %left, label %work, label %done
work:
  %j = add i64 %i, %chunk
  %over = icmp sgt i64 %j, %hi
  %top = select i1 %over, i64 %hi, i64 %j
  call void @plait_call(ptr %fn, i64 %i, i64 %top, ptr %args, i64 %class)
  br label %take
done:
  br label %loop
signal:
  %old = atomicrmw add ptr %fn, i64 1 release
  br label %done
wait:
  %now = load atomic i64, ptr %fn acquire, align 8
  %open = icmp sge i64 %now, %lo
  br i1 %open, label %done, label %blocked
blocked:
  ret ptr %e
end:
  ret ptr null
}

define internal void @plait_spin(ptr %launch, ptr %e, ptr %stop) {
entry:
  %fnp = getelementptr i64, ptr %e, i64 1
  %lop = getelementptr i64, ptr %e, i64 2
  %counter = load ptr, ptr %fnp
  %target = load i64, ptr %lop
  br label %spin
spin:
  %tries = phi i64 [ 0, %entry ], [ %tries1, %again ]
  %now = load atomic i64, ptr %counter acquire, align 8
  %open = icmp sge i64 %now, %target
  br i1 %open, label %out, label %wait
wait:
  %stopped = load atomic i64, ptr %stop monotonic, align 8
  %over = icmp ne i64 %stopped, 0
  br i1 %over, label %out, label %longer
longer:
  %tries1 = add i64 %tries, 1
  %patient = icmp ult i64 %tries, 4000
  br i1 %patient, label %pause, label %yield
pause:
  call void asm sideeffect "PAUSE", "~{memory}"()
  br label %again
yield:
  %yp = getelementptr i64, ptr %launch, i64 YIELD
  %yf = load ptr, ptr %yp
  %ignored = call i32 %yf()
  br label %again
again:
  br label %spin
out:
  ret void
}

define internal void @plait_parallel(ptr %launch, i64 %worker) {
entry:
  %slot = add i64 %worker, LISTS
  %listp = getelementptr i64, ptr %launch, i64 %slot
  %list = load ptr, ptr %listp
  %stopp = getelementptr i64, ptr %launch, i64 STOP
  %stop = load ptr, ptr %stopp
  br label %loop
loop:
  %e = phi ptr [ %list, %entry ], [ %rest, %sync ]
  %rest = call ptr @plait_segment(ptr %e, ptr %stop)
  %over = icmp eq ptr %rest, null
  br i1 %over, label %out, label %sync
sync:
  call void @plait_spin(ptr %launch, ptr %rest, ptr %stop)
  %stopped = load atomic i64, ptr %stop monotonic, align 8
  %go = icmp eq i64 %stopped, 0
  br i1 %go, label %loop, label %out
out:
  ret void
}

define internal void @plait_serial(ptr %launch) {
entry:
  %np = getelementptr i64, ptr %launch, i64 WORKERS
  %n = load i64, ptr %np
  %stopp = getelementptr i64, ptr %launch, i64 STOP
  %stop = load ptr, ptr %stopp
  %scratch = add i64 %n, LISTS
  br label %copy
copy:
  %c = phi i64 [ 0, %entry ], [ %c1, %copy ]
  %from = add i64 %c, LISTS
  %fromp = getelementptr i64, ptr %launch, i64 %from
  %list = load i64, ptr %fromp
  %to = add i64 %c, %scratch
  %top = getelementptr i64, ptr %launch, i64 %to
  store i64 %list, ptr %top
  %c1 = add i64 %c, 1
  %more = icmp ult i64 %c1, %n
  br i1 %more, label %copy, label %round
round:
  br label %worker
worker:
  %w = phi i64 [ 0, %round ], [ %w1, %skip ]
  %alive = phi i64 [ 0, %round ], [ %alive1, %skip ]
  %at = add i64 %w, %scratch
  %atp = getelementptr i64, ptr %launch, i64 %at
  %e = load ptr, ptr %atp
  %ended = icmp eq ptr %e, null
  br i1 %ended, label %skip0, label %go
go:
  %rest = call ptr @plait_segment(ptr %e, ptr %stop)
  store ptr %rest, ptr %atp
  br label %skip
skip0:
  br label %skip
skip:
  %ran = phi i64 [ 1, %go ], [ 0, %skip0 ]
  %alive1 = add i64 %alive, %ran
  %w1 = add i64 %w, 1
  %morew = icmp ult i64 %w1, %n
  br i1 %morew, label %worker, label %check
check:
  %stopped = load i64, ptr %stop
  %on = icmp eq i64 %stopped, 0
  %some = icmp ne i64 %alive1, 0
  %any = and i1 %some, %on
  br i1 %any, label %round, label %out
out:
  ret void
}

define void @plait_thread_body(ptr %launch) {
  %np = getelementptr i64, ptr %launch, i64 WORKERS
  %n = load i64, ptr %np
  %teamp = getelementptr i64, ptr %launch, i64 NUM_THREADS
  %teamf = load ptr, ptr %teamp
  %team32 = call i32 %teamf()
  %team = sext i32 %team32 to i64
  %idp = getelementptr i64, ptr %launch, i64 THREAD_NUM
  %idf = load ptr, ptr %idp
  %id32 = call i32 %idf()
  %id = sext i32 %id32 to i64
  %full = icmp eq i64 %team, %n
  br i1 %full, label %parallel, label %short
parallel:
  call void @plait_parallel(ptr %launch, i64 %id)
  ret void
short:
  %first = icmp eq i64 %id, 0
  br i1 %first, label %serial, label %out
serial:
  call void @plait_serial(ptr %launch)
  ret void
out:
  ret void
}

declare void @plait_thread(ptr)

define void @plait_launch_body(ptr %launch, ptr %ext) {
entry:
  %stopp = getelementptr i64, ptr %launch, i64 STOP
  %stop = load ptr, ptr %stopp
  store i64 0, ptr %stop
  call void @plait_prepare(ptr %launch, ptr %ext)
  %np = getelementptr i64, ptr %launch, i64 WORKERS
  %n = load i64, ptr %np
  %one = icmp ule i64 %n, 1
  %gp = getelementptr i64, ptr %launch, i64 GOMP
  %gomp = load ptr, ptr %gp
  %none = icmp eq ptr %gomp, null
  %alone = or i1 %one, %none
  br i1 %alone, label %serial, label %team
team:
  %n32 = trunc i64 %n to i32
  call void %gomp(ptr @plait_thread, ptr %launch, i32 %n32, i32 0)
  ret void
serial:
  call void @plait_serial(ptr %launch)
  ret void
}
"""


def prepare_ir() -> str:
    """LLVM IR of ``@plait_prepare(block, ext)``, which every launch begins with: counters become
    zero, and arguments point to what the call brings.
    """
    return _named(_PREPARE_IR)


def llvm_ir() -> str:
    """The interpreter as LLVM IR text for this machine."""
    pause = "pause" if platform.machine() in ("x86_64", "AMD64") else "yield"
    return _call_ir() + prepare_ir() + _named(_CORE_IR.replace("PAUSE", pause))


def _named(text: str) -> str:
    """The text with numbers of words for their names."""
    names = {
        "WORKERS": WORKERS,
        "THREAD_NUM": THREAD_NUM,
        "NUM_THREADS": NUM_THREADS,
        "N_COUNTERS": N_COUNTERS,
        "COUNTERS": COUNTERS,
        "N_PATCHES": N_PATCHES,
        "PATCHES": PATCHES,
        "GOMP": GOMP,
        "YIELD": YIELD,
        "STOP": STOP,
        "LISTS": LISTS,
    }
    for name, value in names.items():
        text = text.replace(f"i64 {name}\n", f"i64 {value}\n").replace(
            f", {name}\n", f", {value}\n"
        )
    return text


@functools.cache
def launch_function() -> Any:
    """The native ``launch(block_address, ext_address)`` as a ctypes function (releases the GIL)."""
    text = llvm_ir()
    thread = native.Function("plait_thread", ("launch",), text)
    launch = native.Function("plait_launch", ("launch", "ext"), text)
    address = native.load("driver", [launch, thread])["plait_launch"]
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)


_shared: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_alone = False


def share(block: Any) -> None:
    """Says that the launch at ``block`` (an array) is shared by an OpenMP team."""
    _shared[block.ctypes.data] = block


def alone() -> bool:
    """Whether launches run serially for a process that had made shared ones forked this one."""
    return _alone


def _leave_team() -> None:
    global _alone
    for block in list(_shared.values()):
        block[GOMP], _alone = 0, True


forked.at_fork(child=_leave_team)


def openmp() -> tuple[int, int, int]:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in torch's OpenMP.

    (0, 0, 0) when torch has no OpenMP with that entry point, or the team of it that was used
    belongs to a process that forked this one; launches then run serially.
    """
    return (0, 0, 0) if _alone else _openmp()


@functools.cache
def _openmp() -> tuple[int, int, int]:
    import torch

    libraries = glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "lib*omp*"))
    for name in [*sorted(libraries), None]:
        try:
            library = ctypes.CDLL(name)
            return tuple(
                ctypes.cast(getattr(library, f), ctypes.c_void_p).value or 0
                for f in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            )  # type: ignore[return-value]
        except (OSError, AttributeError):
            continue
    return 0, 0, 0


@functools.cache
def sched_yield() -> int:
    """Address of libc's sched_yield."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


@functools.cache
def clock_gettime() -> int:
    """Address of libc's clock_gettime: as a kernel, task ``lo`` is the clock, ``hi`` the result."""
    return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
