"""Routing workloads: every form computes the same, and loads are spread as they claim."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.bench import harness, peers, routes, trained_moe
from plait.bench.harness import reference, relative_error, run_workload
from plait.bench.peers import tensors_of
from plait.bench.workloads import FORMS, WORKLOADS, Size, Workload, select
from plait.bench.workloads.loops import LoopEarlyExit, LoopRouter, exits_taken

ROUTED = select(["routing"])
FORMED = [(w, form) for w in WORKLOADS.values() for form in w.forms]


def build(workload: Workload, form: str = "", size: Size = "cpu") -> tuple[Any, Any]:
    try:
        return workload.build_plain(size, form) if form else workload.build(size)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def names(workload: Workload) -> str:
    return workload.name


@pytest.mark.parametrize("workload", ROUTED, ids=names)
@torch.no_grad()
def test_float32_takes_the_routes_of_float64(workload: Workload) -> None:
    model, inputs = build(workload)
    assert relative_error(tensors_of(model(*inputs)), reference(model, inputs)) < 1e-5


@pytest.mark.parametrize(("workload", "form"), FORMED, ids=[f"{w.name}-{f}" for w, f in FORMED])
@torch.no_grad()
def test_every_form_is_the_same_function(workload: Workload, form: str) -> None:
    model, inputs = build(workload)
    other, same = build(workload, form)
    assert not other.training
    for a, b in zip(inputs, same, strict=True):
        assert torch.equal(a, b)
    want = tensors_of(model(*inputs))
    assert relative_error(tensors_of(other(*inputs)), want) < 1e-5
    if form == "loop":
        exact = reference(model, inputs)
        assert relative_error(reference(other, inputs), exact) < 1e-12


@pytest.mark.parametrize(
    ("name", "seed"), [("livesr", 1), ("early_exit_bert", 2), ("dynamic_segmentation", 3)]
)
@torch.no_grad()
def test_forms_agree_on_other_inputs(name: str, seed: int) -> None:
    """Other routes: none of them comes from the inputs that the model was balanced with."""
    workload = WORKLOADS[name]
    (model, (x,)), (other, _) = build(workload), build(workload, "loop")
    generator = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        x = torch.randn(x.shape, generator=generator)
    else:
        x = torch.randint(0, 4096, x.shape, generator=generator)
    assert relative_error([other(x)], [model(x)]) < 1e-5
    assert relative_error([other(x[:1])], [model(x[:1])]) < 1e-5


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="chain30 has no form 'loop'"):
        WORKLOADS["chain30"].build_plain()


# -- loads -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_loads_of_the_switch_layer_follow_zipf() -> None:
    model, (x,) = build(WORKLOADS["switch_layer"])
    one_hot, _, _ = model.mlp.router(model.layer_norm(x))
    want = routes.shares(routes.zipf(128, 64, 1), 64)
    assert torch.equal(one_hot[0].double().mean(0), want)  # and none is beyond its capacity
    assert one_hot.sum() == 128
    assert want[0] > 5 * want[8:].mean()


@torch.no_grad()
def test_loads_of_the_switch_encoder_are_skewed() -> None:
    model, (x, mask) = build(WORKLOADS["switch_encoder_e16"])
    routers = [m for m in model.modules() if type(m).__name__ == "SwitchTransformersTop1Router"]
    loads = torch.zeros(16)

    def counted(module: Any, args: Any, result: Any) -> None:
        loads.add_(result[0].reshape(-1, 16).sum(0))

    for router in routers:
        router.register_forward_hook(counted)
    model(x, attention_mask=mask)
    loads = loads.sort(descending=True).values
    assert len(routers) == 2 and 0.9 * 256 < loads.sum() <= 256  # but for an expert's capacity
    assert 0.5 * 256 < loads[:4].sum() < 0.95 * 256 and loads[6] > 0


@torch.no_grad()
def test_loads_of_livesr_are_uneven() -> None:
    model, (x,) = build(WORKLOADS["livesr"], "loop")
    loads = torch.bincount(model.scorer(x), minlength=10)
    assert loads.sum() == 48
    assert loads[0] >= 14
    assert 1 <= loads.min() <= 2
    assert torch.allclose(loads / 48, routes.zipf_shares(10).float(), atol=0.03)
    best = model.scorer.logits(x).topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4


@torch.no_grad()
def test_tasks_share_experts() -> None:
    model, (_, task) = build(WORKLOADS["task_moe"])
    loads = torch.bincount(model.layers[1].ffn.scorer(task), minlength=16)
    assert loads.sum() == 16
    assert loads.max() >= 4
    assert (loads == 0).sum() >= 4


@pytest.mark.parametrize(("name", "exits"), [("msdnet", 5), ("early_exit_bert", 6)])
@torch.no_grad()
def test_equal_shares_leave_at_each_exit(name: str, exits: int) -> None:
    model, (x,) = build(WORKLOADS[name])
    left = torch.bincount(exits_taken(model, x), minlength=exits)
    assert left.sum() == len(x)
    assert left.max() - left.min() <= 1


@pytest.mark.parametrize("number", range(1, 6))
@torch.no_grad()
def test_each_image_leaves_at_its_exit(number: int) -> None:
    model, (x,) = build(WORKLOADS[f"msdnet_exit{number}"])
    assert x.shape == (1, 3, 32, 32)
    assert exits_taken(model, x).tolist() == [number - 1]


@torch.no_grad()
def test_gates_open_for_some_for_all_and_for_none() -> None:
    model, (x,) = build(WORKLOADS["dynamic_segmentation"], "loop")
    opened: list[int] = []
    for module in model.modules():
        if isinstance(module, LoopRouter):
            module.scorer.register_forward_hook(  # type: ignore[union-attr]
                lambda _module, _args, score: opened.append(int((score > 0).sum()))
            )
    model(x)
    assert {0, 1, 2, 3, 4} == set(opened)
    assert 0.3 < sum(opened) / (4 * len(opened)) < 0.8


@torch.no_grad()
def test_mixture_of_depths_lets_a_quarter_pass() -> None:
    model, (x,) = build(WORKLOADS["mixture_of_depths"])
    changed = (model[1](model[0](x)) != model[0](x)).any(2)
    assert changed.sum() == 64


@torch.no_grad()
def test_task_layers_mix_no_sentences() -> None:
    model, (x, task) = build(WORKLOADS["task_moe"])
    assert relative_error([model(x[3:5], task[3:5])], [model(x, task)[3:5]]) < 1e-5


# -- loops -----------------------------------------------------------------------------------------


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x), "a loop runs no branch for nothing"
        return x * self.factor


def test_loop_router() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    branches = [Scale(10.0), Scale(100.0)]
    best = LoopRouter(branches, lambda x: x + 1, top_k=1, combine="sum")
    assert best(x).tolist() == [[10, 0], [0, 100], [-10, -10]]
    both = LoopRouter(branches, lambda x: x + 1, top_k=2)
    assert both(x).tolist() == [[120, 0], [0, 210], [0, 0]]
    some = LoopRouter(branches, lambda x: x, threshold=0.5)
    assert some(x).tolist() == [[10, 0], [0, 100], [0, 0]]
    assert some(-x[:2]) is None
    label = LoopRouter(branches, lambda key: key % 2, combine="select")
    assert label(x, torch.tensor([3, 2, 1])).tolist() == [[100, 0], [0, 10], [-100, -100]]


def test_loop_early_exit_stops_when_all_have_left() -> None:
    def net(confident: float) -> LoopEarlyExit:
        stages = [Scale(1.0), Scale(10.0), Scale(10.0)]
        return LoopEarlyExit(stages, [torch.nn.Identity()] * 3, confident)

    x = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 0.5]])
    assert torch.allclose(net(0.9)(x), torch.tensor([[5.0, 0.0], [10.0, 0.0], [0.0, 5.0]]))
    assert torch.equal(net(0.0)(x), x)  # a later stage would have met an empty batch


# -- the trained model -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    return tmp_path


def test_training_learns_and_is_kept(folder: Path) -> None:
    losses: list[float] = []
    model, train, held_out = trained_moe.trained(12, folder, lambda _, loss: losses.append(loss))
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log(256)
    assert trained_moe.loss(model, held_out[0]) < 4.5
    assert len(train) == 12
    assert held_out[0].shape == (trained_moe.ROWS, trained_moe.WINDOW)
    (path,) = folder.iterdir()
    kept = path.read_bytes()
    again, _, _ = trained_moe.trained(12, folder, lambda *_: pytest.fail("trained again"))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not again.training
    path.write_bytes(kept[:1000])  # damage is noticed and mended
    mended, _, _ = trained_moe.trained(12, folder)
    assert len(list(folder.iterdir())) == 1
    assert path.stat().st_size == len(kept)
    assert trained_moe.loss(mended, held_out[0]) < 4.5


def test_the_last_tenth_of_the_text_is_held_out() -> None:
    pytest.importorskip("transformers")
    _, train, held_out = trained_moe.trained()
    assert len(train.text) == pytest.approx(9 * len(held_out.text), rel=1e-4)
    both = torch.cat([train.text, held_out.text])
    assert bytes(both.tolist()) == trained_moe.library_text()
    for batches in (train, held_out):
        row = batches[1][2]
        start = int(batches.starts[1, 2])
        assert torch.equal(row, batches.text[start : start + trained_moe.WINDOW].long())
        assert batches.starts.max() + trained_moe.WINDOW <= len(batches.text)


# -- the harness -----------------------------------------------------------------------------------


def test_pytorch_gets_every_form_that_a_workload_has() -> None:
    chosen = peers.select(["plait", "eager"])
    assert [p.name for p in chosen] == ["plait", "eager", *(f"eager-{form}" for form in FORMS)]
    assert {p.family for p in chosen[1:]} == {"torch"}
    assert [p.name for p in peers.select(["compile-loop"])] == ["compile-loop"]
    assert [p.name for p in peers.select(["ort"])] == ["ort"]
    eager = peers.select(["eager"])
    rows = run_workload(WORKLOADS["livesr"], eager, rounds=1, seconds=0.01)
    assert [(r.peer, r.status) for r in rows] == [("eager", "OK"), ("eager-loop", "OK")]
    rows = run_workload(WORKLOADS["chain30"], eager, rounds=1, seconds=0.01)
    assert [r.peer for r in rows] == ["eager"]


def test_a_form_is_compared_with_the_models_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["livesr"]
    model, inputs = workload.build_plain("cpu")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.branches[0][0].weight += 1  # type: ignore[index]
    monkeypatch.setattr(Workload, "build_plain", lambda *_: (broken, inputs))
    rows = harness.run_workload(workload, peers.select(["eager"]), rounds=1, seconds=0.01)
    assert [(r.peer, r.status) for r in rows] == [("eager", "OK"), ("eager-loop", "WRONG")]
