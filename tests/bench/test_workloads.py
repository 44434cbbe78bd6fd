"""Workloads are the networks of their papers, deterministic, and compiled right."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.bench.peers import tensors_of
from plait.bench.workloads import GROUPS, WORKLOADS, Size, select

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def build(name: str, size: Size = "cpu"):
    try:
        return WORKLOADS[name].build(size)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "size", "gmacs", "millions"),
    [
        ("inception_v3", "cpu", 5.71, 23.8),
        ("squeezenet1_1", "cpu", 0.349, 1.24),
        ("resnext50_32x4d", "cpu", 4.23, 25.0),
        ("nasnet_a_mobile", "cpu", 0.56, 5.3),
        ("randwire", "cpu", 0.58, 5.6),
        ("randwire", "paper", 4.0, 31.9),
        ("bert_base", "cpu", 3.62, 28.35),
        ("bert_base", "paper", 10.87, 85.05),
    ],
)
def test_work_and_parameters_are_the_papers(
    name: str, size: Size, gmacs: float, millions: float
) -> None:
    model, inputs = build(name, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.02)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
def test_mixtral_of_the_paper_is_mixtral_8x7b() -> None:
    from transformers import MixtralForCausalLM

    from plait.bench.workloads.mixtral import config

    with torch.device("meta"):
        model = MixtralForCausalLM(config("paper"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(46.7, rel=0.01)


@pytest.mark.parametrize("name", WORKLOADS)
def test_answers_are_plausible_and_the_same_every_time(name: str) -> None:
    (model, inputs), (again, other) = build(name), build(name)
    assert not model.training
    with torch.no_grad():
        first, second = tensors_of(model(*inputs)), tensors_of(again(*other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for tensor in first:
        assert torch.isfinite(tensor).all()
        assert 0.01 < tensor.std() < 100


def test_chain30_has_thirty_operators() -> None:
    from torch.export import export

    for name in ("chain30", "layers30"):
        model, inputs = build(name)
        graph = export(model, inputs, strict=False).graph
        assert sum(n.op == "call_function" for n in graph.nodes) == 30


def test_batch_norm_statistics_are_not_trivial() -> None:
    model, _ = build("resnext50_32x4d")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(m.running_mean.abs().max() > 1e-3 for m in norms)  # type: ignore[union-attr]


def test_select_knows_names_and_groups() -> None:
    assert [w.name for w in select(["bert_base", "bert_base"])] == ["bert_base"]
    assert len(select(["cnn"])) == 5
    assert len(select([])) == len(WORKLOADS)
    assert {"brainstorm", "branches", "cnn", "dense", "moe", "overhead", "routing"} == set(GROUPS)


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="unknown workload 'inceptionv3': did you mean 'inception"):
        select(["inceptionv3"])
    with pytest.raises(ValueError, match="unknown size 'huge': use one of cpu, paper"):
        WORKLOADS["chain30"].build("huge")  # type: ignore[arg-type]


def test_predictions_for_more_workers_fall_and_stay_above_their_bounds() -> None:
    from plait.bench.scaling import scale

    rows = scale(WORKLOADS["uneven_gemms"], (1, 2, 8, 64))
    assert rows[0].measured and rows[-1].measured is None
    for row in rows:
        assert row.bound * 0.999 <= row.scheduled <= row.in_order
    assert [r.scheduled for r in rows] == sorted((r.scheduled for r in rows), reverse=True)
