"""Inputs that a compiled program must not take as they are: one error, or the original's answer."""

from __future__ import annotations

import functools
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import plait

compile = functools.partial(plait.compile, tune="off")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ids(compiled: plait.Compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture"]


# -- tensors of another kind than the program was made for -----------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_mkldnn(),
        lambda x: x.to("meta"),
    ],
    ids=["coo", "csr", "mkldnn", "meta"],
)
def test_known_sizes_of_another_layout_run_the_original(other: Callable[..., Any]) -> None:
    compiled = compile(lambda x: x * 2)
    x = torch.randn(3, 4)
    compiled(x)
    got = compiled(other(x))
    assert got.layout == other(x).layout and got.device == other(x).device
    assert got.is_meta or torch.equal(got.to_dense() if got.layout != torch.strided else got, x * 2)
    assert "PLT-CAP-008" in ids(compiled)
    torch.testing.assert_close(compiled(x), x * 2)


def test_weights_on_the_meta_device_run_the_original() -> None:
    model = nn.Linear(3, 2, device="meta").eval()
    compiled = compile(model)
    assert compiled(torch.empty(4, 3, device="meta")).shape == (4, 2)
    assert ids(compiled) == ["PLT-CAP-008"]


def test_nested_tensors_run_the_original() -> None:
    compiled = compile(lambda x: x * 2)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert torch.equal(compiled(nested)[1], torch.full((3,), 2.0))


def test_lazy_negation_and_conjugation_are_done() -> None:
    compiled = compile(lambda x: x * 2)
    z = torch.randn(1, dtype=torch.complex64)
    negated = z.conj().imag  # one element, so it counts as contiguous
    assert negated.is_neg() and negated.is_contiguous()
    compiled(torch.randn(1))
    torch.testing.assert_close(compiled(negated), negated * 2)
    real = compile(lambda x: x.real + x.imag)
    real(z)
    torch.testing.assert_close(real(z.conj()), z.real - z.imag)


def test_transforms_see_the_original() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2 + x.sum()

    compiled, x = compile(function), torch.randn(3, 4)
    compiled(x[0])
    torch.testing.assert_close(torch.vmap(compiled)(x), torch.vmap(function)(x))
    got, want = (torch.func.jvp(f, (x[0],), (x[1],)) for f in (compiled, function))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        got, want = (forward_ad.unpack_dual(f(dual)).tangent for f in (compiled, function))
    torch.testing.assert_close(got, want)
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(compiled)(x[0])
    torch.testing.assert_close(traced(x[1]), function(x[1]))


def test_the_default_dtype_is_part_of_what_a_program_is_made_for() -> None:
    compiled = compile(lambda x: torch.ones(3) + x)
    x = torch.zeros(3)
    assert compiled(x).dtype == torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        assert compiled(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert compiled(x).dtype == torch.float32


# -- arguments that share memory -------------------------------------------------------------------


def test_capturing_a_call_with_one_tensor_twice_keeps_the_arguments_apart() -> None:
    compiled = compile(lambda x, y: x * y + 1)
    x, y = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(compiled(x, x), x * x + 1)
    torch.testing.assert_close(compiled(x, y), x * y + 1)


def test_capturing_a_call_with_the_models_own_weight() -> None:
    model = nn.Linear(4, 4).eval()
    compiled = compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model.weight), model(model.weight))
        x = torch.randn(4, 4)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("first", ["apart", "same"])
@pytest.mark.parametrize("how", ["same", "overlap", "expanded"])
def test_written_arguments_that_share_memory_run_the_original(first: str, how: str) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y.mul_(2)
        return x + y

    def arguments(how: str) -> tuple[torch.Tensor, torch.Tensor]:
        memory = torch.arange(12.0)
        return {
            "apart": (memory[:4], memory[4:8]),
            "same": (memory[:4], memory[:4]),
            "overlap": (memory[:4], memory[2:6]),
            "expanded": (memory[0].expand(4), memory[4:8]),
        }[how]

    compiled = compile(function)
    compiled(*arguments(first))
    ours, theirs = arguments(how), arguments(how)
    if how == "expanded":
        with pytest.raises(RuntimeError, match="single memory location"):
            compiled(*ours)
        return
    torch.testing.assert_close(compiled(*ours), function(*theirs))
    torch.testing.assert_close(ours, theirs)
    assert "PLT-CAP-018" in ids(compiled)


# -- views by strides ------------------------------------------------------------------------------


def test_views_by_strides_see_the_memory_that_eager_execution_has() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)

    def function(x: torch.Tensor) -> torch.Tensor:
        return conv(x).as_strided((2, 8, 7), (8 * 36, 36, 2), 5) * 2

    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    compiled = compile(function)
    torch.testing.assert_close(compiled(x), function(x))
    assert "PLT-FUS-002" not in [r.id for r in compiled.remarks]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.as_strided((2, 2), (1, 2), 0) + 1,
        lambda x: torch.as_strided_copy(x, (2, 2), (1, 2), 0),
        lambda x: torch.as_strided_scatter(x, torch.ones(2, 2), (2, 2), (1, 2), 0),
    ],
)
def test_views_by_strides_see_what_lies_around_an_argument(function: Any) -> None:
    x = torch.arange(12.0).reshape(4, 3)
    for first in (x.t(), x[::2], x[1:]):
        compiled = compile(function)
        assert torch.equal(compiled(first), function(first))
        assert ids(compiled)[-1] == "PLT-CAP-027"
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("own", [True, False])
def test_an_argument_in_another_order_than_a_view_by_strides_saw_runs_as_it_is(own: bool) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x if own else x * 2).as_strided((x.shape[0], 2), (1, 3), 1) + 1

    x = torch.arange(24.0).reshape(4, 6)
    compiled = compile(function)
    for given in (x, x.reshape(6, 4), x.reshape(3, 8)[:, 1:7]):
        assert torch.equal(compiled(given), function(given))
    assert torch.equal(compiled(x.reshape(6, 4).t()), function(x.reshape(6, 4).t()))
    assert ids(compiled)[-1] == "PLT-CAP-027"


# -- the original runs once ------------------------------------------------------------------------


def test_what_cannot_be_captured_runs_once() -> None:
    def function(x: torch.Tensor) -> float:
        x.add_(1)
        return x.sum().item()

    compiled, x = compile(function), torch.zeros(3)
    assert compiled(x) == 3.0 and torch.equal(x, torch.ones(3))
    given = [x]
    changing = compile(lambda values: values.append(values[0]) or values[0] * 2)
    changing(given)
    assert len(given) == 2


def test_wrong_arguments_at_the_first_call_leave_no_trace(
    capfd: pytest.CaptureFixture[str],
) -> None:
    handler = logging.StreamHandler()  # torch's own may have been muted by the test runner
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    compiled = compile(lambda x: x.view(3, 4) * 2)
    try:
        with pytest.raises(RuntimeError, match="invalid for input of size 5"):
            compiled(torch.randn(5))
    finally:
        logger.removeHandler(handler)
    assert ids(compiled) == [] and capfd.readouterr().err == ""
    assert compiled(torch.ones(12)).shape == (3, 4) and len(compiled.programs) == 1


def test_errors_of_the_originals_own_tell_of_nothing_else() -> None:
    compiled = compile(lambda x: x @ torch.ones(4, 2))
    dense = compile(lambda x: (x + 1).view(2, 3))
    dense(torch.ones(2, 3))
    for model, x in ((compiled, torch.ones(2, 3)), (dense, torch.ones(2, 3).to_sparse())):
        with pytest.raises(Exception) as caught:
            model(x)
        assert caught.value.__context__ is None


def test_a_hook_may_supply_arguments_that_the_signature_wants() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    model = Sum().eval()
    model.register_forward_pre_hook(lambda module, args: (*args, torch.ones(3)))
    assert torch.equal(compile(model)(torch.ones(3)), torch.full((3,), 2.0))


# -- models that change ----------------------------------------------------------------------------


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[1].register_forward_hook(lambda module, args, out: out * 10),
        lambda m: m.register_forward_hook(lambda module, args, out: out * 10),
        lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 10,)),
        lambda m: m.append(nn.Tanh().eval()),
        lambda m: m.insert(1, nn.Tanh().eval()),
    ],
    ids=["inner", "outer", "before", "append", "insert"],
)
def test_hooks_and_modules_added_later_are_seen(change: Callable[[Any], Any]) -> None:
    model, x = _net(), torch.randn(2, 4)
    compiled = compile(model)
    plain = compiled(x)
    handle = change(model)
    torch.testing.assert_close(compiled(x), model(x))
    if hasattr(handle, "remove"):
        handle.remove()
        torch.testing.assert_close(compiled(x), plain)


def test_hooks_of_all_modules_are_seen() -> None:
    model, x = _net(), torch.randn(2, 4)
    compiled = compile(model)
    compiled(x)
    double = nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2)
    try:
        torch.testing.assert_close(compiled(x), model(x))
    finally:
        double.remove()
    torch.testing.assert_close(compiled(x), model(x))


class Counter(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.count, self.seen = how, 0, []
        self.register_buffer("state", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "number":
            self.count += 1
        elif self.how == "list":
            self.seen.append(x + 1)
        elif self.how == "buffer":
            self.state = self.state + x
        return x * (1 + self.count + len(self.seen)) + self.state


@pytest.mark.parametrize("how", ["number", "list", "buffer"])
def test_a_model_that_changes_its_attributes_runs_as_it_is(how: str) -> None:
    model, twin = Counter(how).eval(), Counter(how).eval()
    compiled = compile(model)
    for i in range(3):
        x = torch.full((2,), float(i))
        assert torch.equal(compiled(x), twin(x))
    assert (model.count, len(model.seen)) == (twin.count, len(twin.seen))
    assert torch.equal(model.state, twin.state)
    assert ids(compiled) == ["PLT-CAP-019"]


class Table(nn.Module):
    """Keeps a table for the length it met last, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.table = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.length != x.shape[0]:
            self.length, self.table = x.shape[0], torch.arange(x.shape[0]) * 2.0
        return x + self.table


def test_a_model_that_keeps_what_it_made_is_compiled_after_that() -> None:
    model, twin = Table().eval(), Table().eval()
    compiled = compile(model)
    for length in (3, 3, 5, 5, 3, 4):
        x = torch.randn(length)
        assert torch.equal(compiled(x), twin(x)) and model.length == twin.length
        assert len(compiled.programs) == 1 and ids(compiled) == []
    for length in (6, 7):  # its length changes too often
        x = torch.randn(length)
        assert torch.equal(compiled(x), twin(x)) and model.length == twin.length
    assert not compiled.programs and ids(compiled) == ["PLT-CAP-019"]


class Remembers(nn.Module):
    """A call with ``new`` notes something that later calls without it read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.note: Any = 0 if kind == "number" else torch.zeros(1)

    def forward(self, x: torch.Tensor, new: Any = None) -> torch.Tensor:
        if new is None:
            return x + self.note
        self.note = new.shape[0] if self.kind == "number" else new.sum()
        return x + 1


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_what_the_original_noted_reaches_compiled_calls(kind: str) -> None:
    model, twin = Remembers(kind).eval(), Remembers(kind).eval()
    compiled, x = compile(model), torch.randn(2)
    for new in (None, torch.ones(3), None, None, torch.ones(1), None, torch.ones(3), None, None):
        assert torch.equal(compiled(x, new), twin(x, new))
    assert compiled.programs


def test_lazy_modules_are_compiled_once_their_shapes_are_known() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU()).eval()
    compiled, x = compile(model), torch.randn(2, 4)
    first = compiled(x)
    torch.testing.assert_close(compiled(x), first)
    assert ids(compiled) == [] and len(compiled.programs) == 1


def test_a_compiled_function_that_calls_itself() -> None:
    global _power
    _power = compile(_double)
    assert torch.equal(_power(torch.ones(2), 5), torch.full((2,), 32.0))


def _double(x: torch.Tensor, n: int) -> torch.Tensor:
    return x if n == 0 else _power(x, n - 1) * 2


_power: Any = None


# -- options, files and the machine ----------------------------------------------------------------


def test_an_iterator_is_no_example() -> None:
    with pytest.raises(plait.InputError, match="example_inputs is a generator"):
        compile(_net(), example_inputs=(torch.randn(2, 4) for _ in range(1)))


def test_an_empty_pipeline_has_no_passes() -> None:
    model, x = _net(), torch.randn(2, 4)
    compiled = compile(model, pipeline="")
    torch.testing.assert_close(compiled(x), model(x))
    assert all(hasattr(s, "target") for s in compiled.plan.steps)


def test_saving_over_what_is_no_file(tmp_path: Any) -> None:
    compiled = compile(_net(), example_inputs=(torch.randn(2, 4),))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, why in ((tmp_path, "Is a directory"), (pipe, "not a regular file")):
        with pytest.raises(plait.FileError, match=f"PLT-SAV-003.*{why}"):
            compiled.save(path)
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


def test_a_file_with_a_pipeline_of_other_passes_is_one_clear_error(tmp_path: Any) -> None:
    path = tmp_path / "m.plait"
    compile(_net(), example_inputs=(torch.randn(2, 4),)).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    manifest["options"]["pipeline"] = "no-such-pass"
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(plait.FileError, match="PLT-SAV-005: .*no-such-pass"):
        plait.load(path)
