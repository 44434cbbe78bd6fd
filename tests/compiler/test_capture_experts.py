"""Mixtures of experts from transformers: captured as routed products, the model left as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plait

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # a plain module beside this file

pytest.importorskip("transformers")

MODELS = ("mixtral", "olmoe", "qwen3-moe", "granite-moe", "gpt-oss", "deepseek-v3")


@pytest.mark.parametrize("name", MODELS)
def test_experts_become_routed_products(name: str) -> None:
    model, inputs = hf_models.MODELS[name]()
    before = model.config._experts_implementation
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        have, want = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(have[0], want[0], rtol=1e-4, atol=1e-4)
    targets = [str(n.target) for n in compiled.graph.graph.nodes]
    assert "plait.routed_linear.default" in targets
    assert not any("grouped_mm" in t for t in targets)
    steps = [s.name for s in compiled.plan.steps if hasattr(s, "kernel")]
    assert sum(name.startswith("routed_linear") for name in steps) >= 2
    assert model.config._experts_implementation == before


def test_experts_outside_the_interface_are_routed() -> None:
    from transformers.models.step3p7 import modeling_step3p7 as step

    config = SimpleNamespace(
        num_local_experts=4, hidden_size=8, moe_intermediate_size=6, hidden_act="silu"
    )
    experts = step.Step3p7Experts(config, swiglu_limit=0.5).eval().requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_()
    compiled = plait.compile(experts, tune="off", pipeline="normalize")
    for tokens in (5, 3, 7):
        x, index = torch.randn(tokens, 8), torch.randint(0, 5, (tokens, 2))
        args = x, index, torch.rand(tokens, 2)  # number 4 stands for no expert
        torch.testing.assert_close(compiled(*args), experts(*args), rtol=1e-4, atol=1e-5)
    assert len(compiled.programs) == 2


def test_experts_that_cannot_be_routed_run_the_models_way_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise ValueError("no routes today")

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "plait", refuses)
    model, inputs = hf_models.MODELS["mixtral"]()
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)
    (remark,) = [r for r in compiled.remarks if r.id == "PLT-CAP-021"]
    assert "no routes today" in remark.reason and remark.hint
    assert compiled.plan is not None


def test_a_saved_mixture_loads_in_a_process_without_transformers(tmp_path) -> None:
    model, inputs = hf_models.MODELS["mixtral"]()
    with torch.no_grad():
        compiled = plait.compile(model, tune="off")
        want = compiled(**inputs)
        compiled.save(tmp_path / "moe.plait")
        torch.save(dict(inputs), tmp_path / "inputs.pt")
        torch.save(want[0], tmp_path / "want.pt")
    code = (
        "import sys, torch, plait\n"
        "from plait.compiler.capture.tree import flatten\n"
        "sys.modules['transformers'] = None\n"
        f"folder = {str(tmp_path)!r}\n"
        "loaded = plait.load(folder + '/moe.plait')\n"
        "out = loaded(**torch.load(folder + '/inputs.pt'))\n"
        "leaves, _ = flatten(out, objects=True)\n"
        "first = next(x for x in leaves if isinstance(x, torch.Tensor))\n"
        "assert torch.equal(first, torch.load(folder + '/want.pt'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
