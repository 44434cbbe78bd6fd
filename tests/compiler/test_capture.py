"""Capture: what a call becomes as a graph, and what is refused with a reason."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import plait
from plait.compiler import specialise
from plait.compiler.capture.captured import check_tensors
from plait.compiler.capture.export import capture
from plait.compiler.capture.tree import Record, flatten, from_json, leaf_names, to_json, unflatten
from plait.compiler.errors import CaptureError

aten = torch.ops.aten


def targets(captured: Any) -> list[Any]:
    return [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(4, 8)
        self.layer_norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        x = self.layer_norm(self.linear(x))
        q = x.view(-1, 1, 2, 4)
        x = nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)
        return nn.functional.gelu(nn.functional.silu(x)).softmax(-1)


def test_composites_stay_whole() -> None:
    captured = capture(Block().eval(), (torch.randn(2, 3, 8, 8),), {})
    found = set(targets(captured))
    assert found & {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
    assert found & {aten.softmax.int, aten._softmax.default}
    assert {
        aten.conv2d.default,
        aten.max_pool2d.default,
        aten.linear.default,
        aten.layer_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.silu.default,
        aten.gelu.default,
    } <= found


def test_graph_is_flat_and_every_node_has_a_value() -> None:
    model = Block().eval()
    x = torch.randn(2, 3, 8, 8)
    captured = capture(model, (x,), {})
    graph = captured.graph_module.graph
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x"]
    assert all("val" in n.meta for n in graph.nodes if n.op != "output")
    weight = captured.constants()["conv_weight"]
    assert weight.data_ptr() == model.conv.weight.data_ptr()
    assert captured.names["conv_weight"] == "conv.weight"
    torch.testing.assert_close(captured.graph_module(x)[0], model(x))


def test_tied_weights_share_one_attribute() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    captured = capture(Tied().eval(), (torch.tensor([1, 2]),), {})
    assert len(captured.constants()) == 1
    assert {*captured.names.values(), *captured.aliases} == {"embed.weight", "head.weight"}


def test_module_training_flags_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.eval()
    model[1].train()
    capture(model, (torch.randn(2, 2),), {})
    assert [m.training for m in model.modules()] == [False, False, True]


def test_mutated_buffers_and_inputs_are_results_to_copy_back() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            out.copy_(x * 2)
            return x + self.count

    model = Counter()
    captured = capture(model, (torch.ones(3), torch.zeros(3)), {})
    assert [s.name for s in captured.inputs] == ["x", "out", "count"]
    assert captured.states[0] is model.count
    assert sorted(m.input for m in captured.mutations) == [1, 2]
    results = captured.graph_module(torch.ones(3), torch.zeros(3), torch.zeros(1))
    values = {m.input: results[m.output] for m in captured.mutations}
    assert torch.equal(results[0], torch.full((3,), 2.0))
    assert torch.equal(values[1], torch.full((3,), 2.0))
    assert torch.equal(values[2], torch.ones(1))
    assert model.count.item() == 0, "capture itself changes nothing"


@pytest.mark.parametrize(
    "dropout",
    [
        nn.Dropout(0.5).eval(),
        lambda x: F.dropout(input=x, p=0.3, training=False, inplace=True),
        lambda x: torch.dropout(x, 0.0, True),
        lambda x: torch.dropout(x, 0.5, train=False),
    ],
)
def test_what_is_written_to_a_dropout_that_is_off_is_written_to_its_input(
    dropout: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dropout(y).relu_()
        return y + 1

    x = torch.randn(2, 4)
    assert torch.equal(capture(function, (x,), {}).graph_module(x)[0], function(x))


def test_a_dropout_that_is_on_or_refused_is_neither_left_out() -> None:
    names = [
        n.name for n in capture(nn.Dropout(0.5), (torch.ones(3),), {}).graph_module.graph.nodes
    ]
    assert any("dropout" in name for name in names)
    with pytest.raises(CaptureError, match="dropout probability"):
        capture(lambda x: F.dropout(x, 1.5, training=False), (torch.ones(3),), {})


def test_symbols_ranges_and_guards() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y if x.shape[0] % 2 == 0 else x) * x.shape[0]

    x, y = torch.randn(6, 3), torch.randn(6, 3)
    captured = capture(function, (x, y), {}, dynamic=[{0: Dim.AUTO}, {0: Dim.AUTO}])
    ((name, where),) = captured.symbols.items()
    assert where == (0, 0)
    assert captured.ranges[name] == (2, None)
    matches = captured.matcher()
    assert matches([(8, 3), (8, 3)])
    assert not matches([(7, 3), (7, 3)]), "the branch on oddness was taken at capture"
    assert not matches([(8, 3), (6, 3)]), "both are one symbol"
    assert not matches([(8, 4), (8, 4)]), "3 is a constant"
    assert not matches([(0, 3), (0, 3)]), "sizes below 2 need their own capture"


def test_declared_range_is_kept() -> None:
    captured = capture(torch.relu, (torch.randn(4, 3),), {}, dynamic=[{0: Dim("n", min=3, max=9)}])
    assert list(captured.ranges.values()) == [(3, 9)]


def larger(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.interpolate(x[:, None], scale_factor=1.5)


def merged(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        padded = nn.functional.pad(x, (0, 0, 0, x.shape[1] % 2))
        x = padded.reshape(x.shape[0], padded.shape[1] // 2, -1, x.shape[2]).sum(2)
    return x


SIZES = {"which plans cannot hold": larger, "divides more than 3 times over": merged}


@pytest.mark.parametrize("reason", SIZES)
def test_some_sizes_are_refused_and_become_constants(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, asked = SIZES[reason], []

    def counting(*args: Any) -> Any:
        asked.append(args[-1])
        return capture(*args)

    capture(function, (torch.randn(2, 8, 6),), {}, [{0: Dim.AUTO}])
    with pytest.raises(CaptureError, match=reason) as caught:
        capture(function, (torch.randn(2, 8, 6),), {}, [{1: Dim.AUTO}])
    assert caught.value.remark == "PLT-CAP-001"
    monkeypatch.setattr(specialise, "capture", counting)
    compiled = plait.compile(function, tune="off")
    for length in (8, 9, 10):
        x = torch.randn(2, length, 6)
        torch.testing.assert_close(compiled(x), function(x))
    assert [r.id for r in compiled.remarks if r.pass_name == "capture"] == ["PLT-CAP-004"]
    assert [bool(dims) for dims in asked] == [False, True, False, False], "it was tried once"


@pytest.mark.parametrize("reason", SIZES)
def test_sizes_beside_refused_ones_stay_open(reason: str) -> None:
    compiled = plait.compile(SIZES[reason], tune="off")
    for sizes, programs in {(2, 8): 1, (3, 9): 2, (4, 9): 2, (5, 10): 3, (2, 10): 3}.items():
        x = torch.randn(*sizes, 6)
        torch.testing.assert_close(compiled(x), SIZES[reason](x))
        assert len(compiled.programs) == programs, sizes
    (seen,) = (r.reason for r in compiled.remarks if r.id == "PLT-CAP-002")
    assert seen == "more than one size was seen of x[0]"


def halves(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):  # as the sizes of images that are pooled without padding
        x = x[:, : (x.shape[1] - 1) // 2]
    return x * 2


def test_sizes_that_are_divided_again_and_again_stay_open() -> None:
    compiled = plait.compile(halves, tune="off")
    for length in (96, 99, 127):
        x = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
        assert torch.equal(compiled(x), halves(x))
    assert [r.id for r in compiled.remarks if r.pass_name == "capture"] == ["PLT-CAP-002"]
    assert len(compiled.programs) == 2


@pytest.mark.parametrize("name", ["inv", "cholesky", "lu_factor", "ldl_factor", "matrix_power"])
def test_linear_algebra_is_captured_and_still_checks_its_arguments(name: str) -> None:
    function: Any = getattr(torch.linalg, name)
    given = (-3,) if name == "matrix_power" else ()
    compiled = plait.compile(lambda x: function(x, *given), tune="off")
    good, bad = torch.eye(3) * 2, torch.zeros(3, 3)
    torch.testing.assert_close(compiled(good), function(good, *given))
    assert compiled.plan is not None
    with pytest.raises(RuntimeError, match="linalg"):
        compiled(bad)


def test_labels_end_at_the_first_that_is_none() -> None:
    model = nn.MultiLabelMarginLoss(reduction="none").eval()
    compiled = plait.compile(model, tune="off", pipeline="normalize")
    x, labels = torch.randn(3, 5), torch.tensor([[3, 0, -1, 1, 2], [1, -1, 1, 0, 0], [-1] * 5])
    torch.testing.assert_close(compiled(x, labels), model(x, labels))


def test_guards_may_be_about_fractions() -> None:
    def upper(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] * 0.7 > 3.5 else x - 1

    compiled = plait.compile(upper, tune="off", pipeline="normalize")
    for size in (3, 4, 5, 6, 7, 2):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), upper(x))
    assert len(compiled.programs) <= 4


def test_strides_of_sizes_of_one_need_no_symbols() -> None:
    """A part of a batch has its strides; where it has a single row they mean nothing."""
    compiled = plait.compile(lambda x: (x + 1).sum(1), tune="off")
    last = {"memory_format": torch.channels_last}
    for shape in ((2, 3, 8, 8), (3, 3, 9, 7), (1, 3, 7, 9), (1, 3, 5, 9)):
        x = torch.randn(2, *shape[1:2], 12, 9).contiguous(**last)
        x = torch.cat([x, x]).contiguous(**last)[: shape[0], :, : shape[2], : shape[3]]
        torch.testing.assert_close(compiled(x), (x + 1).sum(1))
    assert [r.id for r in compiled.remarks if r.pass_name == "capture"] == ["PLT-CAP-002"] * 2


def test_size_in_the_result_is_an_expression() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, int, str]:
        return x * 2, x.shape[0] * 3, "text"

    captured = capture(function, (torch.randn(5, 2),), {}, dynamic=[{0: Dim.AUTO}])
    assert captured.out_leaves[0] == 0
    assert captured.out_leaves[2] == ("text",)
    assert captured.binder()([(7, 2)]) == (21,)


def test_cond_keeps_both_branches() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    captured = capture(function, (torch.ones(3),), {})
    assert torch.ops.higher_order.cond in targets(captured)
    assert torch.equal(captured.graph_module(torch.ones(3))[0], torch.full((3,), 2.0))
    assert torch.equal(captured.graph_module(-torch.ones(3))[0], torch.full((3,), -2.0))


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (lambda x: x if x.sum() > 0 else -x, "PLT-CAP-001"),
        (lambda x: x.sum().item(), "PLT-CAP-006"),
        (lambda x: 3, "PLT-CAP-007"),
    ],
)
def test_refusal_has_an_id_and_a_reason(function: Any, remark: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(function, (torch.ones(3),), {})
    assert caught.value.remark == remark
    assert caught.value.reason


def test_changing_a_given_container_is_refused() -> None:
    def function(cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["x"] = cache["x"] + 1
        return cache["x"]

    with pytest.raises(CaptureError) as caught:
        capture(function, ({"x": torch.ones(2)},), {})
    assert caught.value.remark == "PLT-CAP-005"


def test_opaque_arguments_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="'thing'"):
        capture(lambda x, thing: x, (torch.ones(2),), {"thing": object()})


# -- trees -----------------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")


@dataclass
class Pair:
    left: Any
    right: Any = None


@dataclass
class Output(OrderedDict[str, Any]):
    """As the outputs of transformers: its items are those fields that are not None."""

    first: Any = None
    second: Any = None
    third: Any = None

    def __post_init__(self) -> None:
        super().update({k: v for k, v in vars(self).items() if v is not None})


class Plain:
    def __init__(self) -> None:
        self.keys, self.size = 1, 2


def test_tree_round_trip() -> None:
    value = ([1, (2, 3)], {"a": Pair(4, Point(5, None))}, torch.Size([6, 7]))
    leaves, tree = flatten(value)
    assert leaves == [1, 2, 3, 4, 5, None, 6, 7]
    assert unflatten(tree, leaves) == value
    assert leaf_names(tree, "v")[3:5] == ["v[1]['a'].left", "v[1]['a'].right.x"]
    assert unflatten(from_json(to_json(tree)), leaves) == value


def test_items_of_an_output_keep_their_order() -> None:
    value = Output(1, third=3)
    value["added"], value["second"] = 4, 2  # as transformers adds what it has collected
    leaves, tree = flatten(value)
    assert leaves == [1, 3, 4, 2]
    for found in (tree, from_json(to_json(tree))):
        rebuilt = unflatten(found, leaves)
        assert type(rebuilt) is Output and list(rebuilt.items()) == list(value.items())
    assert flatten(Output(1, 2))[1] == flatten(Output(3, 4))[1] != tree


def test_objects_are_opened_only_on_request() -> None:
    plain = Plain()
    assert flatten(plain)[0] == [plain]
    leaves, tree = flatten(plain, objects=True)
    assert leaves == [1, 2]
    rebuilt = unflatten(tree, [3, 4])
    assert type(rebuilt) is Plain and (rebuilt.keys, rebuilt.size) == (3, 4)


def test_missing_class_becomes_a_record() -> None:
    data = to_json(flatten(Pair(1, 2))[1])
    data["cls"] = "no_such_module:Pair"
    record = unflatten(from_json(data), [1, 2])
    assert isinstance(record, Record)
    assert record.left == 1 and record["right"] == 2


@pytest.mark.parametrize("cls", ["os:system", "subprocess:Popen", "builtins:dict"])
def test_files_cannot_name_arbitrary_callables(cls: str) -> None:
    data = to_json(flatten(Pair(1, 2))[1])
    data["cls"] = cls
    assert isinstance(unflatten(from_json(data), ["echo", "x"]), Record)


def test_structure_that_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="contains itself"):
        flatten(value)


def test_check_tensors_names_argument_expected_and_got() -> None:
    captured = capture(lambda x, y: x + y, (torch.ones(2, 3), torch.ones(3)), {})
    wrong = check_tensors(captured, [torch.ones(2, 4), torch.ones(3, dtype=torch.int64)])
    assert wrong["x"] == "expected dimension 1 to be 3, got float32[2, 4] on cpu"
    assert wrong["y"] == "expected float32[3] on cpu, got int64[3] on cpu"
    assert not check_tensors(captured, [torch.ones(2, 3), torch.ones(3)])
