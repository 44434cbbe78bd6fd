"""Profiles as files and from the command line: everything kept, every damage named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner, Result

import plait
from plait.compiler.cli import app
from plait.compiler.routing.stats import Statistics


class First(nn.Module):
    """Labels are what stands in the first column."""

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return cells[:, 0].long()


class Two(nn.Module):
    """Two routers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = plait.Router([nn.Identity() for _ in range(3)], First(), combine="select")
        self.second = plait.Router([nn.Linear(4, 4) for _ in range(2)], nn.Linear(4, 2), top_k=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 0, 3, 1, 6, 4]
    return [torch.randint(0, 4, (n, 4), generator=generator).float() for n in sizes]


# -- files -----------------------------------------------------------------------------------------

PROFILE = plait.profile(Two().eval(), batches())


def test_a_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("something older")
    PROFILE.save(path)
    assert plait.Profile.load(path) == PROFILE
    assert plait.Profile.load(str(path)).heldout.batches == 1
    assert [*tmp_path.iterdir()] == [path]


def test_writing_fails_with_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(plait.FileError, match="PLT-PRF-003.*No such file"):
        PROFILE.save(tmp_path / "nowhere" / "p.json")
    with pytest.raises(plait.FileError, match="PLT-PRF-003.*not a regular file"):
        PROFILE.save(tmp_path)
    with pytest.raises(plait.FileError, match="PLT-PRF-004: cannot read .*No such file"):
        plait.Profile.load(tmp_path / "nothing.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "p.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(plait.FileError, match="PLT-PRF-003.*No space left"):
        PROFILE.save(path)
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_cut_short_is_one_clear_error(folder: Path, data: st.DataObject) -> None:
    PROFILE.save(folder / "whole.json")
    content = (folder / "whole.json").read_bytes()
    cut = folder / "cut.json"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(
        plait.FileError, match=r"PLT-PRF-004: .*cut\.json is not JSON, or cut short"
    ):
        plait.Profile.load(cut)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=3),
    st.just([]), st.just({}),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_other_value_anywhere_is_refused_or_possible(folder: Path, data: st.DataObject) -> None:
    PROFILE.save(folder / "whole.json")
    document = json.loads((folder / "whole.json").read_text())
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 9)) == 0:
            break
        at = at[key]
    at[key] = data.draw(LEAVES)
    path = folder / "changed.json"
    path.write_text(json.dumps(document))
    try:
        profile = plait.Profile.load(path)
    except plait.FileError as error:
        assert error.hint and str(path) in error.reason
    else:  # whatever loads works in every way
        assert str(profile) and isinstance(profile.total, Statistics)
        profile.merge(profile).save(folder / "again.json")
        assert all(len(r.quantile(0.5)) == r.branches for r in profile.total)


ROUTER = ("fitted", "routers", 0)
DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("format",), "plait-program", "PLT-PRF-004: .* is not a profile"),
    (("version",), 2, "PLT-PRF-005: .* has version 2, this is for 1"),
    (("version",), None, "PLT-PRF-005"),
    (("version",), True, "PLT-PRF-005"),
    (("fingerprint",), 3, "fingerprint is a number, not text"),
    (("heldout",), [], "heldout is a list, not an object"),
    (("fitted", "batches"), 1, r"routers\[0\].cells has 5 entries for 1 batches"),
    (("fitted", "batches"), True, "fitted.batches is a truth value, not a whole number"),
    ((*ROUTER, "loads", 0, 1), -1, r"fitted.routers\[0\].loads\[0\]\[1\] is negative"),
    ((*ROUTER, "loads", 0, 1), float("nan"), r"loads\[0\]\[1\] is nan, not a whole number"),
    ((*ROUTER, "loads", 0, 1), 1.0, r"loads\[0\]\[1\] is 1.0, not a whole number"),
    ((*ROUTER, "loads", 0, 1), 10**30, r"loads\[0\]\[1\] is too large"),
    ((*ROUTER, "loads", 0, 1), 99, r"loads\[0\] adds up to .*, more than"),
    ((*ROUTER, "loads", 0), [1], r"loads\[0\] has 1 entries, not 3"),
    ((*ROUTER, "loads"), [], r"loads has 0 entries, not 5"),
    ((*ROUTER, "slots"), [3], r"slots has 1 entries, not 5"),
    ((*ROUTER, "together"), [[0]], r"together has 1 entries, not 3"),
    ((*ROUTER, "together", 0, 0), 99, r"together\[0\]\[0\] is 99 for a load of"),
    ((*ROUTER, "together", 0, 1), 1, r"together\[1\]\[0\] and \[0\]\[1\] differ"),
    ((*ROUTER, "call"), -1, "call is negative"),
    ((*ROUTER, "name"), None, "name is nothing, not text"),
    (("fitted", "routers", 1), {}, r"fitted.routers\[1\].name is missing"),
    (("fitted", "routers", 1, "name"), "first", r"fitted.routers\[1\] is there twice"),
    (("fitted", "pairs", 0, "second"), 7, r"pairs\[0\].second is 7, but there are 2 routers"),
    (("fitted", "pairs", 0, "together", 0, 0), 999, r"\[0\]\[0\] is more than went to one"),
]


@pytest.mark.parametrize(("place", "value", "message"), DAMAGES)
def test_each_kind_of_damage_is_named(
    folder: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    PROFILE.save(folder / "whole.json")
    document = json.loads((folder / "whole.json").read_text())
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path = folder / "damaged.json"
    path.write_text(json.dumps(document))
    with pytest.raises(plait.FileError, match=message):
        plait.Profile.load(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3", b"null"])
def test_other_contents_are_no_profile(folder: Path, content: bytes) -> None:
    (folder / "other.json").write_bytes(content)
    with pytest.raises(plait.FileError, match="PLT-PRF-004"):
        plait.Profile.load(folder / "other.json")


# -- the command -----------------------------------------------------------------------------------

MODULE = """
import torch, plait
from torch import nn

def model():
    torch.manual_seed(0)
    return plait.Router([nn.Linear(4, 4) for _ in range(2)], nn.Linear(4, 2)), (torch.randn(3, 4),)

def bare():
    return model()[0]

def other():
    return nn.Linear(4, 4), (torch.randn(3, 4),)

def data():
    for _ in range(5):
        yield torch.randn(6, 4)

def fails():
    raise RuntimeError("no data here")

def number():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    path = tmp_path / "models_of_test_profile.py"
    path.write_text(MODULE, encoding="utf-8")
    return str(path)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app.app, ["profile", *map(str, arguments)], terminal_width=100)


def test_the_command_writes_a_profile(module: str, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    result = command(f"{module}:model", "-o", out)
    assert result.exit_code == 0, result.output
    assert "routes of Router: 1 batches fitted, 0 held out" in result.stdout
    assert plait.Profile.load(out).fitted[""].cells == (3,)
    result = command(f"{module}:bare", "-o", out, "--data", f"{module}:data", "--batches", "4")
    assert result.exit_code == 0, result.output
    assert plait.Profile.load(out).heldout[""].cells == (6,)
    for _ in range(2):
        result = command(f"{module}:model", "-o", out, "--data", f"{module}:data", "--merge")
        assert result.exit_code == 0, result.output
    assert plait.Profile.load(out).total.batches == 14


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["{m}:bare", "-o", "{o}"], "comes without example inputs"),
        (["{m}:bare", "-o", "{o}", "--data", "{m}:fails"], "raised RuntimeError: no data here"),
        (["{m}:bare", "-o", "{o}", "--data", "{m}:number"], "gave a int, not batches"),
        (["{m}:bare", "-o", "{o}", "--data", "data"], "'data' names no function"),
        (["{m}:model", "-o", "{o}", "--holdout", "2"], "PLT-PRF-007: holdout=2.0 is not a share"),
        (["{m}:model", "-o", "{o}", "--merge"], "PLT-PRF-004: cannot read"),
        (["{m}:model", "-o", "/nowhere/p.json"], "folder /nowhere does not exist"),
        (["{m}:model", "-o", "{o}", "-i", "float32[3,9]"], "PLT-PRF-001: the model fails on"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(
    module: str, tmp_path: Path, arguments: list[str], cause: str
) -> None:
    out = tmp_path / "p.json"
    result = command(*[a.format(m=module, o=out) for a in arguments])
    assert result.exit_code == 2, result.output
    assert cause in result.stderr.strip().splitlines()[-1]
    assert not out.exists()


def test_a_profile_of_another_model_is_not_added_to(module: str, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert command(f"{module}:model", "-o", out).exit_code == 0
    before = out.read_bytes()
    result = command(f"{module}:other", "-o", out, "--merge")
    assert result.exit_code == 2 and "PLT-PRF-002" in result.stderr
    assert out.read_bytes() == before
