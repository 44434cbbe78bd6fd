"""A mixture of experts on several processes, each forbidden more memory than its share.

``python -m plait.bench.placed_run`` builds a Mixtral-style language model of random weights, saves
them as safetensors, divides it among local processes over gloo, and prints what the plan said and
what was measured: seconds a step, and bytes of each process beyond what it had before its weights.
Answers are compared with eager PyTorch before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler.api import compile
from ..compiler.placed.capture import empty_weights
from ..compiler.placed.device import Device
from ..compiler.placed.options import PlacementOptions
from ..compiler.placed.placed import Placed

SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"layers": 4, "hidden": 64, "inner": 128, "vocab": 256, "tokens": 8},
    "default": {"layers": 12, "hidden": 512, "inner": 1024, "vocab": 8192, "tokens": 64},
}


@dataclass(frozen=True)
class Outcome:
    """What one run gave: bytes and seconds, planned and measured, by rank where a list."""

    objective: str
    weights_bytes: int
    limit_bytes: float
    error: float
    predicted_s: float
    measured_s: float
    planned_bytes: list[float]
    peak_bytes: list[int]
    base_bytes: list[int]
    segments: int


def build(size: Mapping[str, int]) -> torch.nn.Module:
    """The model, its weights on the meta device."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=8, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    with empty_weights():
        return MixtralForCausalLM(config).eval()


def save_random(model: torch.nn.Module, folder: Path) -> int:
    """Writes random weights of ``model``, a file for each; returns their bytes."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    total = 0
    for number, (name, like) in enumerate(model.named_parameters()):
        if like.dim() > 1:
            tensor = torch.randn(like.shape, generator=generator) * like.shape[-1] ** -0.5
        else:
            tensor = torch.ones(like.shape)
        save_file({name: tensor}, folder / f"model-{number:05}.safetensors")
        total += tensor.nbytes
    return total


def eager(model: torch.nn.Module, folder: Path, inputs: Mapping[str, torch.Tensor]) -> Any:
    """The logits of the whole model in this process, which has no limit."""
    from safetensors.torch import load_file

    state = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
    with torch.no_grad():
        return torch.func.functional_call(model, state, (), dict(inputs)).logits


def run(size: Mapping[str, int], ranks: int, room: float, objective: str, steps: int) -> Outcome:
    """Divides, checks and times the model; each process may hold ``room`` times its share."""
    model = build(size)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size["vocab"], (2, size["tokens"]), generator=generator)
    with tempfile.TemporaryDirectory(prefix="plait-placed-") as name:
        folder = Path(name)
        total = save_random(model, folder)
        expected = eager(model, folder, {"input_ids": ids})
        limit = total / ranks * room
        options = PlacementOptions(
            launch="processes", weights=folder, objective=objective, costs="measured",
            timeout=300.0, budget=10.0,
        )  # fmt: skip
        devices = [Device("cpu", memory=limit)] * ranks
        with compile(model, devices=devices, placement=options) as placed:
            got = placed(input_ids=ids).logits
            error = float((got - expected).abs().max() / expected.abs().max())
            measured = timed(placed, {"input_ids": ids}, objective, steps)
            memory = placed.memory()
            report = placed.placement.report
            return Outcome(
                objective, total, limit, error, placed.division.predicted_s, measured,
                list(report["peak_bytes"].values()), [m.peak - m.base for m in memory],
                [m.base for m in memory], placed.division.segments,
            )  # fmt: skip


def timed(placed: Placed, inputs: Mapping[str, torch.Tensor], objective: str, steps: int) -> float:
    """Seconds of a step, the median; for throughput, between results with the pipeline full."""
    placed(**inputs)
    times = []
    if objective == "throughput":
        for _ in placed.map([dict(inputs)] * (steps + 8)):
            times.append(time.perf_counter())
        filled = times[4:-4]
        return (filled[-1] - filled[0]) / (len(filled) - 1)
    for _ in range(steps):
        begin = time.perf_counter()
        placed(**inputs)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def show(outcome: Outcome) -> None:
    """Prints an outcome."""
    mb = 1e6
    o = outcome
    print(f"objective {o.objective}, {o.segments} segments, error against eager {o.error:.1e}")
    print(f"weights {o.weights_bytes / mb:.0f} MB, limit of a process {o.limit_bytes / mb:.0f} MB")
    print(f"predicted {o.predicted_s * 1e3:.1f} ms, measured {o.measured_s * 1e3:.1f} ms "
          f"({o.measured_s / o.predicted_s - 1:+.1%})")  # fmt: skip
    for rank, rows in enumerate(zip(o.planned_bytes, o.peak_bytes, o.base_bytes, strict=True)):
        planned, peak, base = rows
        print(f"rank {rank}: planned {planned / mb:.1f} MB, peak {peak / mb:.1f} MB "
              f"({peak / planned - 1:+.1%}), before weights {base / mb:.0f} MB")  # fmt: skip


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--room", type=float, default=1.25, help="limit over an equal share")
    parser.add_argument("--objective", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the outcome here")
    chosen = parser.parse_args()
    outcome = run(SIZES[chosen.size], chosen.ranks, chosen.room, chosen.objective, chosen.steps)
    show(outcome)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(asdict(outcome), indent=1) + "\n", "utf-8")
    if outcome.error > 1e-4:
        sys.exit("answers differ from eager")


if __name__ == "__main__":
    main()
