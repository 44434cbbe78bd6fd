"""Whether a problem can fit at all: certificates that it cannot, and packings of what must stay."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .errors import InfeasibleError
from .problem import Floats, Ints, Problem


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
    peak = always.copy()
    if not p.static:  # while an op runs, its output and temporaries are there beside parameters
        np.maximum.at(peak, p.unit, always[p.unit] + p.out + p.temp)
    for u in np.flatnonzero(~(p.allowed & (peak[:, None] <= p.cap)).any(1)):
        ops = p.unit_op[p.unit_ptr[u] : p.unit_ptr[u + 1]]
        first = problem.ops[ops[0]]
        what = f"op {first.name!r}" if first.group is None else f"group {first.group!r}"
        short = {
            problem.devices[d].name: float(peak[u] - p.cap[d]) for d in np.flatnonzero(p.allowed[u])
        }
        text = ", ".join(f"{name!r} is {x:.0f} bytes short" for name, x in list(short.items())[:8])
        raise InfeasibleError(
            f"{what} needs {peak[u]:.0f} bytes and fits nowhere: {text}", short, True
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
    ran out. Raises InfeasibleError where, with no slack, there is provably no packing.
    """
    p = problem.arrays
    always = standing(problem)
    m = len(p.cap)
    big = np.flatnonzero(always > 0)
    device = np.argmax(p.allowed, axis=1).astype(np.int64) if near is None else near.copy()
    if not len(big):
        return device
    kinds, kind, count = np.unique(
        np.column_stack([always[big], p.allowed[big]]), axis=0, return_inverse=True,
        return_counts=True,
    )  # fmt: skip
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
    return device
