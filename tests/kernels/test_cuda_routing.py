"""Routing and products of routed rows in CUDA C, run on the CPU by a fiber for each thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.kernels import cuda, routing, routing_rows
from plait.kernels.definition import Definition
from plait.kernels.group import Unsupported
from plait.kernels.horizontal import Part, fuse
from plait.kernels.occupancy import SM90, resident_blocks
from plait.kernels.regions import Place
from plait.kernels.routes import by_branch

from .cuda_emulator import Emulator, buffers
from .search_check import Problem, problem

aten = torch.ops.aten
TARGET = cuda.sm90()


class Built:
    """Problems compiled together, in both variants: those that read vectors, and the plain ones."""

    def __init__(self, problems: dict[str, Problem], scratch: Path) -> None:
        self.problems = problems
        self.definitions: dict[str, Definition] = {}
        self.devices = {}
        for name, made in problems.items():
            self.definitions[name] = cuda.lower(made.group, made.io, TARGET)
            for plain in (False, True):
                key = f"{name}_plain" if plain else name
                self.devices[key] = cuda.device_kernel(
                    key, self.definitions[name], TARGET, plain=plain
                )
        source = cuda.generate([d.functions for d in self.devices.values()], TARGET)
        kernels = [d.kernel for d in self.devices.values()]
        self.emulator = Emulator(source, kernels, scratch)

    def run(self, name: str, backwards: bool = False, plain: bool = False) -> list[torch.Tensor]:
        made = self.problems[name]
        for tensor in made.outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
        device = self.devices[f"{name}_plain" if plain else name]
        self.emulator.run(device.kernel, buffers(made, self.definitions[name]), backwards)
        return made.outputs


# -- which rows go where ---------------------------------------------------------------------------


def _parts(kind: str, function: Callable[..., Any], *tensors: torch.Tensor) -> Problem:
    return problem(kind, function, tensors)


def _route(slots: tuple[int, ...], branches: int) -> Problem:
    index = torch.randint(-1, branches + 2, slots)
    return _parts("route", lambda i: routing.route(i, branches), index)


ROUTES = {
    "one_slot": ((1, 1), 4),
    "tokens": ((16, 2), 8),
    "more_branches_than_threads": ((40, 3), 700),
    "two_tiles": ((150, 3), 6),
    "many_blocks": ((1000, 2), 260),
}


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Built:
    torch.manual_seed(0)
    problems = {name: _route(*made) for name, made in ROUTES.items()}
    problems["only_order"] = _parts(
        "route", lambda i: routing.route(i, 5)[1], torch.randint(0, 5, (300,))
    )
    problems["only_offsets"] = _parts(
        "route", lambda i: routing.route(i, 5)[0], torch.randint(0, 5, (300,))
    )
    problems["places"] = _parts("route", routing_rows.places, torch.randperm(300))
    return Built(problems, tmp_path_factory.mktemp("routes"))


@pytest.mark.parametrize("name", ROUTES)
def test_slots_are_sorted_by_branch(routes: Built, name: str) -> None:
    shape, branches = ROUTES[name]
    (index,) = routes.problems[name].inputs
    drawn = torch.randint(-1, branches + 2, shape)
    for given in (drawn, drawn * 0, drawn * 0 + branches - 1, drawn * 0 - 5, drawn % 2):
        index.copy_(given)
        for backwards in (False, True):
            offsets, order = routes.run(name, backwards)
            want_offsets, want_order = by_branch(given, branches)
            assert torch.equal(offsets, want_offsets) and torch.equal(order, want_order)


def test_parts_of_routes_and_places(routes: Built) -> None:
    for name in ("only_order", "only_offsets", "places"):
        (have,) = routes.run(name)
        assert torch.equal(have, routes.problems[name].expected[0]), name


def test_many_slots_take_a_launch_to_count_and_one_to_place(routes: Built) -> None:
    launches = {name: d.kernel.launches for name, d in routes.devices.items()}
    assert len(launches["tokens"]) == 1 and launches["tokens"][0].grid == (1, 1, 1)
    assert [k.grid[0] for k in launches["many_blocks"]] == [8, 8]


# -- the first of a row ----------------------------------------------------------------------------


def _topk(x: torch.Tensor, k: int, largest: bool = True, dim: int = -1) -> Problem:
    return _parts("topk", lambda x: aten.topk.default(x, k, dim, largest), x)


@pytest.fixture(scope="module")
def tops(tmp_path_factory: pytest.TempPathFactory) -> Built:
    torch.manual_seed(0)
    few = torch.randint(-3, 4, (9, 20))
    problems = {
        "router": _topk(torch.randn(16, 8), 2),
        "wide": _topk(torch.randn(3, 700), 16),
        "least": _topk(torch.randn(5, 33), 6, False),
        "of_columns": _topk(torch.randn(6, 5, 7), 3, dim=1),
        "of_integers": _topk(torch.randperm(60).view(3, 20), 4),
        "of_doubles": _topk(torch.randn(4, 9).double(), 4),
        "sort": _parts("topk", lambda x: aten.sort.stable(x, stable=True, dim=1), few.float()),
        "argsort": _parts("topk", lambda x: aten.argsort.stable(x, stable=True, dim=1), few.int()),
    }
    return Built(problems, tmp_path_factory.mktemp("tops"))


def test_first_elements_are_found_in_order(tops: Built) -> None:
    for name, made in tops.problems.items():
        for backwards in (False, True):
            for have, want in zip(tops.run(name, backwards), made.expected, strict=True):
                assert torch.equal(have, want.to(have.dtype)), name


def test_the_first_of_equals_comes_first_and_nan_is_the_largest(tops: Built) -> None:
    inf, nan = float("inf"), float("nan")
    for name, order in (("router", [1, 4]), ("least", [0, 5, 6, 7, 2, 3])):
        (x,) = tops.problems[name].inputs
        x.fill_(inf)
        row = torch.tensor([-inf, -nan, 2.0, inf, nan, -0.0, 0.0, -0.0])  # either sign of NaN
        x[:, :8] = row
        values, places = tops.run(name)
        assert places.tolist() == [order] * x.shape[0]
        torch.testing.assert_close(values, x[:, order], rtol=0, atol=0, equal_nan=True)


# -- products --------------------------------------------------------------------------------------


def _bound(tokens: int, k: int, rows: int, branches: int) -> list[torch.Tensor]:
    index = torch.randint(0, branches, (rows,))
    return [torch.randn(tokens, k), *by_branch(index, branches)]


def _experts(
    rows: int, k: int, n: int, branches: int, *, transposed: bool = False, bias: bool = False,
    share: int = 0, scatter: bool = False, gate: str = "", residual: bool = False,
) -> Problem:  # fmt: skip
    """A routed product of ``n`` columns, with what may follow it."""
    torch.manual_seed(0)
    tensors = _bound(rows // share if share else rows, k, rows, branches)
    tensors.append(torch.randn(branches, *((k, n) if transposed else (n, k))) * k**-0.5)
    tensors += [torch.randn(branches, n)] * bias
    tensors += [torch.randn(rows, n // 2 if gate else n)] * residual

    def function(x, offsets, order, weight, *rest):
        own = rest[0] if bias else None
        y = routing.routed_linear(x, offsets, order, weight, own, transposed, share, scatter)
        if gate:
            cuts = ((0, n // 2, 1), (n // 2, n, 1)) if gate == "halves" else ((0, n, 2), (1, n, 2))
            first, second = (aten.slice.Tensor(y, 1, *cut) for cut in cuts)
            y = aten.mul.Tensor(aten.silu.default(first), second)
        return aten.add.Tensor(y, rest[-1]) if residual else y

    return problem("experts", function, tensors)


EXPERTS: dict[str, Callable[[], Problem]] = {
    "few": lambda: _experts(6, 72, 20, 4, share=2),
    "few_one_row": lambda: _experts(1, 64, 8, 4, bias=True, share=1, scatter=True),
    "few_gate": lambda: _experts(8, 128, 36, 4, share=2, gate="halves"),
    "few_alternating": lambda: _experts(12, 40, 24, 2, bias=True, gate="alternate"),
    "few_odd": lambda: _experts(10, 33, 19, 3, bias=True, scatter=True, residual=True),
    "few_transposed": lambda: _experts(9, 21, 140, 3, transposed=True, bias=True, scatter=True),
    "few_transposed_gate": lambda: _experts(4, 16, 24, 2, transposed=True, gate="halves"),
    "few_transposed_alternating": lambda: _experts(
        20, 16, 30, 3, transposed=True, bias=True, gate="alternate", scatter=True
    ),
    "many": lambda: _experts(60, 32, 68, 2, share=2),
    "many_odd": lambda: _experts(40, 19, 67, 4, bias=True, scatter=True, residual=True),
    "many_gate": lambda: _experts(100, 40, 40, 2, share=4, gate="halves", bias=True),
    "many_transposed": lambda: _experts(80, 20, 72, 2, transposed=True, bias=True, scatter=True),
    "most": lambda: _experts(210, 24, 132, 2, scatter=True),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Built:
    problems = {name: make() for name, make in EXPERTS.items()}
    return Built(problems, tmp_path_factory.mktemp("experts"))


def _routings(rows: int, branches: int) -> list[tuple[torch.Tensor, bool]]:
    """By chance; all to one branch; none to some; none to any. And whether without vectors."""
    drawn = torch.randint(-1, branches + 1, (rows,))
    zeros = torch.zeros(rows, dtype=torch.int64)
    last = zeros + branches - 1
    some = torch.where(drawn < 1, last, last.clamp(max=1))
    flags = (False, True, False, True, False, True)
    return list(zip((drawn, drawn, zeros, last, some, zeros - 1), flags, strict=True))


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_are_multiplied_with_the_weights_of_their_branch(experts: Built, name: str) -> None:
    made = experts.problems[name]
    x, offsets, order, weight, *rest = made.inputs
    rows, branches = order.shape[0], weight.shape[0]
    for number, (index, plain) in enumerate(_routings(rows, branches)):
        for tensor, part in zip((offsets, order), by_branch(index, branches), strict=True):
            tensor.copy_(part)
        doubles = [t.double() for t in (weight, *rest)]
        want = made.function(x.double(), offsets, order, *doubles)
        (have,) = experts.run(name, backwards=number in (1, 2), plain=plain)
        torch.testing.assert_close(have, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")
def test_blocks_leave_room_for_others(experts: Built, routes: Built, tops: Built) -> None:
    chosen = {
        experts: ("few_gate", "few_transposed_gate", "many_gate", "most"),
        routes: ("many_blocks",),
        tops: ("wide",),
    }
    devices = {n: built.devices[n] for built, names in chosen.items() for n in names}
    bundle = cuda.build(devices, TARGET)
    assert bundle.failed == {} and len(bundle.usage) == 7
    for name, used in bundle.usage.items():
        assert used.spilled_bytes == 0 and used.shared_bytes <= SM90.static_bytes, name
        assert resident_blocks(256, used.registers, used.shared_bytes) >= 2, name


def test_the_grid_holds_for_every_routing(experts: Built) -> None:
    """As many tiles as rows where these are few, else a tile for each branch and some more."""
    grids = {n: d.kernel.launches[0].grid for n, d in experts.devices.items()}
    assert grids["few"] == (6, 1, 1)  # by rows, and one panel of 32 columns
    assert grids["many"] == ((60 // 32 + 2 + 1) * 2, 1, 1)  # tiles of 32 rows by 64 columns


def test_they_share_a_launch_with_others(
    experts: Built, routes: Built, tops: Built, tmp_path: Path
) -> None:
    chosen = ((experts, "few_odd"), (routes, "two_tiles"), (tops, "router"), (experts, "many_odd"))
    parts, tensors = [], []
    for built, name in chosen:
        definition, made = built.definitions[name], built.problems[name]
        held = buffers(made, definition)
        places = [Place((name, k)) for k in range(len(held))]
        parts.append(Part.of(built.devices[name], definition, places))
        tensors += held
    device = fuse("together", parts)
    source = cuda.generate([device.functions], TARGET)
    alone = [[t.clone() for t in built.run(name)] for built, name in chosen]
    for built, name in chosen:
        for tensor in built.problems[name].outputs:
            tensor.fill_(-77)
    Emulator(source, [device.kernel], tmp_path).run(device.kernel, tensors, backwards=True)
    for (built, name), want in zip(chosen, alone, strict=True):
        for have, tensor in zip(built.problems[name].outputs, want, strict=True):
            torch.testing.assert_close(have, tensor, rtol=0, atol=0, equal_nan=True)


def test_what_has_no_routing_kernel_is_declined() -> None:
    half = _experts(6, 8, 8, 2)
    for node, arg in half.io.items():
        if arg.dtype == torch.float32:
            half.io[node] = replace(arg, dtype=torch.bfloat16)
    long = _topk(torch.randn(2, 1025), 2)
    many = _route((4,), 5000)
    reasons = ("float32 only", "more than 1024", "more than 4096")
    for made, reason in zip((half, long, many), reasons, strict=True):
        with pytest.raises(Unsupported, match=reason):
            cuda.lower(made.group, made.io, TARGET)


def test_what_has_no_elements_is_declined() -> None:
    for made in (_topk(torch.randn(3, 0), 0), _route((0, 2), 4), _experts(0, 8, 8, 2)):
        with pytest.raises(Unsupported, match="without elements"):
            cuda.lower(made.group, made.io, TARGET)
