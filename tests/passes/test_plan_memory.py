"""plan-memory: buffers that live at the same time never overlap, and the arena is small."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.plan_memory import ALIGNMENT, Lifetime, describe, live_peak, plan_memory
from plait.runtime.sizes import evaluate


@st.composite
def lifetimes(draw):
    result = []
    for k in range(draw(st.integers(0, 25))):
        start = draw(st.integers(0, 20))
        symbolic = draw(st.booleans())
        nbytes = (
            draw(st.sampled_from(["4*s0", "8*s0*s1"])) if symbolic else draw(st.integers(0, 5000))
        )
        result.append(Lifetime(f"b{k}", nbytes, start, start + draw(st.integers(0, 8))))
    return result


@settings(max_examples=200, deadline=None)
@given(lifetimes(), st.integers(0, 300), st.integers(0, 40))
def test_live_buffers_are_disjoint_aligned_and_inside_the_arena(buffers, s0, s1):
    plan = plan_memory(buffers)
    values = {"s0": s0, "s1": s1}
    total = evaluate(plan.total, values)
    placed = []
    for b in buffers:
        offset, size = evaluate(plan.offsets[b.name], values), evaluate(b.nbytes, values)
        assert offset % ALIGNMENT == 0
        assert offset + size <= total
        placed.append((b, offset, size))
    for i, (a, x, n) in enumerate(placed):
        for b, y, m in placed[:i]:
            if a.start <= b.end and b.start <= a.end:
                assert x + n <= y or y + m <= x, (a, b)


@settings(max_examples=100, deadline=None)
@given(lifetimes())
def test_lower_bound_is_below_the_arena(buffers):
    fixed = [b for b in buffers if isinstance(b.nbytes, int)]
    plan = plan_memory(fixed)
    assert plan.lower_bound == live_peak(fixed) <= int(plan.total)


def test_a_chain_needs_two_buffers_only():
    chain = [Lifetime(f"b{k}", 1000, k, k + 1) for k in range(50)]
    assert plan_memory(chain).total == 2 * 1024


def test_equal_symbolic_sizes_share_a_slot():
    chain = [Lifetime(f"b{k}", "4*s0", k, k + 1) for k in range(10)]
    for buffers in (chain, chain[::-1]):
        assert evaluate(plan_memory(buffers).total, {"s0": 16}) == 2 * 64


def test_what_ends_at_a_step_is_alive_there():
    assert live_peak([Lifetime("a", 64, 0, 2), Lifetime("b", 128, 2, 3)]) == 192
    assert live_peak([Lifetime("a", 64, 0, 1), Lifetime("b", 128, 2, 3)]) == 128


def test_duplicate_names_are_refused():
    with pytest.raises(ValueError, match="same name"):
        plan_memory([Lifetime("a", 1, 0, 0), Lifetime("a", 1, 1, 1)])


def test_the_remark_tells_what_was_gained():
    buffers = [
        Lifetime("a", 2 << 20, 0, 1),
        Lifetime("b", 2 << 20, 2, 3),
        Lifetime("c", 1024, 0, 3),
    ]
    remark = describe(buffers, plan_memory(buffers))
    assert remark.id == "PLT-MEM-001" and remark.kind == "done"
    assert remark.reason.startswith("2.00 MiB for 3 buffers of 4.00 MiB; at most 2.00 MiB")
    open_size = [*buffers, Lifetime("d", "n*4", 0, 1)]
    assert "1 of unknown size" in describe(open_size, plan_memory(open_size)).reason
