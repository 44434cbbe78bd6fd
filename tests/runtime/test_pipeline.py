"""Programs of ranks: data that survives text, schedules that never wait in a circle."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from plait.runtime.pipeline import Inline, LinkError, Player, RankProgram, SegmentStep, Wire


class Mail:
    """Tensors between threads; a pair's messages come in the order in which they were sent."""

    def __init__(self, ranks: int) -> None:
        self.boxes = {(a, b): queue.Queue() for a in range(ranks) for b in range(ranks)}

    def of(self, rank: int) -> Post:
        return Post(self, rank)


class Post:
    def __init__(self, mail: Mail, rank: int) -> None:
        self.mail, self.rank = mail, rank

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        assert tensor.is_contiguous()
        box = self.mail.boxes[self.rank, rank]
        done = threading.Event()
        box.put((tag, tensor, done))
        return Later(lambda: done.wait(60.0))  # like gloo: until the other side has it

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        box = self.mail.boxes[rank, self.rank]

        def wait() -> bool:
            got, content, done = box.get(timeout=60.0)
            assert got == tag, "sent and asked for in different orders"
            tensor.copy_(content)
            done.set()
            return True

        thread_result: list[bool] = []
        before = getattr(self, "last", None)

        def run() -> None:
            if before is not None:
                before.join()
            thread_result.append(wait())

        self.last = thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def join() -> bool:
            thread.join(60.0)
            return bool(thread_result)

        return Later(join)


class Later:
    def __init__(self, call: Any) -> None:
        self.call = call

    def wait(self) -> None:
        if not self.call():
            raise RuntimeError("timed out")


def wire(name: str, source: int, target: int, stage: int, number: int) -> Wire:
    return Wire(name, source, target, stage, number, "float32", (2,))


def zigzag(numbers: Sequence[int] = (0, 1, 2, 3)) -> list[RankProgram]:
    """x -> a on 0 -> b on 1 -> c on 0, which reads a too; a skips a stage on its way to d on 1."""
    ab, ad = wire("a", 0, 1, 0, numbers[0]), wire("a2", 0, 1, 0, numbers[1])
    bc, cd = wire("b", 1, 0, 1, numbers[2]), wire("c", 0, 1, 2, numbers[3])
    first = RankProgram(
        0, 2, 4, 4,
        (
            SegmentStep("A", 0, ("x",), ("a", "a2"), (), (ab, ad), ("x", "a2")),
            SegmentStep("C", 2, ("b", "a"), ("c",), (bc,), (cd,), ("b", "a", "c")),
        ),
        ("x",), (),
    )  # fmt: skip
    second = RankProgram(
        1, 2, 4, 4,
        (
            SegmentStep("B", 1, ("a",), ("b",), (ab,), (bc,), ("a", "b")),
            SegmentStep("D", 3, ("c", "a2"), ("d",), (ad, cd), (), ("c", "a2", "d")),
        ),
        (), ("d",),
    )  # fmt: skip
    return [first, second]


def both(ts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.stack([ts[0] * 2, ts[0] * 5], 1).unbind(1))  # with elements between theirs


SEGMENTS = {
    "A": both,
    "B": lambda ts: [ts[0] + 1],
    "C": lambda ts: [ts[0] * ts[1]],
    "D": lambda ts: [ts[0] - ts[1]],
}


def expected(x: torch.Tensor) -> torch.Tensor:
    return (2 * x + 1) * 2 * x - 5 * x


def test_programs_survive_text() -> None:
    for program in zigzag():
        assert RankProgram.from_json(program.to_json()) == program
    with pytest.raises(ValueError, match="compile again"):
        RankProgram.from_json(zigzag()[0].to_json().replace('"version": 1', '"version": 0'))


def test_inline_plays_all_ranks() -> None:
    cpu = torch.device("cpu")
    x = torch.randn(2)
    made: list[weakref.ref[torch.Tensor]] = []

    def noted(ts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results = SEGMENTS["B"](ts)
        made.extend(map(weakref.ref, results))
        return results

    def last(ts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert [ref() for ref in made] == [None]  # nobody reads it any more
        return SEGMENTS["D"](ts)

    found = Inline(zigzag(), {**SEGMENTS, "B": noted, "D": last}, [cpu, cpu]).run({"x": x})
    torch.testing.assert_close(found["d"], expected(x))


@pytest.mark.parametrize(
    ("batches", "numbers"),
    [(1, (0, 1, 2, 3)), (2, (0, 1, 2, 3)), (7, (0, 1, 2, 3)), (7, (1, 2, 3, 0))],
)
def test_ranks_pass_batches_on_in_order_and_end(batches: int, numbers: Sequence[int]) -> None:
    mail, found = Mail(2), []
    xs = [torch.randn(2) for _ in range(batches)]

    def play(rank: int) -> None:
        player = Player(zigzag(numbers)[rank], SEGMENTS, mail.of(rank))
        done = [r for x in xs for r in player.feed({"x": x})]
        assert len(done) == max(0, batches - 3)  # a batch is done in the fourth period
        while player.busy:
            done += (period := player.drain())
            assert len(period) <= 1  # no results wait for others
        assert [n for n, _ in done] == list(range(batches))
        assert not player._sent and not player._batches
        if rank == 1:
            found.extend(r["d"] for _, r in done)

    threads = [threading.Thread(target=play, args=(r,), daemon=True) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120.0)
    assert len(found) == batches
    for x, d in zip(xs, found, strict=True):
        torch.testing.assert_close(d, expected(x))


def test_several_batches_are_in_flight() -> None:
    """A rank takes its next batch before the one before is done."""
    seen: list[tuple[str, float]] = []

    def noted(name: str) -> Any:
        def run(ts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            seen.append((name, float(ts[0][0])))
            return SEGMENTS[name](ts)

        return run

    class Nothing:
        def send(self, *given: Any) -> Any:
            return Later(lambda: True)

        receive = send

    player = Player(zigzag()[0], {n: noted(n) for n in SEGMENTS}, Nothing())
    for k in range(3):
        player.feed({"x": torch.full((2,), float(k))})
    assert [name for name, _ in seen] == ["A", "A", "A", "C"]


def test_a_turn_is_kept_until_all_is_sent_and_not_while_waiting() -> None:
    did: list[str] = []

    class Noted:
        def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
            did.append("send")
            return Later(lambda: did.append("sent") is None)

        def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
            did.append("ask")
            return Later(lambda: did.append("wait") is None)

        def __enter__(self) -> None:
            did.append("turn")

        def __exit__(self, *_: object) -> None:
            did.append("over")

    def empty(shape: Sequence[int], strides: None, dtype: torch.dtype) -> torch.Tensor:
        did.append("room")
        return torch.zeros(shape, dtype=dtype)

    noted = Noted()
    player = Player(zigzag()[0], SEGMENTS, noted, turns=noted, empty=empty)
    player.feed({"x": torch.ones(2)})
    while player.busy:
        did.append("next")
        player.drain()
    # Sends are waited for one period later, when their readers have asked.
    assert did == [
        *("turn", "send", "send", "over"), *("next", "room", "ask", "sent", "sent"),
        *("next", "wait", "turn", "send", "over"), *("next", "sent"),
    ]  # fmt: skip


def test_nothing_is_sent_of_empty_tensors() -> None:
    class Broken:
        def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
            raise RuntimeError("asked")

        receive = send

    empty = Wire("a", 0, 1, 0, 0, "float32", (0, 2))
    reads = SegmentStep("B", 1, ("a",), ("b",), (empty,))
    program = RankProgram(1, 2, 2, 1, (reads,), (), ("b",))
    player = Player(program, {"B": lambda ts: [ts[0].sum(0)]}, Broken())
    assert player.feed({}) == []
    ((_, results),) = player.drain()
    assert results["b"].tolist() == [0.0, 0.0]


def test_a_broken_link_names_the_other_rank() -> None:
    class Broken:
        def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
            raise RuntimeError("Connection closed by peer")

        def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
            return Later(lambda: False)

    x = torch.zeros(2)
    with pytest.raises(LinkError, match="closed") as sending:
        Player(zigzag()[0], SEGMENTS, Broken()).feed({"x": x})
    assert sending.value.rank == 1
    player = Player(zigzag()[1], SEGMENTS, Broken())
    with pytest.raises(LinkError, match="timed out") as waiting:
        player.feed({})
        player.drain()
    assert waiting.value.rank == 0
