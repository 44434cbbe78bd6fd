"""A mixture of experts on several processes, each forbidden more memory than its share.

``python -m plait.bench.placed_run`` builds a Mixtral-style language model of random weights, saves
them as safetensors, divides it among local processes over gloo, and prints what the plan said and
what was measured: seconds of a step alone ("latency"), or from one result to the next with several
batches in flight ("throughput"), and bytes of each process beyond what it had before its weights.
Answers, of batches alone and in flight, are compared with eager PyTorch before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler.api import compile
from ..compiler.placed.capture import empty_weights
from ..compiler.placed.device import Device
from ..compiler.placed.options import PlacementOptions
from ..compiler.placed.placed import Placed
from ..passes.placement.placement import write_text
from ..passes.placement.plan import OBJECTIVES

SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"layers": 4, "hidden": 64, "inner": 128, "vocab": 256, "tokens": 8},
    "default": {"layers": 12, "hidden": 512, "inner": 1024, "vocab": 8192, "tokens": 64},
    "wide": {
        "layers": 2, "hidden": 512, "inner": 1024, "experts": 48, "vocab": 8192, "tokens": 64,
    },
}  # fmt: skip
"""Eight experts where nothing else is said. A layer of "wide" is too large for any process."""


BATCHES = 3
"""Different batches that take turns, so that a result of another batch would be noticed."""


@dataclass(frozen=True)
class Outcome:
    """What one run gave: bytes and seconds, planned and measured, by rank where a list.

    ``predicted_s`` is for what the objective makes small: ``step_s`` is a batch alone, ``result_s``
    from one result to the next.
    """

    objective: str
    weights_bytes: int
    limit_bytes: float
    error: float
    predicted_s: float
    step_s: float
    result_s: float
    planned_bytes: list[float]
    peak_bytes: list[int]
    base_bytes: list[int]
    segments: int
    stages: int
    divided: bool

    @property
    def measured_s(self) -> float:
        """What the prediction is of."""
        return self.step_s if self.objective == "latency" else self.result_s


def build(size: Mapping[str, int]) -> torch.nn.Module:
    """The model, its weights on the meta device."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=size.get("experts", 8), num_experts_per_tok=2, use_cache=False,
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
    os.sync()  # now, not while something is timed
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
    ids = torch.randint(0, size["vocab"], (BATCHES, 2, size["tokens"]), generator=generator)
    batches = [{"input_ids": rows} for rows in ids]
    with tempfile.TemporaryDirectory(prefix="plait-placed-") as name:
        folder = Path(name)
        total = save_random(model, folder)
        expected = [eager(model, folder, batch) for batch in batches]
        limit = total / ranks * room
        options = PlacementOptions(
            launch="processes", weights=folder, objective=objective, costs="measured",
            timeout=300.0, budget=10.0,
        )  # fmt: skip
        devices = [Device("cpu", memory=limit)] * ranks
        with compile(model, devices=devices, placement=options) as placed:
            alone = [placed(**batch).logits for batch in batches]
            flying = [result.logits for result in placed.map(batches)]
            error = max(map(difference, alone + flying, expected * 2))
            step, result = latency(placed, batches, steps), throughput(placed, batches, steps)
            memory = placed.memory()
            return Outcome(
                objective, total, limit, error, placed.division.predicted_s, step, result,
                placed.division.planned_bytes, [m.peak - m.base for m in memory],
                [m.base for m in memory], placed.division.segments,
                placed.division.programs[0].stages,
                any(r.id == "PLT-DST-014" for r in placed.remarks),
            )  # fmt: skip


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors, over the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


def latency(placed: Placed, batches: Sequence[Mapping[str, torch.Tensor]], steps: int) -> float:
    """Seconds of a step with nothing else in flight, the median."""
    times = []
    for k in range(steps):
        begin = time.perf_counter()
        placed(**batches[k % len(batches)])
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def throughput(placed: Placed, batches: Sequence[Mapping[str, torch.Tensor]], steps: int) -> float:
    """Seconds from one result to the next, the mean while the pipeline is full."""
    stages = placed.division.programs[0].stages
    given = [dict(batches[k % len(batches)]) for k in range(steps + 2 * stages)]
    times = [time.perf_counter() for _ in placed.map(given)]
    full = times[stages - 1 : -stages]
    return (full[-1] - full[0]) / (len(full) - 1)


def show(outcome: Outcome) -> None:
    """Prints an outcome."""
    mb = 1e6
    o = outcome
    experts = "divided" if o.divided else "together"
    print(f"objective {o.objective}, {o.segments} segments in {o.stages} stages, "
          f"experts {experts}, error against eager {o.error:.1e}")  # fmt: skip
    print(f"weights {o.weights_bytes / mb:.0f} MB, limit of a process {o.limit_bytes / mb:.0f} MB")
    print(f"predicted {o.predicted_s * 1e3:.1f} ms, measured {o.measured_s * 1e3:.1f} ms "
          f"({o.measured_s / o.predicted_s - 1:+.1%}); a batch alone {o.step_s * 1e3:.1f} ms, a "
          f"result of many {o.result_s * 1e3:.1f} ms")  # fmt: skip
    for rank, rows in enumerate(zip(o.planned_bytes, o.peak_bytes, o.base_bytes, strict=True)):
        planned, peak, base = rows
        print(f"rank {rank}: planned {planned / mb:.1f} MB, peak {peak / mb:.1f} MB "
              f"({peak / planned - 1:+.1%}), before weights {base / mb:.0f} MB")  # fmt: skip


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="default", help="of the model")
    parser.add_argument("--ranks", type=int, default=4, help="processes")
    parser.add_argument("--room", type=float, default=1.25, help="limit over an equal share")
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES),
                        help="to place for, one after the other")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="to time")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    chosen = parser.parse_args()
    outcomes = []
    for objective in chosen.objective:
        outcome = run(SIZES[chosen.size], chosen.ranks, chosen.room, objective, chosen.steps)
        show(outcome)
        outcomes.append(outcome)
    if chosen.json is not None:
        write_text(chosen.json, json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    if any(o.error > 1e-4 for o in outcomes):
        sys.exit("answers differ from eager")


if __name__ == "__main__":
    main()
