"""plait.compile: forms of use, recompilation, and when the original runs instead."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import plait
from plait.compiler.guards import keys

compile = functools.partial(plait.compile, tune="off")


def ids(compiled: plait.Compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture"]


def programs(compiled: plait.Compiled) -> int:
    return compiled.explain().count("program ")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -- forms -----------------------------------------------------------------------------------------


def test_module_instance(no_warnings: None) -> None:
    model, x = net(), torch.randn(5, 4)
    compiled = compile(model)
    assert compiled.plan is None and compiled.graph is None
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.plan is not None
    assert ids(compiled) == []


def test_function_and_decorators() -> None:
    @plait.compile
    def bare(x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return x * 2

    @plait.compile(tune="off")
    def with_options(x: torch.Tensor, y: int = 3) -> torch.Tensor:
        return x * y

    x = torch.randn(3)
    torch.testing.assert_close(bare(x), x * 2)
    torch.testing.assert_close(with_options(x), x * 3)
    torch.testing.assert_close(with_options(x, y=4), x * 4)
    assert bare.__name__ == "bare" and bare.__doc__ == "Doubles."


def test_class_decorator_compiles_instances() -> None:
    @plait.compile(tune="off")
    class Net(nn.Module):
        """A net."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    net = Net(4).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(net(x), net.linear(x))
    assert isinstance(net, plait.Compiled)
    assert isinstance(net, Net) and issubclass(Net, nn.Module)
    assert Net.__name__ == "Net" and Net.__doc__ == "A net."


def test_subclass_of_a_compiled_class_is_an_ordinary_class() -> None:
    class Base(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Derived(compile(Base)):  # type: ignore[misc]
        pass

    assert not isinstance(Derived(), plait.Compiled)
    assert torch.equal(Derived()(torch.zeros(1)), torch.ones(1))


def test_method_in_a_class_body() -> None:
    class Scaler:
        factor = 3

        @plait.compile(tune="off")
        def scale(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    with warnings.catch_warnings(record=True):
        assert torch.equal(Scaler().scale(torch.ones(2)), torch.full((2,), 3.0))


def test_example_inputs_compile_eagerly() -> None:
    compiled = compile(net(), example_inputs=(torch.randn(2, 4),))
    assert compiled.plan is not None
    by_name = compile(net(), example_inputs={"input": torch.randn(2, 4)})
    assert by_name.plan is not None


def test_compiling_twice_compiles_the_original() -> None:
    model = net()
    assert compile(compile(model)).original is model


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plait.compile(net(), tune="slow"), "tune='slow'"),
        (lambda: plait.compile(net(), pipeline="no-such-pass"), "no-such-pass"),
        (lambda: plait.compile(net(), pipeline="normalize{"), "PLT-OPT-002"),
        (lambda: plait.compile(net(), pipeline="prefetch-weights,speculate-routes"), "behind"),
        (lambda: plait.compile(3), "int"),  # type: ignore[arg-type]
        (lambda: plait.compile(dict), "dict"),  # type: ignore[arg-type]
        (lambda: plait.compile(nn.ReLU, example_inputs=(1,)), "class"),
    ],
)
def test_options_without_meaning(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(plait.OptionError, match=text):
        call()


def test_wrong_example_inputs() -> None:
    with pytest.raises(plait.InputError, match="example_inputs"):
        compile(net(), example_inputs=(torch.randn(2, 5),))
    with pytest.raises(plait.InputError, match="missing 1 required"):
        compile(lambda x, y: x + y, example_inputs=(torch.randn(2),))


# -- arguments and results -------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    name: str = ""


def test_containers_dataclasses_none_and_scalars() -> None:
    def function(
        batch: dict[str, Any], scale: float, mask: Any = None, *, flag: bool = False
    ) -> Any:
        x = batch["x"] * scale + sum(batch["rest"])
        if mask is not None:
            x = x * mask
        return Output(x, (x + 1, x.sum()), name="yes" if flag else "no")

    compiled = compile(function)
    batch = {"x": torch.randn(3), "rest": [torch.randn(3), torch.randn(3)]}
    for args, kwargs in [
        ((batch, 2.0), {}),
        ((batch, 2.5), {"flag": True}),
        ((batch, 2.0, torch.ones(3)), {}),
        ((batch,), {"scale": 2.0, "mask": None}),
    ]:
        got, want = compiled(*args, **kwargs), function(*args, **kwargs)
        assert type(got) is Output and got.name == want.name
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.hidden, want.hidden)


def test_keyword_order_and_position_share_one_program() -> None:
    compiled = compile(lambda x, y: x - y)
    a, b = torch.randn(3), torch.randn(3)
    for result in (compiled(a, b), compiled(a, y=b), compiled(y=b, x=a), compiled(x=a, y=b)):
        torch.testing.assert_close(result, a - b)
    assert programs(compiled) == 1


def test_scalars_are_guarded_by_type_and_value() -> None:
    compiled = compile(lambda x, s: x * s)
    x = torch.ones(2, dtype=torch.int64)
    for s in (2, 2.0, True, 3):
        got, want = compiled(x, s), x * s
        assert got.dtype == want.dtype and torch.equal(got, want)
    y = torch.ones(2)
    sign = compile(lambda x, s: x / s)
    assert sign(y, 0.0)[0] > 0 and sign(y, -0.0)[0] < 0


def test_result_that_is_an_input_or_a_constant() -> None:
    def function(x: torch.Tensor) -> Any:
        return x, 3, None, x + 1

    x = torch.randn(2)
    got = compile(function)(x)
    assert torch.equal(got[0], x) and got[1:3] == (3, None) and torch.equal(got[3], x + 1)


def test_strided_inputs() -> None:
    compiled = compile(lambda x: (x + 1).sum(0))
    x = torch.randn(4, 6)
    compiled(x)
    for view in (torch.randn(6, 4).t(), torch.randn(8, 6)[::2], torch.randn(6).expand(4, 6)):
        torch.testing.assert_close(compiled(view), (view + 1).sum(0))


def test_errors_of_the_model_stay_the_models() -> None:
    compiled = compile(net())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compiled(torch.randn(2, 5))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        compiled()
    assert ids(compiled) == []


# -- shapes ----------------------------------------------------------------------------------------


def test_second_size_makes_the_dimension_dynamic() -> None:
    model = net()
    compiled = compile(model)
    for n in (5, 7, 9, 100, 3):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))
    assert programs(compiled) == 2
    assert ids(compiled) == ["PLT-CAP-002"]


def test_sizes_zero_and_one_have_programs_of_their_own() -> None:
    model = net()
    compiled = compile(model)
    for n in (1, 4, 0, 6, 1, 2):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))


def test_size_one_broadcasts_as_in_eager() -> None:
    compiled = compile(lambda x, y: x + y)
    for n, m in ((3, 3), (5, 5), (1, 5), (5, 1), (1, 1), (2, 2)):
        x, y = torch.randn(n, 2), torch.randn(m, 2)
        torch.testing.assert_close(compiled(x, y), x + y)


def test_explicit_dynamic_shapes_need_one_compilation() -> None:
    model = net()
    batch = Dim("batch", max=64)
    compiled = compile(model, dynamic_shapes={"input": {0: batch}})
    for n in (5, 7, 64):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))
    assert programs(compiled) == 1
    with pytest.raises(plait.InputError, match="'input'.*to 64, got 65"):
        compiled(torch.randn(65, 4))


def test_example_of_batch_one_with_declared_batch() -> None:
    model = net()
    compiled = compile(
        model, example_inputs=(torch.randn(1, 4),), dynamic_shapes=({0: Dim("batch", min=1)},)
    )
    made = programs(compiled)
    for n in (1, 2, 9):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))
    assert programs(compiled) == made == 2


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"nope": {0: Dim.AUTO}}, "nope"),
        ({"input": {5: Dim.AUTO}}, "no dimension 5"),
        ({"input": {0: 3}}, "dimension 0 to be 3, got 2"),
        (3, "int"),
    ],
)
def test_dynamic_shapes_without_meaning(shapes: Any, text: str) -> None:
    with pytest.raises(plait.InputError, match=text):
        compile(net(), dynamic_shapes=shapes)(torch.randn(2, 4))


def test_branch_on_size_recompiles() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] > 4 else x - 1

    compiled = compile(function)
    for n in (6, 8, 3, 2, 9):
        x = torch.randn(n)
        torch.testing.assert_close(compiled(x), function(x))


def test_number_of_programs_is_bounded() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for n in range(2, 20):  # every size takes another path
            if x.shape[0] == n:
                return x + n
        return x

    compiled = compile(function)
    with pytest.warns(UserWarning, match="PLT-CAP-013"):
        for n in range(2, 18):
            x = torch.randn(n)
            torch.testing.assert_close(compiled(x), function(x))
    assert programs(compiled) <= 8


def test_no_thread_runs_the_model_while_another_traces_it() -> None:
    traced, ran = threading.Event(), threading.Event()

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not traced.is_set():
                traced.set()
                ran.wait(0.2)  # the other thread's call, if that did not wait for the trace
            return super().forward(x)

    model, found = Model(2, 3).eval(), []
    compiled = compile(model)

    def other() -> None:
        traced.wait()
        found.append(compiled(torch.ones(1, 2, requires_grad=True)))
        ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    torch.testing.assert_close(compiled(torch.zeros(1, 2))[0], model.bias)
    thread.join()
    torch.testing.assert_close(found[0], model(torch.ones(1, 2)))


def test_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_VALUES", (((float,), 1), ((int, float), 2)))

    def function(x: torch.Tensor, by: float, wide: bool) -> torch.Tensor:
        return x * by if wide else x

    compiled, x = compile(function), torch.randn(3)
    with pytest.warns(UserWarning, match="PLT-CAP-013"):
        for by, expected in ((0.5, 1), (1.5, 1), (3, 2), (4, 3), (5, 3), (0.5, 3)):
            torch.testing.assert_close(compiled(x, by, True), function(x, by, True))
            assert programs(compiled) == expected
    compiled(x, 0.5, False)
    assert programs(compiled) == 4


# -- when the original runs ------------------------------------------------------------------------


def test_gradients_run_the_original_and_are_said_once() -> None:
    model = net()
    compiled = compile(model)
    with pytest.warns(UserWarning, match="PLT-CAP-003") as caught:
        for _ in range(3):
            x = torch.randn(2, 4, requires_grad=True)
            compiled(x).sum().backward()
            assert x.grad is not None and model[0].weight.grad is not None
    assert len([w for w in caught if "PLT-CAP-003" in str(w.message)]) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert ids(compiled) == ["PLT-CAP-003"]


def test_training_mode_runs_the_original() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compiled = compile(model)
    before = model[1].running_mean.clone()
    with pytest.warns(UserWarning, match="PLT-CAP-016"):
        compiled(torch.randn(8, 4))
    assert not torch.equal(model[1].running_mean, before)
    x = torch.randn(8, 4)
    torch.testing.assert_close(compiled.eval()(x), model(x))
    model[1].train()  # a part of it is enough
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


def test_what_cannot_be_captured_runs_with_one_remark() -> None:
    weight = nn.Parameter(torch.ones(2), requires_grad=False)  # no argument decides alone

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * weight
        return y if y.sum() > 0 else -y

    compiled = compile(function)
    with pytest.warns(UserWarning, match="PLT-CAP-001"):
        assert torch.equal(compiled(-torch.ones(2)), torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(torch.ones(2)), torch.ones(2))
    (remark,) = [r for r in compiled.remarks if r.id == "PLT-CAP-001"]
    assert remark.reason and "torch.cond" in remark.hint


def test_failure_of_code_generation_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no kernel today")

    monkeypatch.setattr("plait.compiler.pipeline.compile_graph", fail)
    model, x = net(), torch.randn(2, 4)
    compiled = compile(model)
    with pytest.warns(UserWarning, match="PLT-CAP-015.*no kernel today"):
        torch.testing.assert_close(compiled(x), model(x))
    monkeypatch.setenv("PLAIT_DEBUG", "1")
    with pytest.raises(ValueError, match="no kernel today"):
        compile(model)(x)


def test_opaque_arguments_run_the_original_and_are_not_kept() -> None:
    class Thing:
        value = 2

    compiled = compile(lambda x, thing: x * thing.value)
    with pytest.warns(UserWarning, match="PLT-CAP-009"):
        assert torch.equal(compiled(torch.ones(2), Thing()), torch.full((2,), 2.0))
    Thing.value = 3
    assert torch.equal(compiled(torch.ones(2), Thing()), torch.full((2,), 3.0))


def test_autocast_is_part_of_what_a_program_is_made_for() -> None:
    model, x = net(), torch.randn(3, 4)
    compiled = compile(model)
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == model(x).dtype == torch.bfloat16
    assert compiled(x).dtype == torch.float32


@pytest.mark.parametrize("made", ["all", "some"])
def test_weights_made_in_inference_mode_are_captured_in_any_mode(made: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    with torch.inference_mode():
        model[0] = nn.Linear(4, 4)
        if made == "all":
            model[2] = nn.BatchNorm1d(4)
    compiled, x = compile(model.eval()), torch.randn(3, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), model(x))
    assert [program.calls for program in compiled.programs] == [2]


def test_inference_mode_and_ordinary_mode_share_programs() -> None:
    model, x = net(), torch.randn(3, 4)
    compiled = compile(model)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x).detach())
    assert programs(compiled) == 1


def test_inside_torch_export_the_original_is_traced() -> None:
    compiled = compile(net())
    program = torch.export.export(nn.Sequential(compiled.original), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    torch.testing.assert_close(program.module()(x), compiled(x))


# -- the rest --------------------------------------------------------------------------------------


def test_explain_tells_inputs_and_remarks() -> None:
    compiled = compile(net())
    assert "nothing compiled yet" in compiled.explain()
    compiled(torch.randn(2, 4))
    compiled(torch.randn(3, 4))
    text = compiled.explain()
    assert "input: float32[2, 4] on cpu" in text and "PLT-CAP-002" in text


def test_recompile_sees_changed_attributes() -> None:
    class Scaled(nn.Module):
        scale = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    compiled = compile(Scaled().eval())
    assert compiled(torch.ones(1)).item() == 2
    compiled.scale = 3.0
    compiled.recompile()
    assert compiled(torch.ones(1)).item() == 3


def test_threads_share_programs() -> None:
    model = net()
    compiled = compile(model)
    failures: list[BaseException] = []
    inputs = [[torch.randn(n, 4) for n in (2, 3, 4, 5)] for _ in range(4)]
    expected = [[model(x).detach() for x in row] for row in inputs]

    def work(row: int) -> None:
        try:
            for _ in range(20):
                for x, want in zip(inputs[row], expected[row], strict=True):
                    torch.testing.assert_close(compiled(x), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert programs(compiled) == 2


def test_importing_the_package_loads_no_torch() -> None:
    code = "import plait, sys; assert 'torch' not in sys.modules; print(plait.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
