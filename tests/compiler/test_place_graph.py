"""Models become placement problems: costs, memory, colocation, gradients; nothing is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import plait
from plait.compiler.cli import app
from plait.compiler.placed import graph as place_graph
from plait.passes.placement.devices import KINDS, parse_bytes, parse_devices, parse_link
from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.problem import Link, Problem
from plait.passes.placement.schedule_trace import memory_over_time
from plait.passes.placement.simulator import simulate

MODEL = """
import torch
from torch import nn

def mlp():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return model, (torch.zeros(8, 64),)
"""


class Block(nn.Module):
    """Two products that share a weight, a view between them, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(16, 16, bias=False)
        self.other = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.tied(x)).view(2, 4, 16)
        return self.other(self.tied(y.reshape(8, 16))).sum()


def problem_of(model: nn.Module, *inputs: torch.Tensor, optimizer: str | None = None) -> Problem:
    graph = place_graph.trace(model, inputs, optimizer=optimizer)
    return graph.problem(parse_devices("2xh100:80GB"), Link(1e-6, 1e9))


def test_products_cost_what_the_roofline_says() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(4096, 8192, bias=False), torch.zeros(2048, 4096)
    problem = problem_of(model, x)
    (op,) = [op for op in problem.ops if op.time_s]
    flops, nbytes = 2 * 2048 * 4096 * 8192, 4 * (2048 * 4096 + 4096 * 8192 + 2048 * 8192)
    assert op.time_s == pytest.approx(KINDS["h100"].seconds(flops, nbytes, 4))
    assert op.param_bytes == 4 * 4096 * 8192
    assert op.output_bytes == 4 * 2048 * 8192
    assert op.keep


def test_readers_of_one_weight_stay_together_and_views_are_no_ops() -> None:
    problem = problem_of(Block(), torch.zeros(8, 16))
    names = [op.name for op in problem.ops]
    assert not any("view" in name or "reshape" in name for name in names)
    tied = [op for op in problem.ops if op.name.startswith("linear")][:2]
    assert tied[0].group is not None and tied[0].group == tied[1].group
    assert sum(op.param_bytes for op in problem.ops) == 4 * (16 * 16 + 16 * 4 + 4)


@pytest.mark.parametrize(("optimizer", "each"), [("none", 8), ("sgd", 8), ("adam", 16)])
def test_a_training_step_has_gradients_beside_their_weights(optimizer: str, each: int) -> None:
    forward = problem_of(Block(), torch.zeros(8, 16))
    step = problem_of(Block(), torch.zeros(8, 16), optimizer=optimizer)
    assert len(step.ops) > 1.5 * len(forward.ops)
    count = sum(p.numel() for p in Block().parameters())
    assert sum(op.param_bytes for op in step.ops) == each * count
    groups = {op.group for op in step.ops if op.group}
    assert len(groups) == 2  # the weight that is read twice; weight and bias of the other


def test_weights_on_the_meta_device_are_never_made() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(30_000, 30_000, bias=False) for _ in range(12)])
        x = torch.zeros(4, 30_000)
    placement = plait.place(model, example_inputs=(x,), devices="2xh100:80GB", budget=0.5)
    peaks = placement.report["peak_bytes"]
    assert max(peaks.values()) <= 80e9
    assert sum(peaks.values()) >= 12 * 4 * 30_000**2


def test_what_cannot_be_exported_says_why() -> None:
    class Branchy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(plait.CaptureError, match="PLT-PLC-002: Branchy cannot be exported"):
        place_graph.trace(Branchy(), (torch.zeros(3),))
    with pytest.raises(plait.CaptureError, match="unknown optimizer 'magic'"):
        place_graph.trace(Block(), (torch.zeros(8, 16),), optimizer="magic")


def test_device_maps_name_modules_that_stay_whole() -> None:
    graph = place_graph.Graph("g")
    graph.weights = {"a": ["b.0.w", "b.0.v"], "c": ["b.1.w"], "d": ["b.1.v"], "e": ["head.w"]}
    assign = {"a": "h100:0", "c": "h100:10", "d": "h100:2", "e": "cpu:0"}
    placed = graph.device_map(plait.Placement(assign))
    assert placed == {"b.0": 0, "b.1.w": 2, "b.1.v": 1, "head": "cpu"}


@pytest.mark.parametrize(
    ("text", "names", "memory"),
    [
        ("2xh100:40GB", ["h100:0", "h100:1"], 40e9),
        ("A100", ["a100:0"], 80e9),
        ("cpu:16GiB", ["cpu:0"], 16 * 2**30),
    ],
)
def test_device_specs(text: str, names: list[str], memory: float) -> None:
    found = parse_devices(text)
    assert [x.device.name for x in found] == names
    assert {x.device.memory_bytes for x in found} == {memory}


@pytest.mark.parametrize(
    "text", ["", "0xh100", "h100:", "h100:lots", "z80", "2 x h100", "h100:1iB"]
)
def test_device_specs_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(PlacementError):
        parse_devices(text)


def test_links() -> None:
    assert parse_link("450GB/s,5us") == Link(5e-6, 450e9)
    assert parse_link("1e9B/s") == Link(0.0, 1e9)
    assert parse_bytes("1.5kB", "x") == parse_bytes("1.5KB", "x") == 1500
    assert parse_bytes("2KiB", "x") == parse_bytes("2kiB", "x") == 2048
    for text in ("450GB", "0GB/s", "1GB/s,5", "fast"):
        with pytest.raises(PlacementError, match="link"):
            parse_link(text)


def test_hosts_may_have_links_of_their_own() -> None:
    devices, link, host = parse_devices("2xh100,cpu,cpu"), Link(1e-6, 1e9), Link(2e-6, 1e8)
    graph = place_graph.trace(Block(), (torch.zeros(8, 16),), {}, None)
    assert graph.problem(devices, link).links == {}
    found = graph.problem(devices, link, host).links
    pairs = {(g, c) for g in ("h100:0", "h100:1") for c in ("cpu:0", "cpu:1")}
    assert found == dict.fromkeys(pairs | {(c, g) for g, c in pairs}, host)


def test_devices_by_name() -> None:
    placed = plait.Device("h100:80GB", memory=7.0, speed=0.5).placed(3)
    assert (placed.device.name, placed.device.memory_bytes, placed.device.speed) == (
        "h100:3",
        7,
        0.5,
    )
    with pytest.raises(plait.OptionError, match="more than one device"):
        plait.Device("2xh100")
    with pytest.raises(plait.OptionError, match="has no meaning"):
        plait.Device("h100", speed=0.0)


def test_the_api_takes_problems_and_refuses_models_without_devices(tmp_path: Path) -> None:
    problem = problem_of(Block(), torch.zeros(8, 16))
    assert plait.place(problem, budget=0.2).report["gap"] >= 0
    with pytest.raises(plait.OptionError, match="a model needs devices"):
        plait.place(Block(), example_inputs=(torch.zeros(8, 16),))


@pytest.mark.parametrize(
    "option",
    [{"devices": "2xcpu"}, {"link": "1GB/s,1us"}, {"host_link": "1GB/s,1us"}, {"optimizer": "sgd"}]
    + [{"example_inputs": (torch.zeros(8, 16),)}],
    ids=lambda option: next(iter(option)),
)
def test_a_problem_takes_no_option_of_models(option: dict[str, Any]) -> None:
    problem = problem_of(Block(), torch.zeros(8, 16))
    with pytest.raises(plait.OptionError, match=f"does not take {next(iter(option))}"):
        plait.place(problem, budget=0.2, **option)


def test_memory_over_time_peaks_where_the_simulator_says() -> None:
    problem = problem_of(Block(), torch.zeros(8, 16), optimizer="sgd")
    schedule = simulate(problem, plait.place(problem, budget=0.2))
    for curve, peak in zip(memory_over_time(problem, schedule), schedule.peak, strict=True):
        assert max(size for _, size in curve) == pytest.approx(peak)


def place(folder: Path, *options: str) -> Any:
    (folder / "models.py").write_text(MODEL)
    target = f"{folder / 'models.py'}:mlp"
    return CliRunner().invoke(app.app, ["place", target, "--budget", "0.3", *options])


def test_the_command_places_a_model_and_writes_all_files(tmp_path: Path) -> None:
    names = {"-o": "o.json", "--problem": "p.json", "--device-map": "m.json", "--gantt": "g.png",
             "--trace": "t.json"}  # fmt: skip
    files = [x for k, v in names.items() for x in (k, str(tmp_path / v))]
    links = ["--link", "10GB/s,1us", "--host-link", "1GB/s,9us"]
    result = place(tmp_path, "--devices", "2xa100:24kB,cpu:1kB", *links, *files)
    assert result.exit_code == 0, result.output
    ends = {(x["src"], x["dst"]) for x in json.loads((tmp_path / "p.json").read_text())["links"]}
    assert ends == {(f"a100:{i}", "cpu:0") for i in (0, 1)} | {
        ("cpu:0", f"a100:{i}") for i in (0, 1)
    }
    assign = json.loads((tmp_path / "o.json").read_text())["assign"]
    assert set(assign.values()) == {"a100:0", "a100:1"}
    assert sorted(json.loads((tmp_path / "m.json").read_text())) == ["0", "2"]
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    kinds = {e["ph"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert kinds == {"M", "X", "C"}
    again = CliRunner().invoke(app.app, ["place", str(tmp_path / "p.json"), "--budget", "0.3"])
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a model needs --devices"),
        (["--devices", "2xz80"], "device kind 'z80' is unknown"),
        (["--devices", "h100", "--link", "fast"], "link 'fast' is not understood"),
        (["--devices", "h100", "--host-link", "5us"], "link '5us' is not understood"),
        (["--devices", "h100:1kB"], "fits nowhere"),
        (["--devices", "h100:1e400GB"], "'1e400GB' is more than any device has"),
        (["--devices", "h100,999999999xh100"], "at most 1024 devices"),
        (["--devices", "h100", "--train", "magic"], "unknown optimizer 'magic'"),
        (["--devices", "h100", "--gantt", "x.txt"], "pictures are written as"),
    ],
)
def test_faults_exit_with_2(tmp_path: Path, options: list[str], message: str) -> None:
    out = tmp_path / "o.json"
    result = place(tmp_path, "-o", str(out), *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not out.exists()


def test_what_may_not_run_twice_is_marked() -> None:
    class Noisy(nn.Module):
        """Draws random numbers, and writes to a buffer."""

        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.register_buffer("seen", torch.zeros(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.layer(x) + self.seen)
            self.seen.add_(1.0)
            return torch.nn.functional.dropout(y, 0.5, True).sum()

    problem = problem_of(Noisy(), torch.zeros(8, 16), optimizer="sgd")
    marks = {op.name: op.recompute for op in problem.ops}
    assert not any(v for k, v in marks.items() if k.startswith(("args", "x", "arg")))
    random_ops = [k for k in marks if "dropout" in k or "bernoulli" in k or "rand" in k]
    assert random_ops and not any(marks[k] for k in random_ops)
    assert marks["relu"] and not marks["add"]  # the sum reads what is written later


def test_a_training_step_fits_with_recompute() -> None:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)]
    with torch.device("meta"):
        x = torch.zeros(4096, 64)
    model = nn.Sequential(*layers).to("meta")
    options: dict[str, Any] = {"example_inputs": (x,), "devices": "1xh100:11MB", "link": "1GB/s"}
    with pytest.raises(InfeasibleError):
        plait.place(model, optimizer="sgd", budget=1.0, **options)
    placement = plait.place(model, optimizer="sgd", budget=2.0, recompute=True, **options)
    assert placement.report["recomputed"] and placement.alternatives
    assert all(x.kind == "recompute" for x in placement.alternatives)


@pytest.mark.parametrize("devices", [5, ["cpu", 5], [None]])
def test_what_is_no_device_is_one_error(devices: Any) -> None:
    with pytest.raises(plait.OptionError, match="PLT-PLC-003: .*(no device|devices is a int)"):
        plait.place(nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), devices=devices)
    with pytest.raises(plait.OptionError, match="PLT-PLC-003"):
        plait.compile(nn.Linear(2, 2).eval(), devices=devices)


def test_sizes_that_only_data_tells_are_one_error() -> None:
    router = plait.Router([nn.Linear(4, 4), nn.Tanh()], nn.Linear(4, 2)).eval()
    with pytest.raises(plait.CaptureError, match="PLT-PLC-002: .*known only from data"):
        plait.place(router, example_inputs=(torch.ones(3, 4),), devices="2xcpu")
