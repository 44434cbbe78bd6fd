"""Weights in files: read piece by piece, and what a file does not tell of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import plait
from plait.compiler.weights.absent import Checkpoint


class Turned(nn.Module):
    """Weights that lie in memory otherwise than in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.weight = nn.Parameter(torch.randn(36, 24).T)
        self.part = nn.Parameter(torch.randn(9, 24)[2:5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(self.conv(x).flatten(2).flatten(1), self.weight[:, :24])
        return y @ self.part.T


def test_files_know_nothing_of_strides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(2, 4, 4, 4)
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    for weights in (tmp_path, None):
        how = plait.PlacementOptions(budget=0.3, weights=weights)
        placed = plait.compile(model, devices="2xcpu", placement=how)
        with torch.no_grad():
            torch.testing.assert_close(placed(x), model(x), rtol=1e-4, atol=1e-4)


def test_files_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file would count as memory of a process, which may be allowed less than that."""
    file = tmp_path / "m.safetensors"
    tensors = {"w": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "one": torch.tensor(7)}
    tensors["none"] = torch.zeros(0, 2)
    save_file(tensors, file)
    source = Checkpoint(file)
    monkeypatch.setattr("safetensors.safe_open", None)
    for name, tensor in tensors.items():
        assert torch.equal(source.get(name), tensor) and source.get(name).dtype is tensor.dtype
    for row in (0, -1, slice(1, 4), slice(2, 99), slice(4, 2)):
        assert torch.equal(source.get("w", row), tensors["w"][row])
    file.write_bytes(file.read_bytes()[:-70])
    with pytest.raises(plait.FileError, match="PLT-DST-007.*cut short"):
        source.get("w")
    file.unlink()
    with pytest.raises(plait.FileError, match="PLT-DST-007.*'w' cannot be read"):
        source.get("w")
