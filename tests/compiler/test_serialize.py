"""Saved programs: round trips without the model's code, and every way a file can be bad."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import plait
from plait.runtime.plan import Plan


@dataclass
class Answer:
    value: torch.Tensor
    rows: int
    label: str = "a"


class Net(nn.Module):
    """Most of what a file must hold: tied weights, state, complex constants, cond, a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.Sequential(nn.Conv1d(1, 4, 1), nn.BatchNorm1d(4))
        self.unread = nn.Linear(2, 2)
        self.register_buffer("plain", torch.ones(4), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.arange(2.0)))

    def forward(self, x: torch.Tensor, *, options: dict[str, Any]) -> Answer:
        self.count += 1
        # Whether torch takes a batch as large is asked when the norm is folded, after loading too.
        y = self.b(self.norm(self.a(x * self.plain)[:, None]).sum(1)) * options["scale"]
        y = torch.cond(self.count > 2, lambda v: v + 100, lambda v: v + 1, (y,))
        turned = torch.view_as_real(torch.view_as_complex(y.view(-1, 2, 2)) * self.turn)
        return Answer(turned.flatten(1), x.shape[0])


OPTIONS = {"scale": 0.5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    torch.manual_seed(0)
    model = Net().eval()
    compiled = plait.compile(model, tune="off", dynamic_shapes={"x": {0: Dim("n", max=50)}})
    compiled(torch.randn(3, 4), options=OPTIONS)
    path = tmp_path_factory.mktemp("saved") / "net.plait"
    compiled.save(path)
    return model, path


def test_round_trip(saved: tuple[Net, Path]) -> None:
    model, path = saved
    loaded = plait.load(path)
    assert loaded.count.item() == 1
    for n in (3, 5):
        x = torch.randn(n, 4)
        got, want = loaded(x, options=OPTIONS), model(x, options=OPTIONS)
        assert type(got) is Answer and (got.rows, got.label) == (n, "a")
        torch.testing.assert_close(got.value, want.value)
    assert loaded.count.item() == model.count.item() == 3
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded.a.weight, model.a.weight)
    with pytest.raises(plait.InputError, match=r"PLT-INP-003.*no_grad"):
        loaded(x.requires_grad_(), options=OPTIONS)


def test_saving_again_after_loading(saved: tuple[Net, Path], tmp_path: Path) -> None:
    first = plait.load(saved[1])
    first.save(tmp_path / "again.plait")
    second = plait.load(tmp_path / "again.plait")
    x = torch.randn(4, 4)
    first.count.zero_()
    second.count.zero_()
    torch.testing.assert_close(first(x, options=OPTIONS).value, second(x, options=OPTIONS).value)


def test_loads_without_the_models_code(saved: tuple[Net, Path]) -> None:
    code = f"""
import plait, torch
loaded = plait.load({str(saved[1])!r})
out = loaded(torch.ones(2, 4), options={{"scale": 0.5}})
assert type(out).__name__ == "Record", type(out)
assert out.rows == 2 and out.value.shape == (2, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_stored_once_and_without_pickle(saved: tuple[Net, Path]) -> None:
    with zipfile.ZipFile(saved[1]) as archive:
        names = archive.namelist()
        weights = archive.read("weights.safetensors")
    assert not [n for n in names if n.endswith((".pkl", ".pt"))]
    floats = 16 + 4 + 4 + 1 + 4 + 8 + 18 + 4 + 6
    assert len(weights) < floats * 4 + 1000


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((torch.randn(3, 5),), {"options": OPTIONS}, "'x': expected dimension 1 to be 4"),
        ((torch.randn(60, 4),), {"options": OPTIONS}, "from 2 to 50, got 60"),
        ((torch.randn(3, 4).double(),), {"options": OPTIONS}, "'x': expected float32"),
        ((torch.randn(3, 4),), {"options": {"scale": 0.25}}, "expected"),
        ((torch.randn(3, 4),), {}, "missing a required"),
        ((), {"y": 3, "options": OPTIONS}, "missing a required|unexpected"),
    ],
)
def test_wrong_inputs(saved: tuple[Net, Path], args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(plait.InputError, match=text):
        plait.load(saved[1])(*args, **kwargs)


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "text": b"not a program",
        "half": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "no end": content[:-30],
    }


@pytest.mark.parametrize("how", ["empty", "text", "half", "flipped", "no end"])
def test_damaged_files(saved: tuple[Net, Path], tmp_path: Path, how: str) -> None:
    path = tmp_path / "bad.plait"
    path.write_bytes(damaged(saved[1].read_bytes())[how])
    with pytest.raises(plait.FileError, match=r"PLT-SAV-004.*bad\.plait"):
        plait.load(path)


def test_altered_member_is_noticed(saved: tuple[Net, Path], tmp_path: Path) -> None:
    path = tmp_path / "altered.plait"
    with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(
                name, content.replace(b"aten::", b"bten::") if "program" in name else content
            )
    with pytest.raises(plait.FileError, match="was altered"):
        plait.load(path)


def test_other_zip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", '{"format": "something else"}')
    with pytest.raises(plait.FileError, match="not a saved plait program"):
        plait.load(path)
    with pytest.raises(plait.FileError, match="No such file"):
        plait.load(tmp_path / "none.plait")


def test_nothing_to_save(tmp_path: Path) -> None:
    path = tmp_path / "x.plait"
    with pytest.raises(plait.FileError, match="PLT-SAV-001"):
        plait.compile(Net()).save(path)
    assert not path.exists()


def test_failed_save_leaves_the_old_file(
    saved: tuple[Net, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.plait"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(plait.FileError, match="No space left"):
        plait.load(saved[1]).save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_missing_directory(saved: tuple[Net, Path], tmp_path: Path) -> None:
    with pytest.raises(plait.FileError, match="No such file"):
        plait.load(saved[1]).save(tmp_path / "no" / "x.plait")


def test_a_saved_file_holds_a_readable_plan_and_loading_builds_no_kernel(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=x)
        compiled.save(tmp_path / "model.plait")
        with zipfile.ZipFile(tmp_path / "model.plait") as archive:
            plan = Plan.from_json(archive.read("program0/plan.json").decode())
        assert plan.to_json() == compiled.plan.to_json()
        loaded = plait.load(tmp_path / "model.plait")
        assert torch.equal(loaded(x), compiled(x))
    assert loaded.programs[0].executable.kernels.built == 0


# -- weights that change ---------------------------------------------------------------------------


class Pair(nn.Module):
    """A product, whose weight is packed, and branches that are graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.router = plait.Router([nn.Linear(8, 4), nn.Linear(8, 4)], _labels, combine="sum")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(self.first(x))


def _labels(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0] > 0).long()


@pytest.mark.parametrize("budget", [None, "100%"])
def test_a_loaded_program_takes_new_weights(tmp_path: Path, budget: str | None) -> None:
    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(5, 4)
    plait.compile(model, tune="off", example_inputs=(x,)).save(tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait", weight_budget=budget)
    with torch.no_grad():
        for assign in (False, True):
            for tensor in model.state_dict().values():
                tensor.mul_(1.5) if tensor.is_floating_point() else None
            state = {
                k: v.clone() for k, v in model.state_dict().items() if k in loaded.state_dict()
            }
            loaded.load_state_dict(state, assign=assign)
            torch.testing.assert_close(loaded(x), model(x))
        loaded.save(tmp_path / "again.plait")
        torch.testing.assert_close(plait.load(tmp_path / "again.plait")(x), model(x))
        loaded.double()
        for _ in range(2):
            with pytest.raises(plait.InputError, match="PLT-INP-007"):
                loaded(x)
        loaded.float()
        torch.testing.assert_close(loaded(x), model(x))


def test_what_is_saved_has_the_weights_of_now(tmp_path: Path) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    compiled = plait.compile(model, tune="off", example_inputs=(x,))
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer, "weight", nn.Parameter(torch.ones(4, 4))),
    ):
        with torch.no_grad():
            change()
            compiled.save(tmp_path / "m.plait")
            torch.testing.assert_close(plait.load(tmp_path / "m.plait")(x), model(x))
    model[1] = nn.Tanh()
    with pytest.raises(plait.FileError, match="PLT-SAV-001"):
        compiled.save(tmp_path / "m.plait")


def test_loaded_programs_stay_and_are_not_made_into_others(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    plait.compile(model, tune="off", example_inputs=(x,)).save(tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    try:
        torch.set_default_dtype(torch.float64)
        torch.testing.assert_close(loaded(x), model(x).detach())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        torch.testing.assert_close(loaded(x), model(x).detach())
    loaded.recompile()
    torch.testing.assert_close(loaded(x), model(x).detach())
    for use in (
        copy.deepcopy,
        pickle.dumps,
        plait.compile,
        lambda m: plait.profile(m, [(x,)]),
        lambda m: m.register_forward_hook(print),
    ):
        with pytest.raises(plait.InputError, match="PLT-INP-003: .*cannot be"):
            use(loaded)
