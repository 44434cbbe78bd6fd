"""Choices that transformers would make otherwise while it is exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import plait
from plait.compiler.capture import as_eager

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # plain modules beside this file
import hf_models_more  # noqa: F401

pytest.importorskip("transformers")


def attentions(compiled: Any) -> list[fx.Node]:
    """The attention operators of the latest program."""
    graph = compiled.programs[-1].captured.graph_module.graph
    found = [n for n in graph.nodes if "scaled_dot_product" in str(n.target)]
    assert found
    return found


def agree(compiled: Any, model: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        have, want = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(have[0], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "causal"), [("bert", False), ("llama", True), ("bart", True)])
def test_attention_has_no_mask_where_nothing_is_padded(name: str, causal: bool) -> None:
    model, inputs = hf_models.MODELS[name]()
    compiled = plait.compile(model, tune="off")
    mask = inputs.pop("attention_mask", None)
    for length in (11, 7, 9):
        agree(compiled, model, {k: v[:, :length] for k, v in inputs.items()})
        found = attentions(compiled)
        assert all(len(n.args) < 4 or n.args[3] is None for n in found)
        assert any(n.kwargs.get("is_causal") or True in n.args[5:6] for n in found) == causal
    assert len(compiled.programs) == 2, "the second program takes every length"
    if mask is not None:
        agree(compiled, model, {**inputs, "attention_mask": mask})
        assert all(n.args[3] is not None for n in attentions(compiled))


def test_a_mask_that_is_left_out_is_made_where_the_model_needs_it() -> None:
    model, inputs = hf_models.MODELS["longt5"]()
    del inputs["attention_mask"]
    compiled = plait.compile(model, tune="off", pipeline="normalize")
    agree(compiled, model, inputs)
    assert compiled.programs


def test_a_window_still_needs_its_mask() -> None:
    model, inputs = hf_models.MODELS["mistral"]()
    window = model.config.sliding_window
    assert window is not None and window < 11
    compiled = plait.compile(model, tune="off")
    for length in (11, window - 1, window, 9):
        agree(compiled, model, {"input_ids": inputs["input_ids"][:, :length]})


def test_a_mask_of_wrong_size_is_not_made_where_eager_mode_makes_none() -> None:
    model, inputs = hf_models.MODELS["autoformer"]()
    compiled = plait.compile(model, tune="off")
    agree(compiled, model, inputs)
    assert len(compiled.programs) == 1


def test_linear_attention_solves_its_systems_by_one_operator() -> None:
    model, inputs = hf_models.MODELS["qwen3-next"]()
    compiled = plait.compile(model, tune="off")
    agree(compiled, model, inputs)
    graph = compiled.programs[0].captured.graph_module.graph
    targets = [str(n.target) for n in graph.nodes]
    assert "aten.linalg_solve_triangular.default" in targets
    assert len(targets) < 1000, "no rows of a chunk one by one"


def test_attention_that_is_causal_by_its_mask_alone_depends_on_the_values() -> None:
    """Eager mode leaves the mask out where nothing is padded, and then nothing is causal."""
    model, inputs = hf_models.MODELS["aimv2"]()
    compiled = plait.compile(model, tune="off")
    padded, ones = inputs["attention_mask"], torch.ones_like(inputs["attention_mask"])
    for mask in (ones, padded, ones):
        agree(compiled, model, {**inputs, "attention_mask": mask})
    assert len(compiled.programs) == 2
    assert [len(n.args) > 3 for n in attentions(compiled)] == [True, True]
    agree(compiled, model, {k: v[:, :9] for k, v in inputs.items()})
    assert not {"PLT-CAP-001", "PLT-CAP-004"} & {r.id for r in compiled.remarks}


class Packed(nn.Module):
    """Attention that is causal by its mask alone, which is made of positions."""

    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        library = hf_models.library()
        self.mask = library.masking_utils.create_causal_mask
        self.functions = library.modeling_utils.ALL_ATTENTION_FUNCTIONS
        self.config = library.LlamaConfig(attn_implementation="sdpa")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor]:
        mask = self.mask(self.config, x, None, None, positions)
        heads = x.unsqueeze(1)
        return (self.functions["sdpa"](self, heads, heads, heads, mask, is_causal=None)[0],)


def test_positions_may_leave_a_mask_out() -> None:
    """Eager mode needs none where they say that each row is one sequence."""
    model = Packed().eval()
    compiled = plait.compile(model, tune="off", pipeline="normalize")
    x = torch.randn(2, 5, 8)
    alone, packed = torch.arange(5)[None], torch.tensor([[0, 1, 2, 0, 1]])
    for positions in (alone, packed, alone + 1):
        agree(compiled, model, {"x": x, "positions": positions})
    assert len(compiled.programs) == 2


def _by_data(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    made = x.new_zeros(4, 3)
    made.data[2:].copy_((x * weight.data).data[:1])
    x.data.add_(1)
    return made + 1, x[1:].data


def test_data_of_tensors_are_views() -> None:
    compiled = plait.compile(_by_data, tune="off", pipeline="normalize")
    for rows in (2, 5, 3):
        x, weight = torch.randn(rows, 3), torch.randn(3)
        own = x.clone()
        have, want = compiled(x, weight), _by_data(own, weight)
        assert all(map(torch.equal, have, want)) and torch.equal(x, own)
    assert len(compiled.programs) == 2


def _sets_data(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    made.data = made.data + 1
    return made * 3


def test_a_program_that_sets_data_is_not_captured() -> None:
    compiled = plait.compile(_sets_data, tune="off", pipeline="normalize")
    x = torch.randn(3)
    torch.testing.assert_close(compiled(x), _sets_data(x))
    assert "sets .data" in next(r.reason for r in compiled.remarks if r.id == "PLT-CAP-001")


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.to(x.device)
        return self.inner.float().to(x)(x) * self.scale


def test_a_module_may_be_moved_to_where_it_is() -> None:
    model = Moving().eval()
    compiled = plait.compile(model, tune="off", pipeline="normalize")
    for x in (torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 4).double()):
        torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled.programs) == 2, "the last call changes the weights, and is no program"


def test_the_library_is_left_as_it_was() -> None:
    hf_models.MODELS["bert"]()
    question = sys.modules["transformers.masking_utils"].is_torchdynamo_exporting
    with pytest.raises(KeyError), as_eager.as_eager(()):
        assert vars(sys.modules["transformers.masking_utils"])[as_eager.QUESTION] is not question
        raise KeyError
    assert sys.modules["transformers.masking_utils"].is_torchdynamo_exporting is question
