"""Models divided among devices: the original's answers, in one process and in several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import plait
from plait.compiler.placed import units as placed_units
from plait.compiler.placed.capture import stand_ins
from plait.compiler.placed.causes import Broken, bottom
from plait.compiler.placed.local import Ranks, most_telling
from plait.compiler.placed.options import devices_here
from plait.compiler.placed.part import failure, segment_from_json, segment_to_json
from plait.compiler.weights.absent import Checkpoint

FAST = {"budget": 0.3, "timeout": 600.0}  # a timeout that a busy machine keeps


class Net(nn.Module):
    """A residual block with a table, a shared weight, a second result and one that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16))

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.table(index) * self.scale + x
        for _ in range(2):
            h = h + self.second(torch.relu(self.first(h)))
        return {"h": h, "best": h.argmax(-1), "logits": h @ self.table.weight.T, "x": x}


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (4,), generator=generator), torch.randn(4, 16, generator=generator)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def options(**given: Any) -> plait.PlacementOptions:
    return plait.PlacementOptions(**{**FAST, **given})


SMALL = "2xcpu:6kB"  # of 5 kB of weights: the two products of the block cannot lie together


def check(placed: plait.Placed, model: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(placed(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_model_divided_in_one_process_gives_the_same(net: nn.Module) -> None:
    placed = plait.compile(net, devices=SMALL, placement=options(), example_inputs=example())
    assert set(placed.placement.assign.values()) == {"cpu:0", "cpu:1"}
    for seed in range(3):
        check(placed, net, *example(seed))
    given = [example(seed) for seed in range(4)]
    for inputs, result in zip(given, placed.map(given), strict=True):
        torch.testing.assert_close(result["h"], net(*inputs)["h"], rtol=1e-4, atol=1e-5)
    assert "PLT-DST-012" in placed.explain()
    peaks = placed.placement.report["peak_bytes"]
    assert max(peaks.values()) <= 6000


def test_every_assignment_gives_the_same(net: nn.Module) -> None:
    """Placements at random: also those that no planner would choose."""
    from plait.compiler.options import Options
    from plait.compiler.placed import plan
    from plait.compiler.placed import segments as placed_segments
    from plait.compiler.placed.part import SegmentRun
    from plait.runtime.pipeline import Inline

    found = plan.plan_model(net, example(), {}, devices_here("cpu"), options(), Options())
    module = found.whole.captured.graph_module
    units = placed_units.Units(placed_segments.own_results(module))
    cpu = torch.device("cpu")
    flat: Any = next(iter(units.module.graph.find_nodes(op="output"))).args[0]
    generator = torch.Generator().manual_seed(0)
    names = [n.name for n in units.module.graph.find_nodes(op="placeholder")]
    wanted = net(*example())
    for _ in range(6):
        draw = torch.randint(0, 3, (len(units.units),), generator=generator).tolist()
        ranks = {u.name: r for u, r in zip(units.units, draw, strict=True)}
        segments = placed_segments.divide(units, ranks)
        programs = placed_segments.programs(segments, 3, flat)
        runs = {
            s.name: SegmentRun(
                placed_segments.extract(units.module, s), found.whole.names, found.whole.source,
                Options(tune="off"), cpu,
            )
            for s in segments
        }  # fmt: skip
        inputs = dict(zip(names, example(), strict=True))
        results = {**inputs, **Inline(programs, runs, [cpu] * 3).run(inputs)}
        torch.testing.assert_close(results[flat[0].name], wanted["h"], rtol=1e-4, atol=1e-5)
        for program in programs:
            assert all(w.stage < s.stage for s in program.steps for w in s.receives)


def test_segments_survive_text(net: nn.Module) -> None:
    from plait.compiler.options import Options
    from plait.compiler.placed import plan

    found = plan.plan_model(net, example(), {}, devices_here(SMALL), options(), Options())
    for captured in found.graphs.values():
        again, names = segment_from_json(segment_to_json(captured, found.whole.names))
        assert str(again.graph_module.graph) == str(captured.graph_module.graph)
        assert set(names.values()) <= {n for n, _ in net.named_parameters()}
        held = [t for t in again.constants().values() if not t.is_meta]
        assert all(t.numel() <= 16 for t in held)  # the buffer travels, no weight does


@pytest.fixture(scope="module")
def ranks(net: nn.Module) -> Iterator[plait.Placed]:
    with plait.compile(net, devices=SMALL, placement=options(launch="processes")) as placed:
        yield placed.prepare(example(), {})


def test_processes_give_the_same_and_hold_their_part_only(
    net: nn.Module, ranks: plait.Placed
) -> None:
    for seed in range(3):
        check(ranks, net, *example(seed))
    given = [example(seed) for seed in range(9)]
    for inputs, result in zip(given, ranks.map(given), strict=True):
        torch.testing.assert_close(result["logits"], net(*inputs)["logits"], rtol=1e-4, atol=1e-5)
    stream = ranks.map(given)
    next(stream)
    for other in (lambda: ranks(*example()), ranks.memory):
        with pytest.raises(plait.DistributedError, match="PLT-DST-011: not all results of map"):
            other()
    stream.close()  # what is in flight must not become the next call's answer
    check(ranks, net, *example(5))
    begun = ranks.map(given)
    next(begun)
    other = threading.Thread(target=begun.close)  # as garbage collection in another thread does
    other.start()
    other.join()
    check(ranks, net, *example(6))
    circle = [ranks.map(given)]
    next(circle[0])
    circle.append(circle)
    del circle  # nobody can close it any more
    check(ranks, net, *example(7))
    memory = ranks.memory()
    assert len(memory) == 2 and all(m.base > 0 and m.peak >= m.loaded for m in memory)


def test_wrong_arguments_are_refused_and_leave_ranks_alive(
    net: nn.Module, ranks: plait.Placed
) -> None:
    index, x = example()
    for wrong, text in (
        ((index, x.double()), "PLT-INP-002.*float64"),
        ((index[:3], x[:3]), "PLT-INP-002.*dimension 0"),
        ((index, x, 3), "positional"),
        ((index + 20, x), "PLT-INP-006.*'index'"),
        (((index,), x), "PLT-INP-001"),
    ):
        with pytest.raises((plait.InputError, TypeError), match=text):
            ranks(*wrong)
    with pytest.raises(plait.InputError, match="gradients"):
        ranks(index, x.clone().requires_grad_())
    check(ranks, net, *example(1))


def called(net: nn.Module) -> plait.Placed:
    placed = plait.compile(net, devices=SMALL, placement=options(launch="processes"))
    placed(*example())
    return placed


def test_a_first_call_that_fails_is_not_the_last(net: nn.Module) -> None:
    """What export's fake tensors let pass fails where it runs."""
    index, x = example()
    with plait.compile(net, devices="2xcpu", placement=options(launch="processes")) as placed:
        with pytest.raises(plait.DistributedError, match="PLT-DST-010: rank . failed: .*dtype"):
            placed(index, x.double())
        torch.testing.assert_close(placed(index, x), net(index, x))
        with pytest.raises(plait.InputError):
            placed(index, x.double())


def test_a_killed_rank_is_one_clear_error_and_ends_the_others(net: nn.Module) -> None:
    placed = called(net)
    processes = placed._engine.ranks.processes  # type: ignore[union-attr]
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(plait.DistributedError, match="PLT-DST-004: rank 1 ended by signal 9"):
        placed(*example())
    assert time.monotonic() - began < 300  # it is no timeout that tells
    assert all(p.poll() is not None for p in processes)
    with pytest.raises(plait.DistributedError, match="PLT-DST-011.*rank 1"):
        placed(*example())


def test_a_rank_that_hangs_is_noticed(net: nn.Module) -> None:
    placed = called(net)
    ranks = placed._engine.ranks  # type: ignore[union-attr]
    processes, ranks.timeout = ranks.processes, 1.0
    processes[0].send_signal(signal.SIGSTOP)
    with pytest.raises(plait.DistributedError, match="PLT-DST-005"):
        placed(*example())
    assert all(p.poll() is not None for p in processes)


def test_a_rank_that_is_stopped_while_it_starts_is_noticed() -> None:
    ranks = Ranks(1, 0.3, 1)
    ranks.processes[0].send_signal(signal.SIGSTOP)
    with pytest.raises(plait.DistributedError, match="PLT-DST-005.*rank 0, which was stopped"):
        ranks.gather("joined", 600.0)
    assert ranks.processes[0].poll() is not None


def test_the_failure_that_says_most_is_told() -> None:
    broken, gone = ("link-error", 0, "Connection closed by peer"), ("ended",)
    for causes, codes, text in (
        ([(1, gone), (0, gone), (1, broken)], [-9, 0], "rank 0 ended by signal 9"),
        ([(1, gone), (1, broken)], [None, 0], "rank 1 lost rank 0"),
        ([(0, gone), (1, ("error", "PLT-DST-010", "the cause", ""))], [-9, 0], "the cause"),
        ([(0, gone)], [None], "rank 0 ended"),
    ):
        assert text in str(most_telling(causes, codes))


def test_a_rank_ends_with_its_parent(net: nn.Module) -> None:
    placed = called(net)
    ranks = placed._engine.ranks  # type: ignore[union-attr]
    placed.close()
    assert ranks.processes[0].poll() is not None
    with pytest.raises(plait.DistributedError, match="close"):
        ranks._fail(0, ("ended",))  # as a call under way in another thread does
    with pytest.raises(plait.DistributedError, match="close"):
        placed(*example())


def test_memory_short_at_load_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the process's: the plan believes that there is more."""
    from plait.compiler.placed import options as placed_options

    here = placed_options._here
    tight = lambda *given: placed_options.Here(*vars(here(*given)).values())  # noqa: E731
    monkeypatch.setattr(
        placed_options, "_here",
        lambda *given: placed_options.Here(tight(*given).placed, tight(*given).torch, 1e6),
    )  # fmt: skip
    with torch.device("cpu"):
        model = nn.Sequential(*[nn.Linear(3000, 3000, bias=False) for _ in range(4)]).eval()
    placed = plait.compile(model, devices="2xcpu:90MB", placement=options(launch="processes"))
    with pytest.raises(
        plait.DistributedError, match="PLT-DST-006: rank . is out of memory loading '.*weight'"
    ):
        placed(torch.zeros(1, 3000))


SCRIPT = """
import os, sys, torch, plait
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]).eval()
x = torch.randn(8, 64)
options = plait.PlacementOptions(budget=0.3, timeout=float(sys.argv[2]))
try:
    placed = plait.compile(model, devices=sys.argv[1], placement=options)
    assert torch.allclose(placed(x), model(x), atol=1e-5)
    assert all(torch.allclose(y, model(x), atol=1e-5) for y in placed.map([x] * 5))
    stream = placed.map([x] * 5)
    next(stream)
    stream.close()  # what is in flight must not become the next call's answer
    assert torch.allclose(placed(x + 1), model(x + 1), atol=1e-5)
    if sys.argv[3] == "die" and os.environ["RANK"] == "1":
        os._exit(7)
    if sys.argv[3] == "die":
        placed(x)
    def fails(_):
        raise ValueError("trouble")
    if os.environ["RANK"] == "1":
        placed._engine.player.segments = dict.fromkeys(placed._engine.player.segments, fails)
    try:
        placed(x)
    except plait.DistributedError as error:  # of one rank, but all are told, and not by a timeout
        assert "PLT-DST-010: rank 1 failed: ValueError: trouble" in str(error), error
    placed.close()
    other = model if os.environ["RANK"] == "0" else model[:1]
    try:
        plait.compile(other, devices=sys.argv[1], placement=options)(x)
    except plait.FileError as error:  # of one rank, but all are told
        assert "PLT-DST-007" in str(error), error
        print("done", flush=True)
except (plait.PlaitError, plait.PlacementError) as error:
    print(f"rank {os.environ['RANK']}: {error}", flush=True)
    sys.exit(3)
"""


def spmd(folder: Path, devices: str, *extra: str) -> list[tuple[int, str]]:
    """Exit codes and output of two ranks, started as torchrun would."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = Path(plait.__file__).resolve().parents[1]
    started = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test",
            "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "PLAIT_STORE": str(folder),
        }  # fmt: skip
        command = [sys.executable, "-c", JOIN, str(folder / "store"), str(script), devices, *extra]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [p.communicate(timeout=900)[0] for p in started]
    return [(p.returncode, out) for p, out in zip(started, outputs, strict=True)]


JOIN = """
import os, sys, runpy, torch.distributed as dist
from datetime import timedelta
from plait.runtime.distributed import join
store, sys.argv = sys.argv[1], sys.argv[2:]
join(int(os.environ["RANK"]), 2, store, 300.0, float(sys.argv[2]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # a store in a file, where torchrun's would need a free port


def test_ranks_of_torchrun_give_the_same(tmp_path: Path) -> None:
    for code, output in spmd(tmp_path, "2xcpu:40kB", "600", "run"):
        assert (code, "done" in output) == (0, True), output


def test_a_lost_rank_of_torchrun_is_an_error_of_the_others(tmp_path: Path) -> None:
    (code, output), (lost, _) = spmd(tmp_path, "2xcpu:40kB", "600", "die")
    assert lost == 7 and code == 3 and "rank 0: PLT-DST-004: rank 0 lost" in output, output


def test_ranks_of_torchrun_agree_on_what_is_wrong(tmp_path: Path) -> None:
    for devices, text in (("3xcpu", "PLT-DST-003: there are 2 processes for 3 devices"),
                          ("2xcpu:20kB", "bytes short")):  # fmt: skip
        folder = tmp_path / devices.replace(":", "")
        folder.mkdir()
        for code, output in spmd(folder, devices, "600", "run"):
            assert code == 3 and text in output, output


def test_the_rank_at_the_bottom_of_broken_links_is_named() -> None:
    own = plait.DistributedError("PLT-DST-010", "rank 2 failed")
    for notes, text in (
        ({0: Broken(1, "closed"), 1: Broken(2, "closed"), 2: own}, "rank 2 failed"),
        ({0: Broken(1, "closed"), 1: Broken(2, "Timed out")}, "rank 1 waited too long for rank 2"),
        ({0: Broken(None, "closed"), 1: Broken(2, "gone")}, "rank 1 lost rank 2: gone"),
        ({0: Broken(1, "Timed out")}, "rank 0 waited too long for rank 1"),
        ({0: Broken(1, "a"), 1: Broken(0, "b"), 2: Broken(0, "c")}, "rank 1 lost rank 0: b"),
        ({0: Broken(None, "closed")}, "rank 0 lost another rank: closed"),
    ):
        assert text in str(bottom(notes, 0, 3))


def test_weights_come_from_files(tmp_path: Path, net: nn.Module) -> None:
    state = {n: t.clone() for n, t in net.state_dict().items()}
    names = list(state)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, held in shards.items():
        save_file({n: state[n] for n in held}, tmp_path / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with plait.empty_weights():
        hollow = Net().eval()
    assert all(p.is_meta for p in hollow.parameters()) and not hollow.scale.is_meta
    placed = plait.compile(hollow, devices=SMALL, placement=options(weights=tmp_path))
    check(placed, net, *example())
    assert all(p.is_meta for p in hollow.parameters())


def test_files_that_do_not_fit_are_refused(tmp_path: Path, net: nn.Module) -> None:
    def refused(model: nn.Module, path: Path | None, text: str) -> None:
        with pytest.raises(plait.FileError, match=f"PLT-DST-007.*{text}"):
            plait.compile(model, devices="2xcpu", placement=options(weights=path))(*example())

    state = {n: t.clone() for n, t in net.state_dict().items()}
    with plait.empty_weights():
        hollow = Net().eval()
    refused(hollow, None, "on the meta device")
    refused(hollow, tmp_path, "holds no safetensors")
    save_file({n: t for n, t in state.items() if n != "first.bias"}, tmp_path / "m.safetensors")
    refused(hollow, tmp_path, "no weight 'first.bias'")
    save_file({**state, "first.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    refused(hollow, tmp_path, r"is float32\[3\] in .*, float32\[32\] in the model")
    (tmp_path / "m.safetensors").write_bytes(b"cut short")
    refused(hollow, tmp_path, "cannot be read")
    with pytest.raises(plait.FileError, match="PLT-DST-007"):
        Checkpoint(tmp_path / "nowhere")


def test_stand_ins_cost_no_memory_and_leave_the_model_as_it_was() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(200_000, 100_000, bias=False))  # 80 GB
        model.append(model[0])
    with stand_ins(model) as names:
        assert names == ["0.weight", "1.weight"]
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
        assert not model[0].weight.is_meta
    assert model[0].weight.is_meta


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize(
    ("model", "given", "text"),
    [
        (Random().eval(), {}, "PLT-DST-002: the model draws random numbers"),
        (Counter().eval(), {}, "PLT-DST-002: the model writes to its arguments or buffers"),
        (nn.Linear(3, 3), {}, "PLT-DST-002: the model is in training mode"),
        (nn.Linear(3, 3).eval(), {"devices": []}, "PLT-DST-001: there are no devices"),
        (nn.Linear(3, 3).eval(), {"devices": ["h100:80GB"]}, "PLT-DST-001: nothing runs on"),
        (
            nn.Linear(3, 3).eval(),
            {"dynamic_shapes": {}},
            "PLT-DST-008: a placed",
        ),
        (torch.relu, {}, "PLT-OPT-003: a builtin_function_or_method cannot be divided"),
    ],
)
def test_what_cannot_be_divided_says_why(model: Any, given: Any, text: str) -> None:
    with pytest.raises(plait.PlaitError, match=text):
        plait.compile(model, **{"devices": "2xcpu", **given})(torch.zeros(3, 3))


@pytest.mark.parametrize(
    "wrong",
    [{"launch": "magic"}, {"objective": "speed"}, {"costs": "none"}, {"budget": 0}, {"threads": 0},
     {"timeout": float("nan")}, {"algorithm": "x"}, {"seed": -1}, {"seed": 2**32}, {"seed": 1.5},
     {"weights": 3}, {"link": 5}],
)  # fmt: skip
def test_options_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(plait.OptionError, match=f"PLT-DST-008: {next(iter(wrong))}="):
        plait.PlacementOptions(**wrong)


@pytest.mark.parametrize("wrong", ["2GB", True, -1, float("nan"), float("inf")])
def test_devices_without_meaning_are_refused(wrong: Any) -> None:
    for field in ("memory", "speed"):
        with pytest.raises(plait.OptionError, match="PLT-PLC-003"):
            plait.Device("cpu", **{field: wrong})


RESULTS_COME_AND_GO = """
import torch
from plait.compiler.placed.part import resident, return_freed
return_freed()
kept = []
def play(steps):
    for _ in range(steps):
        first = torch.ones(1 << 15)
        kept.append(torch.empty(1))
        second = torch.ones(1 << 15)
        del first
        kept.append(torch.empty(1))
play(3)
before = resident()
play(200)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have other ways")
def test_results_that_come_and_go_leave_no_holes() -> None:
    """Without `return_freed` glibc's heap grows by 45 MB here."""
    command = [sys.executable, "-c", RESULTS_COME_AND_GO]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 2e6


def test_a_rank_out_of_memory_says_so_wherever_it_is() -> None:
    for error in (MemoryError("no room"), ImportError("x.so: failed to map segment")):
        told = failure(1, error)
        assert told.remark == "PLT-DST-006" and "rank 1 is out of memory" in str(told)


def test_errors_travel_between_processes() -> None:
    import pickle

    error = plait.DistributedError("PLT-DST-006", "reason", "hint")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.remark, type(again)) == (str(error), "PLT-DST-006", type(error))
    short = plait.InfeasibleError("text", {"a": 1.0}, True)
    assert pickle.loads(pickle.dumps(short)).shortfall == {"a": 1.0}


def test_routers_stay_whole_and_answer_the_same() -> None:
    torch.manual_seed(0)
    branches = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(nn.Linear(8, 8), plait.Router(branches, nn.Linear(8, 3)), nn.Linear(8, 8))
    x = torch.randn(6, 8)
    placed = plait.compile(model.eval(), devices="2xcpu:1700B", placement=options())
    check(placed, model, x)
    assert len(set(placed.placement.assign.values())) == 2


def test_measured_costs_price_every_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1500, 1500), nn.Tanh(), nn.Linear(1500, 1500)).eval()
    placed = plait.compile(
        model, devices="2xcpu:10MB", placement=options(costs="measured", link="1GB/s,1us")
    )
    check(placed, model, torch.randn(64, 1500))
    problem = placed.division.problem
    times = [op.time_s for op in problem.ops]
    assert all(len(t) == 2 and t[0] == t[1] for t in times)
    products = [op for op in problem.ops if op.param_bytes > 9e6]
    assert len(products) == 2 and all(op.time_s[0] > 1e-5 for op in products)
    assert all(0 <= op.temp_bytes < 1e6 for op in problem.ops)
    assert problem.default_link.latency_s > 2e-6  # a segment's call, which units do not pay


def test_a_mixture_of_experts_in_processes(tmp_path: Path) -> None:
    from plait.bench import placed_run

    outcome = placed_run.run(placed_run.SIZES["small"], 2, 1.5, "throughput", 4)
    assert outcome.error < 1e-4
    assert outcome.weights_bytes > outcome.limit_bytes
    assert outcome.segments >= 2 and outcome.predicted_s > 0
