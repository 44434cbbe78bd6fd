"""`plait.place_experts` and its command: from a profile to a file, or one error and no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import plait
from plait.compiler.cli import app
from plait.compiler.placed.experts import traffic_of

NAMES = ("first", "second")


class Labels(nn.Module):
    """Labels are what stands in one column."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return cells[:, self.column].long()


class Two(nn.Module):
    """Two routers of four branches, by the first column and by the second."""

    def __init__(self) -> None:
        super().__init__()
        same = [nn.Identity() for _ in range(4)]
        self.first = plait.Router(same, Labels(0), combine="select")
        self.second = plait.Router(same, Labels(1), combine="select")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def profiled(swap: bool = False) -> plait.Profile:
    """Branch i goes with branch i ^ 1 if ``swap``, else with branch 3 - i; three of four fitted."""
    label = torch.arange(4).repeat(10)
    other = label ^ 1 if swap else 3 - label
    batch = torch.stack([label, other], 1).float()
    return plait.profile(Two(), [batch] * 4)


def together(placed: plait.ExpertPlacement) -> bool:
    first, second = (placed.experts[n] for n in NAMES)
    return all(first[i] == second[3 - i] for i in range(4))


def test_a_profile_is_placed_and_judged_by_its_held_out_batches() -> None:
    placed = plait.place_experts(profiled(), devices=2)
    assert placed.devices == ("device:0", "device:1")
    assert together(placed)
    report = placed.report
    assert (report["tokens"], report["cross_tokens"]) == (120, 0)
    assert report["round_robin_cross_tokens"] == 120
    held = report["heldout"]
    assert (held["tokens"], held["cross_tokens"], held["round_robin_cross_tokens"]) == (40, 0, 40)
    assert held["imbalance"] == dict.fromkeys(NAMES, 1.0)


def test_routes_traffic_and_files_will_do(tmp_path: Path) -> None:
    label = torch.arange(4).repeat(5)
    taken = {"first": label[:, None], "second": 3 - label}
    assert together(plait.place_experts(taken, devices=["a", "b"]))
    traffic = plait.ExpertTraffic.from_routes(taken, 4)
    assert together(plait.place_experts(traffic, devices=["a", "b"]))
    profiled().save(tmp_path / "p.json")
    assert together(plait.place_experts(tmp_path / "p.json", devices=2))


def test_layers_choose_routers() -> None:
    placed = plait.place_experts(profiled(), devices=2, layers=["sec*"])
    assert list(placed.experts) == ["second"]
    assert not traffic_of(profiled().fitted, ["second"]).pairs


def test_drift_moves_what_it_must(tmp_path: Path) -> None:
    old = plait.place_experts(profiled(), devices=2)
    old.write(tmp_path / "old.json")
    drifted = profiled(swap=True)
    crossing = old.report["tokens"]
    stays = plait.place_experts(drifted, devices=2, previous=old, move_cost=crossing)
    assert stays.experts == old.experts
    moves = plait.place_experts(drifted, devices=2, previous=tmp_path / "old.json")
    assert moves.report["cross_tokens"] == 0
    assert moves.report["moved"] in (0, 2, 4)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (3, {}, plait.InputError, "PLT-PLC-005: a int is no profile"),
        ("profile", {"devices": "ab"}, plait.OptionError, "PLT-PLC-005: devices='ab'"),
        ("profile", {"devices": True}, plait.OptionError, "PLT-PLC-005: devices=True"),
        ("profile", {"devices": 0}, plait.PlacementError, "devices must be at least one"),
        ("profile", {"layers": ["x"]}, plait.InputError, r"no router matches \['x'\]"),
        ("profile", {"layers": "first"}, plait.OptionError, "layers is text"),
        ("routes", {"layers": ["x"]}, plait.OptionError, "chooses a profile's routers"),
        ("none.json", {}, plait.FileError, "PLT-PRF-004: cannot read none.json"),
        ("profile", {"previous": "none.json"}, plait.PlacementError, "cannot read none.json"),
    ],
)
def test_what_has_no_meaning_is_refused(
    given: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if given == "profile":
        given = profiled()
    elif given == "routes":
        given = {"x": [[0], [1]]}
    with pytest.raises(error, match=message):
        plait.place_experts(given, **{"devices": 2, **options})


def test_a_model_without_routers_has_nothing_to_place() -> None:
    profile = plait.profile(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(plait.InputError, match="the profile has no routers"):
        plait.place_experts(profile, devices=2)


def command(folder: Path, *options: str) -> Result:
    profiled().save(folder / "profile.json")
    words = ["place-experts", str(folder / "profile.json"), "-o", str(folder / "out.json")]
    return CliRunner().invoke(app.app, [*words, *options])


def test_the_command_writes_a_placement(tmp_path: Path) -> None:
    result = command(tmp_path, "--devices", "gpu0,gpu1")
    assert result.exit_code == 0, result.output
    assert "held out: 0 of 40 tokens change devices (0.0%), 100.0% below" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["format"] == "expert-placement v1"
    assert set(written["experts"]["first"]) == {"gpu0", "gpu1"}
    again = command(tmp_path, "--devices", "gpu0,gpu1", "--previous", str(tmp_path / "out.json"))
    assert "0 experts moved" in again.output
    assert json.loads((tmp_path / "out.json").read_text())["experts"] == written["experts"]
    quiet = command(tmp_path, "--devices", "2", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_copies_are_placed_written_and_shown(tmp_path: Path) -> None:
    """Without them, three devices cannot share four experts evenly."""
    options = ["--devices", "a,b,c", "--balance", "1.2"]
    assert command(tmp_path, *options).exit_code == 2
    result = command(tmp_path, *options, "--copies", "2")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert any(isinstance(x, list) for where in written["experts"].values() for x in where)
    assert max(written["report"]["imbalance"].values()) <= 1.2 + 1e-9
    assert f"{written['report']['copies']} copies of experts" in result.output
    placed = plait.place_experts(profiled(), devices=["a", "b", "c"], copies=2, balance=1.2)
    assert placed.to_dict()["experts"] == written["experts"]
    assert placed.report["heldout"]["tokens"] == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "2", "--copies", "-1"], "copies must be a number of experts"),
        (["--devices", "0"], "devices must be at least one"),
        (["--devices", "a,,b"], "devices 'a,,b' are not understood"),
        (["--devices", "-1"], "devices '-1' are not understood"),
        (["--devices", "999999999"], "devices=999999999 are more than 1024"),
        (["--devices", "2", "--capacity", "1"], "2 too few"),
        (["--devices", "2", "--balance", "0.5"], "balance must be 1 or more"),
        (["--devices", "3", "--balance", "1.0"], "no placement has less than 1.500"),
        (["--devices", "2", "--algorithm", "magic"], "algorithm 'magic' is unknown"),
        (["--devices", "2", "--previous", "none.json"], "cannot read none.json"),
    ],
)
def test_faults_exit_with_2(tmp_path: Path, options: list[str], message: str) -> None:
    result = command(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out.json").exists()
