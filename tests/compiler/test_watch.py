"""Guards: memory says what the objects say, whatever happens to a model between two calls."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import plait
from plait.compiler import pipeline
from plait.compiler.dispatch import MAX_FLEETING
from plait.compiler.guards import quick, watch
from plait.compiler.guards.layout import dict_tag, tensor_layout
from plait.compiler.guards.watch import Structure, Watch, locate


class Net(nn.Module):
    """Parameters, buffers, a tied weight, a tensor as a plain attribute, five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.body[2].weight = self.body[0].weight
        self.register_buffer("table", torch.rand(2, 3))
        self.plain = torch.rand(4)
        self.volume = nn.Parameter(torch.rand(1, 2, 1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).mean((2, 3))
        return self.body(y) * self.plain + self.table.sum() + self.volume.mean()


class Scene:
    """A model under both kinds of check."""

    def __init__(self) -> None:
        self.net = Net().eval()
        self.look()

    def look(self) -> None:
        state = [*self.net.state_dict(), "plain"]
        where = {name: locate(self.net, name) for name in state}
        self.watch = Watch({name: place for name, place in where.items() if place})
        self.structure = Structure([self.net])

    def tensors(self) -> list[torch.Tensor]:
        return [*self.net.parameters(), *self.net.buffers(), self.net.plain]

    def agree(self) -> tuple[bool, bool]:
        """What both guards say, which is what the full checks say."""
        said = self.watch.changed(), self.structure.changed()
        trains = self.structure.trains
        assert said == (self.watch.full(), self.structure.full())
        assert trains == any(m.training for m in self.structure.modules)
        return said


def _hook(*_: Any) -> None:
    return None


def _step(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def _reload(net: nn.Module) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})


def _swap(tensor: torch.Tensor) -> None:
    other = tensor.detach().clone()
    other = nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other
    torch.utils.swap_tensors(tensor, other)


@torch.no_grad()
def _resize(tensor: torch.Tensor) -> None:
    if tensor.is_shared():
        return  # torch ends the process: such memory has no allocator
    if tensor.requires_grad:
        tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() + 4096)
    else:
        tensor.resize_(tensor.numel() + 64).resize_(2)


@torch.no_grad()
def _set(tensor: torch.Tensor) -> None:
    tensor.set_(torch.rand(tensor.shape))


@torch.no_grad()
def _in_place(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def _set_data(tensor: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor.data = value(tensor.data)


WITH_TENSOR: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": _in_place,
    "in place of a view": lambda t: _in_place(t.detach().view_as(t)),
    "data of its own": lambda t: _set_data(t, torch.clone),
    "data flipped": lambda t: _set_data(t, lambda d: d.permute(*range(d.ndim)[::-1])),
    "data cut": lambda t: _set_data(t, lambda d: d[:1]),
    "data shifted": lambda t: _set_data(t, lambda d: d[-1:]),
    "data of more dimensions": lambda t: _set_data(t, lambda d: d[None, None, None]),
    "data of another type": lambda t: _set_data(t, torch.Tensor.double),
    "the same data": lambda t: _set_data(t, lambda d: d.view_as(d)),
    "set_": _set,
    "resize_": _resize,
    "share_memory_": lambda t: t.share_memory_(),
    "swap_tensors": _swap,
    "requires_grad_": lambda t: t.requires_grad_(),
    "grad": lambda t: setattr(t, "grad", torch.ones_like(t)),
    "attribute of a tensor": lambda t: setattr(t, "note", 1),
}
WITH_NET: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda n: None,
    "collection": lambda n: gc.collect(),
    "optimizer": _step,
    "load_state_dict": _reload,
    "half": lambda n: n.half(),
    "to": lambda n: n.to(torch.float64),
    "parameter replaced": lambda n: setattr(n.conv, "bias", nn.Parameter(torch.ones(4))),
    "parameter in its table": lambda n: n.conv._parameters.update(bias=nn.Parameter(torch.ones(4))),
    "parameter put back": lambda n: setattr(n.conv, "bias", n.conv.bias),
    "parameter taken": lambda n: n.body[0]._parameters.pop("bias", None),
    "parameter added": lambda n: n.register_parameter("more", nn.Parameter(torch.ones(1))),
    "tables of parameters": lambda n: setattr(n.conv, "_parameters", dict(n.conv._parameters)),
    "buffer replaced": lambda n: setattr(n, "table", torch.rand(2, 3)),
    "buffer registered": lambda n: n.register_buffer("more_table", torch.rand(1)),
    "tables of buffers": lambda n: vars(n).update(_buffers=dict(n._buffers)),
    "plain replaced": lambda n: setattr(n, "plain", torch.rand(4)),
    "module replaced": lambda n: setattr(n, "norm", nn.BatchNorm2d(4).eval()),
    "module in __dict__": lambda n: n.__dict__["_modules"].update(norm=nn.Identity().eval()),
    "module added": lambda n: n.add_module("extra", nn.Identity().eval()),
    "modules cleared": lambda n: n.body._modules.clear(),
    "tables of modules": lambda n: setattr(n.body, "_modules", dict(n.body._modules)),
    "train": lambda n: n.train(),
    "eval": lambda n: n.eval(),
    "train a leaf": lambda n: n.norm.train(),
    "training stored": lambda n: setattr(n.norm, "training", True),
    "training in __dict__": lambda n: n.norm.__dict__.__setitem__("training", True),
    "object's store": lambda n: object.__setattr__(n.norm, "training", False),
    "vars updated": lambda n: vars(n).update(training=True),
    "attribute": lambda n: setattr(n.conv, "count", getattr(n.conv, "count", 0) + 1),
    "attribute in __dict__": lambda n: n.conv.__dict__.update(other=object()),
    "attribute deleted": lambda n: vars(n.conv).pop("count", None),
    "hook": lambda n: n.norm.register_forward_hook(_hook),
    "hook before": lambda n: n.register_forward_pre_hook(_hook, prepend=True),
    "hook come and gone": lambda n: n.conv.register_forward_hook(_hook).remove(),
    "hooks emptied": lambda n: n.norm._forward_hooks.clear(),
    "hooks moved": lambda n: [
        n.norm._forward_hooks.move_to_end(k) for k in [*n.norm._forward_hooks][:1]
    ],
    "hooks replaced": lambda n: setattr(n.norm, "_forward_hooks", type(n.norm._forward_hooks)()),
    "global hook": lambda n: nn.modules.module.register_module_forward_hook(_hook).remove(),
    "copied": lambda n: copy.deepcopy(n)(torch.rand(1, 3, 8, 8)),
    "pickled": lambda n: _in_place(pickle.loads(pickle.dumps(n)).conv.weight),
    "state": lambda n: n.conv.__setstate__(dict(vars(n.conv))),
    "called": lambda n: n(torch.rand(1, 3, 8, 8)),
}


def test_memory_is_read_here() -> None:
    assert tensor_layout() is not None
    scene = Scene()
    assert len(quick.table([vars(scene.net)], scene.tensors()) or ()) or dict_tag() is None


@pytest.mark.parametrize("name", WITH_TENSOR)
@pytest.mark.parametrize("which", range(11))
def test_each_change_of_a_tensor(name: str, which: int) -> None:
    scene = Scene()
    assert scene.agree() == scene.agree() == (False, False)
    WITH_TENSOR[name](scene.tensors()[which])
    harmless = ("the same data", "requires_grad_", "grad", "attribute of a tensor")
    told, _ = scene.agree()
    if name in harmless or (name != "in place" and scene.tensors()[which].ndim == 0):
        return
    assert told or name in ("data flipped", "data cut", "data shifted", "share_memory_")


NOTICED = {
    "watch": ("optimizer", "load_state_dict", "half", "to", "parameter replaced", "parameter taken")
    + ("parameter in its table", "buffer replaced", "plain replaced"),
    "structure": ("tables of parameters", "tables of buffers", "tables of modules", "module added")
    + ("module replaced", "module in __dict__", "modules cleared", "hook", "hook before")
    + ("hooks replaced",),
}


@pytest.mark.parametrize("name", WITH_NET)
def test_each_change_of_a_model(name: str) -> None:
    scene = Scene()
    assert scene.agree() == scene.agree() == (False, False)
    WITH_NET[name](scene.net)
    weights, modules = scene.agree()
    assert weights == (name in NOTICED["watch"])
    assert modules == (name in NOTICED["structure"])
    assert scene.structure.trains == (
        name in ("train", "train a leaf", "training stored", "training in __dict__", "vars updated")
    )
    for _ in range(3):
        assert scene.agree() == (weights, modules)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_memory_says_what_objects_say(data: st.DataObject) -> None:
    scene = Scene()
    calls = st.sampled_from([*WITH_TENSOR, *WITH_NET])
    for name in data.draw(st.lists(calls, max_size=8)):
        try:
            if name in WITH_NET:
                WITH_NET[name](scene.net)
            else:
                tensors = scene.tensors()
                WITH_TENSOR[name](tensors[data.draw(st.integers(0, len(tensors) - 1))])
        except (RuntimeError, ValueError, AttributeError, TypeError, IndexError, KeyError):
            pass  # a change that the changes before it made impossible, perhaps half done
        if data.draw(st.booleans()):
            told = scene.agree()
            if any(told) and data.draw(st.booleans()):
                scene.look()
    scene.agree()


def test_full_checks_are_spared() -> None:
    scene = Scene()
    scene.agree()
    full = 0

    def count() -> bool:
        nonlocal full
        full += 1
        return False

    tensors = scene.tensors()
    changed = quick.quick(count, lambda: quick.table([vars(scene.net)], tensors))
    for _ in range(5):
        assert not changed()
    assert full == (1 if dict_tag() is not None else 5)
    scene.net.count = 1  # something else in the same dictionary: asked once, then quick again
    for _ in range(5):
        assert not changed()
    assert full == (2 if dict_tag() is not None else 10)


def test_what_has_no_place_in_a_table_is_asked() -> None:
    wide = torch.rand(1, 1, 1, 1, 1, 1, 3)  # more dimensions than fit into the tensor itself
    owner = {"wide": wide, "plain": torch.rand(3)}
    look = Watch({name: (owner, name) for name in owner})
    assert not look.changed() and not look.changed()
    wide.add_(1)
    assert look.changed() and look.changed() and look.full()
    look.snapshot()
    assert not look.changed() and not look.changed()
    owner["plain"].add_(1)
    assert look.changed()


def test_an_inference_tensor_is_watched() -> None:
    with torch.inference_mode():
        owner = {"a": torch.rand(3)}
    look = Watch({"a": (owner, "a")})
    assert not look.changed() and not look.changed()
    owner["a"].data = torch.rand(3)
    assert look.changed() and look.full()


@pytest.mark.parametrize("shape", [(1,), (3,), (50, 70), (100, 4, 4), (5, 0), ()])
@pytest.mark.parametrize("known", [True, False], ids=["words", "asked"])
def test_what_is_written_to_an_inference_tensor_is_noticed(
    shape: tuple[int, ...], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(quick, "tensor_layout", lambda: None)
    with torch.inference_mode():
        owner = {
            "a": torch.rand(shape),
            "b": torch.rand(4, 6).t()[1:],
            "c": torch.rand(2, 2).half(),
        }
    look = Watch({name: (owner, name) for name in owner})
    assert look.uncounted and not look.changed() and not look.changed()
    for tensor in owner.values():
        with torch.inference_mode():
            tensor.mul_(2)
        assert look.changed() == look.full() == bool(tensor.numel())
        look.snapshot()
        assert not look.changed() and not look.changed()
    if len(shape) == 3:  # one of many experts
        with torch.inference_mode():
            owner["a"][37] += 1
        assert look.changed() and look.full()


def test_a_model_made_in_inference_mode_may_load_another_state() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    compiled, x = plait.compile(model, tune="off"), torch.rand(4, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), model(x))
            with torch.inference_mode():
                model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
            torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled.programs) == 1
    assert "PLT-CAP-028" in [r.id for r in compiled.remarks]


@pytest.mark.parametrize("known", [True, False], ids=["words", "asked"])
def test_what_is_written_through_data_is_noticed(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(quick, "tensor_layout", lambda: None)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    compiled, x = plait.compile(model, tune="off"), torch.rand(4, 8)
    with torch.no_grad():
        compiled(x)
        model[0].weight.data += 1  # as adapters are merged
        torch.testing.assert_close(compiled(x), model(x))
        model[2].bias.data.copy_(torch.rand(3))
        torch.testing.assert_close(compiled(x), model(x))
    experts = torch.rand(64, 4, 5)
    owner = {"experts": experts}
    look = Watch({"experts": (owner, "experts")})
    for one in (0, 31, 63):
        assert not look.changed() and not look.changed()
        experts.data[one] *= 2
        assert look.changed() and look.full()
        look.snapshot()


def test_without_layouts_objects_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quick, watch):
        monkeypatch.setattr(module, "dict_tag", lambda: None)
    monkeypatch.setattr(quick, "tensor_layout", lambda: None)
    assert quick.limits() == "tensors and dictionaries"
    for name, change in WITH_NET.items():
        scene = Scene()
        assert scene.agree() == scene.agree() == (False, False)
        change(scene.net)
        weights, modules = scene.agree()
        assert (weights, modules) == (name in NOTICED["watch"], name in NOTICED["structure"])


def test_tensors_are_read_where_dictionaries_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quick, watch):
        monkeypatch.setattr(module, "dict_tag", lambda: None)
    for name, change in WITH_NET.items():
        scene = Scene()
        assert scene.agree() == scene.agree() == (False, False)
        change(scene.net)
        assert scene.agree() == (name in NOTICED["watch"], name in NOTICED["structure"])


def test_a_swapped_tensor_is_not_read_after_its_end() -> None:
    scene = Scene()
    scene.agree()
    for _ in range(20):
        _swap(scene.net.conv.weight)  # what the table knew is freed here
        junk = [torch.rand(3) for _ in range(50)]
        assert scene.agree()[0]
        scene.watch.snapshot()
        assert not scene.agree()[0] and not scene.agree()[0]
        del junk


def test_a_change_is_noticed_beside_other_threads() -> None:
    scene = Scene()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            scene.watch.changed()
            scene.structure.changed()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for k in range(200):
            scene.net.conv.count = k
            assert not scene.structure.changed()
            _in_place(scene.net.conv.bias)
            assert scene.watch.changed()
            scene.watch.snapshot()
            scene.net.norm.training = True
            assert not scene.structure.changed() and scene.structure.trains
            scene.net.norm.training = False
            assert not scene.structure.changed() and not scene.structure.trains
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_what_changes_while_it_is_compiled_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(3, 3).eval(), torch.ones(2, 3)
    compiled = plait.compile(model, tune="off")
    real, begun = pipeline._make, 0

    def make(*args: Any) -> Any:
        """Writes to what was read already, where another thread might."""
        nonlocal begun
        begun += 1
        made = real(*args)
        if begun in (1, 3):
            model.weight.add_(1)
        return made

    monkeypatch.setattr(pipeline, "_make", make)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            assert begun == 2
        model.bias.add_(1)
        for expected in (3, 4, 4):
            compiled(x)
            assert begun == expected
        torch.testing.assert_close(compiled(x), model(x))


def test_who_waits_for_a_capture_in_another_thread_forgets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    model, x = Scaled().eval(), torch.ones(3)
    compiled = plait.compile(model, tune="off")
    compiled(x)
    (program,) = compiled.programs
    dispatcher = compiled._dispatcher
    asked, changed = threading.Semaphore(0), dispatcher._structure.changed

    def asks() -> bool:
        try:
            return changed()
        finally:
            asked.release()

    monkeypatch.setattr(dispatcher._structure, "changed", asks)
    threads = [threading.Thread(target=compiled, args=(x,)) for _ in range(MAX_FLEETING + 1)]
    with dispatcher._lock:
        model.scale = 3.0  # as a capture does with settings of Hugging Face's
        for thread in threads:
            thread.start()
            assert asked.acquire(timeout=300)
        model.scale = 2.0
    for thread in threads:
        thread.join()
    assert list(compiled.programs) == [program]
    assert "PLT-CAP-026" not in {r.id for r in compiled.remarks}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.weight, "data", m.weight.data.t()),
        lambda m: setattr(m.weight, "data", m.weight.data.flip(0)),
        lambda m: setattr(m, "_parameters", {"weight": m.weight, "bias": nn.Parameter(m.bias + 1)}),
        lambda m: m.register_forward_hook(lambda *a: a[-1] + 1),
        lambda m: m.weight.detach().add_(1),
    ],
    ids=["transposed", "flipped", "table", "hook", "in-place"],
)
@torch.no_grad()
def test_answers_follow_the_model(change: Callable[[nn.Linear], Any]) -> None:
    model = nn.Linear(4, 4).eval()
    x = torch.rand(3, 4)
    compiled = plait.compile(model)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    change(model)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_slow_guards_are_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "tensor_layout", lambda: None)
    model = nn.Linear(3, 3).eval()
    compiled = plait.compile(model)
    compiled(torch.rand(1, 3))
    (remark,) = [r for r in compiled.remarks if r.id == "PLT-CAP-022"]
    assert remark.reason.startswith("changes of tensors cannot")
    model.weight.mul_(2)
    torch.testing.assert_close(compiled(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_data_that_moved_within_its_memory_is_noticed() -> None:
    whole = torch.rand(8)
    owner = {"part": whole[:4]}
    look = Watch({"part": (owner, "part")})
    assert not look.changed() and not look.changed()
    owner["part"].data = whole[4:]  # the same storage, sizes, strides and version
    assert look.changed() and look.full()
