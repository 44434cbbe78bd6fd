"""Whether a problem can fit at all: certificates that it cannot, and packings of what must stay."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .errors import InfeasibleError, shortages
from .problem import Floats, Ints, Problem

Bools = npt.NDArray[np.bool_]

_SUBSETS = (10, 14, *[17] * 8)
"""Units of a device whose subsets are all looked at; more where fewer do not do."""

_HALVES = 8  # pairs of halves that are looked at to fill a device of few units
_SUMS = 150_000  # subsets of a half, at most

_FEW = 24  # units of middling size that fill a device, below which it is filled anew
_SEVERAL = 6  # units that it is filled with at least, where enough are small enough

_AGAIN = 300  # devices that could not be filled, in one search for what fills all of them


def standing(problem: Problem) -> Floats:
    """Bytes that each unit takes from its device for the whole step, in either memory model."""
    p = problem.arrays
    need = p.param + (p.out + p.temp if p.static else 0.0)
    return np.bincount(p.unit, weights=need, minlength=len(p.unit_ptr) - 1)


def refuse_hopeless(problem: Problem) -> None:
    """Raises InfeasibleError where an op, a group or the sum of all cannot fit, whatever is done.

    The message is the certificate: what is too large, on which devices, by how many bytes.
    """
    p = problem.arrays
    always = standing(problem)
    peak = np.repeat(always[:, None], len(p.cap), 1)
    if not p.static:  # while an op runs, its output and temporaries are there beside parameters;
        # one that takes no time frees them at the instant that it takes them
        while_running = np.where(p.time > 0, (p.out + p.temp)[:, None], 0.0)
        np.maximum.at(peak, p.unit, always[p.unit, None] + while_running)
    for u in np.flatnonzero(~(p.allowed & (peak <= p.cap)).any(1)):
        ops = p.unit_op[p.unit_ptr[u] : p.unit_ptr[u + 1]]
        first = problem.ops[ops[0]]
        what = f"op {first.name!r}" if first.group is None else f"group {first.group!r}"
        where = np.flatnonzero(p.allowed[u])
        short = {problem.devices[d].name: float(peak[u, d] - p.cap[d]) for d in where}
        raise InfeasibleError(
            f"{what} needs {peak[u, where].min():.0f} bytes and fits nowhere: {shortages(short)}",
            short,
            True,
        )
    total, room = float(always.sum()), float(p.cap.sum())
    if total > room:
        what = "parameters, outputs and temporaries" if p.static else "parameters"
        names = ", ".join(device.name for device in problem.devices[:16])
        raise InfeasibleError(
            f"{what} need {total:.0f} bytes, all devices together ({names}) have {room:.0f}: "
            f"{total - room:.0f} bytes short",
            {"all devices": total - room},
            True,
        )


def pack(
    problem: Problem, seconds: float, slack: float = 0.0, near: Ints | None = None
) -> Ints | None:
    """Devices by unit such that what stays fits, by integer programming (HiGHS).

    Units of one size that may run on the same devices are counted, not told apart, which is what
    makes large networks tractable: their sizes repeat. Of each kind those units stay on their
    device of ``near`` that can. ``slack`` keeps that share of each device free. None where the time
    ran out, or what was found fits but for rounding. Raises InfeasibleError where, with no slack,
    there is provably no packing.
    """
    p = problem.arrays
    always = standing(problem)
    m = len(p.cap)
    big = np.flatnonzero(always > 0)
    device = np.argmax(p.allowed, axis=1).astype(np.int64) if near is None else near.copy()
    if not len(big):
        return device
    kinds, kind, count = np.unique(
        _sizes_and_devices(problem), axis=0, return_inverse=True, return_counts=True
    )
    scale = 1.0 / max(float(p.cap.max()), 1.0)
    many = len(kinds)
    variables = np.arange(many * m)
    row, where = np.repeat(np.arange(many), m), np.tile(np.arange(m), many)
    once = sparse.csr_matrix((np.ones(many * m), (row, variables)), (many, many * m))
    weights = np.repeat(kinds[:, 0], m) * scale
    loads = sparse.csr_matrix((weights, (where, variables)), (m, many * m))
    solved = milp(
        np.zeros(many * m),
        integrality=np.ones(many * m),
        bounds=Bounds(0, (count[:, None] * kinds[:, 1:]).ravel()),
        constraints=[
            LinearConstraint(once, count, count),
            LinearConstraint(loads, -np.inf, p.cap * scale * (1 - slack)),
        ],
        options={"time_limit": max(seconds, 0.1)},
    )
    if solved.status == 2 and slack == 0.0:
        total = float(always.sum())
        rooms = ", ".join(f"{x.name}: {x.memory_bytes:.0f}" for x in problem.devices[:16])
        raise InfeasibleError(
            f"no packing exists: {len(big)} units of {total:.0f} bytes that must stay, of up to "
            f"{always.max():.0f} each, cannot be divided over devices of "
            f"{rooms} bytes",
            {},
            True,
        )
    if solved.x is None:
        return None
    numbers = np.round(solved.x.reshape(many, m)).astype(np.int64)
    for k, units in enumerate(np.split(big[np.argsort(kind.ravel(), kind="stable")],
                                       np.cumsum(count)[:-1])):  # fmt: skip
        left = numbers[k].copy()
        homeless = []
        for u in units.tolist():
            if left[device[u]] > 0:
                left[device[u]] -= 1
            else:
                homeless.append(u)
        device[homeless] = np.repeat(np.arange(m), left)
    # What the solver's tolerance lets pass is, of sizes that fill devices exactly, no packing.
    return device if (np.bincount(device, always, m) <= p.cap).all() else None


def kinds(problem: Problem) -> int:
    """How many kinds of units `pack` counts."""
    return len(np.unique(_sizes_and_devices(problem), axis=0))


def _sizes_and_devices(problem: Problem) -> Floats:
    """Of each unit that stays in memory: bytes, and whether it may run on each device."""
    always = standing(problem)
    big = always > 0
    return np.column_stack([always[big], problem.arrays.allowed[big]])


def exchange(
    problem: Problem, near: Ints, share: float, rng: np.random.Generator, deadline: float
) -> Ints | None:
    """Devices by unit that fill no device's memory beyond ``share`` with what stays; None: none.

    For sizes that hardly repeat, which `pack` cannot count, and next to no slack. Units stay on
    their device of ``near`` as long as they fit, the largest first. Then one device after another
    is filled to the brim: of a few units of it and of the devices that are left all subsets are
    looked at, and those change places that waste the least. Sums of n units are 2**n numbers, so
    that among some 17 units of each there are nearly always two subsets that differ by just what is
    too much (after Horowitz and Sahni, 1974). The last devices get what is left, and must have room
    for it; where they have few units, only other ones will do, so a device that is full is opened
    again, and what both have is mixed. ``deadline`` is of ``time.perf_counter()``.
    """
    p = problem.arrays
    need, room = standing(problem), p.cap * share
    device = _first_fit(need, room, p.allowed, near)
    left, full = set(range(len(room))), []
    for _ in range(_AGAIN + len(room)):
        load = np.bincount(device, need, len(room))
        if not (load > room)[list(left)].any():
            return device
        # Those with the fewest units have the fewest ways out.
        count = np.bincount(device[need > 0], minlength=len(room))
        a = min(left, key=lambda d: (count[d], rng.random()))
        left.remove(a)
        if _filled(need, room, p.allowed, device, a, left, rng, deadline):
            full.append(a)
            continue
        if time.perf_counter() > deadline or not (left or full):
            return None
        if full:
            other = full.pop(int(rng.integers(len(full))))
        else:
            other = int(rng.choice(sorted(left)))
        left |= {a, other}
        _mix(need, p.allowed, device, a, other, rng)
    return None


def _mix(
    need: Floats, allowed: Bools, device: Ints, a: int, b: int, rng: np.random.Generator
) -> None:  # fmt: skip
    """Shares units of two devices out at random: what they had could only fail again."""
    both = np.isin(device, (a, b)) & allowed[:, a] & allowed[:, b] & (need > 0)
    units = np.flatnonzero(both)
    device[units] = rng.choice((a, b), len(units))


def _filled(
    need: Floats, room: Floats, allowed: Bools, device: Ints, a: int, left: set[int],
    rng: np.random.Generator, deadline: float,
) -> bool:  # fmt: skip
    """Changes ``device`` so that one has what it has room for, at the cost of those ``left``.

    What is wasted of its room is at most what all of these together have too much.
    """
    others = np.array(sorted(left), np.int64)
    over = np.bincount(device, need, len(room)) - room
    if not len(others):
        return bool(over[a] <= 0)
    spare = float(-over[others].sum() - over[a])
    inside = np.isin(device, others) & allowed[:, a] & (need > 0)
    if over[a] <= 0 <= over[a] + spare / len(others):
        return True
    if inside.any() and room[a] < _FEW * float(need[inside].mean()):
        return _filled_anew(need, room, allowed, device, a, others, rng, spare, deadline)
    _level(need, allowed, device, over, a, others)
    inside = np.isin(device, others) & allowed[:, a] & (need > 0)
    for size in _SUBSETS:
        if over[a] <= 0 <= over[a] + spare / len(others):
            return True
        if time.perf_counter() > deadline:
            return False
        b = int(others[over[others].argmin()])
        here = (device == a) & allowed[:, b] & (need > 0)
        mine, theirs = (_some(np.flatnonzero(x), size, rng) for x in (here, inside))
        pair = _nearest_subsets(need[mine], need[theirs], float(over[a]), spare)
        if pair is not None:
            device[mine[pair[0]]], device[theirs[pair[1]]] = b, a
            return True
        if here.sum() <= size and inside.sum() <= size:
            return False  # these were all subsets
    return False


def _filled_anew(
    need: Floats, room: Floats, allowed: Bools, device: Ints, a: int, others: Ints,
    rng: np.random.Generator, spare: float, deadline: float,
) -> bool:  # fmt: skip
    """The same for a device of few units, which have few subsets: of all units, a few others."""
    over = np.bincount(device, need, len(room)) - room
    open_to = allowed[:, [*others, a]]
    mine = np.flatnonzero((device == a) & (open_to.sum(1) > 1))
    target = float(need[mine].sum() - over[a])
    pool = np.flatnonzero((np.isin(device, others) | np.isin(np.arange(len(need)), mine))
                          & allowed[:, a] & (need > 0) & (need <= target))  # fmt: skip
    if target < 0 or not len(pool):
        return bool(over[a] <= 0 and -over[a] <= spare)
    # The largest, as long as it takes several: what is left for the last devices is then small, and
    # there are more ways to fill these.
    large = pool[need[pool] <= target / _SEVERAL]
    pool = large if len(large) > 4 * _SEVERAL else pool
    pool = pool[np.argsort(-need[pool], kind="stable")]
    most = max(1, math.ceil(target / need[pool[: 8 * _SEVERAL]].mean() / 2))
    length = max(most, len(pool) // 2)
    while length > most and math.comb(length, most) > _SUMS:
        length -= 1 + length // 50
    for k in range(_HALVES):
        if time.perf_counter() > deadline:
            return False
        halves = np.split(rng.permutation(pool[: (2 + k) * length])[: 2 * length], [length])
        (one, first), (two, second) = (_small_subsets(need[half], most) for half in halves)
        order = np.argsort(two, kind="stable")
        at = np.searchsorted(two[order], target - one, "right") - 1
        waste = np.where(at >= 0, target - one - two[order[at]], np.inf)
        k = int(waste.argmin())
        if waste[k] > spare:
            continue
        chosen = [h[row[row >= 0]] for h, row in zip(halves, (first[k], second[order[at[k]]]),
                                                     strict=True)]  # fmt: skip
        stay = np.concatenate(chosen)
        for u in np.setdiff1d(mine, stay).tolist():
            b = int(others[np.where(allowed[u, others], over[others], np.inf).argmin()])
            device[u] = b
            over[b] += need[u]
        device[stay] = a
        return True
    return False


def _small_subsets(sizes: Floats, most: int) -> tuple[Floats, Ints]:
    """Sums of all subsets of at most ``most``, and their members by row, -1 behind the last."""
    sums, rows = [np.zeros(1)], [np.full((1, most), -1, np.int64)]
    for k in range(most):
        last = rows[-1][:, k - 1] if k else rows[-1][:, 0]
        more = len(sizes) - 1 - last
        at = np.repeat(np.arange(len(last)), more)
        step = np.arange(len(at)) - np.repeat(np.cumsum(more) - more, more)
        member = last[at] + 1 + step
        row = rows[-1][at]
        row[:, k] = member
        sums.append(sums[-1][at] + sizes[member])
        rows.append(row)
    return np.concatenate(sums), np.concatenate(rows)


def _level(
    need: Floats, allowed: Bools, device: Ints, over: Floats, a: int, others: Ints
) -> None:  # fmt: skip
    """Takes units to ``a`` from devices that have too much, or away, until no unit is left that
    brings it nearer to what it has room for.
    """
    for _ in range(len(need)):
        lack = -float(over[a])
        if lack > 0:
            giver = int(others[over[others].argmax()])
            units = np.flatnonzero((device == giver) & allowed[:, a] & (need > 0))
            taker = a
        else:
            giver, taker = a, int(others[over[others].argmin()])
            units = np.flatnonzero((device == a) & allowed[:, taker] & (need > 0))
        units = units[need[units] < 2 * abs(lack)]
        if not len(units):
            return
        u = units[np.abs(need[units] - abs(lack)).argmin()]
        device[u] = taker
        over[giver] -= need[u]
        over[taker] += need[u]


def _first_fit(need: Floats, room: Floats, allowed: Bools, near: Ints) -> Ints:
    """Units on their device of ``near``, the largest first, or where most room is left."""
    device, left = near.copy(), room.copy()
    homeless = []
    for u in np.argsort(-need, kind="stable").tolist():
        if allowed[u, near[u]] and need[u] <= left[near[u]]:
            left[near[u]] -= need[u]
        else:
            homeless.append(u)
    for u in homeless:
        device[u] = int(np.where(allowed[u], left, -np.inf).argmax())
        left[device[u]] -= need[u]
    return device


def _some(units: Ints, size: int, rng: np.random.Generator) -> Ints:
    """At most ``size`` of some units."""
    return units if len(units) <= size else rng.choice(units, size, replace=False)


def _nearest_subsets(
    mine: Floats, theirs: Floats, over: float, spare: float
) -> tuple[Bools, Bools] | None:
    """Masks of two subsets whose sums differ by ``over`` and as little more as can be; None where
    that is more than ``spare``.
    """
    give, take = _subset_sums(mine), _subset_sums(theirs)
    order = np.argsort(take, kind="stable")
    at = np.searchsorted(take[order], give - over, "right") - 1
    waste = np.where(at >= 0, give - over - take[order[at]], np.inf)
    k = int(waste.argmin())
    if waste[k] > spare:
        return None
    masks = k, int(order[at[k]])
    sizes = len(mine), len(theirs)
    a, b = ((x >> np.arange(n)) & 1 == 1 for x, n in zip(masks, sizes, strict=True))
    return a, b


def _subset_sums(sizes: Floats) -> Floats:
    """Sums of all subsets, ``[2**len(sizes)]``: bit k of the position says whether k is in."""
    sums = np.zeros(1)
    for size in sizes.tolist():
        sums = np.concatenate([sums, sums + size])
    return sums
