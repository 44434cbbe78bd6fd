"""A trained mixture of experts under a weight budget: time, hit rate, bytes moved, resident memory.

The model is `trained_moe`'s with its experts widened: hidden units are added whose output weights
are zero. What it computes, and with that every route on held-out text, stays the trained one's,
while the experts get a size at which memory matters (6 MiB each, 201 MB in all).

Modes, interleaved in one process on the same windows of text (those that read a disk by
themselves), answers compared bit for bit first:

* ``resident``: all weights in memory;
* ``budget``: what ``weight_budget`` gives; ``demand``: nothing loaded ahead, the least recently
  used dropped first;
* ``-disk``: the same with dropped weights leaving the operating system's page cache, too.

``oracle`` is Belady's rule on the recorded fetches: nothing that loads on demand hits more often.
Resident memory is the high-water mark that the system keeps of a process of its own, in which the
saved model is loaded and run.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler import api
from ..compiler.routing import profile as route_profile
from .measure import Timing, high_water, interleave
from .trained_moe import Batches, trained

NAME = "weights"
SUMMARY = "a trained mixture of experts under a weight budget, beside loading on demand"
BUDGET = "40%"
WIDTH = 4096  # hidden units of an expert
TOKENS = (1, 16, 128)
MODES: dict[str, str | None] = {
    "resident": None,
    "budget": "",
    "demand": "ahead=false,evict=lru",
    "budget-disk": "cached=false",
    "demand-disk": "ahead=false,evict=lru,cached=false",
}
PIPELINE = "normalize,outline-branches,speculate-routes,prefetch-weights{%s},fuse-vertical"


def widened(model: Any, width: int = WIDTH) -> nn.Module:
    """A copy of a Mixtral of transformers whose experts have ``width`` hidden units; it computes
    the same but for rounding.
    """
    config = copy.deepcopy(model.config)
    config.intermediate_size = width
    result = type(model)(config)
    old = model.state_dict()
    new = result.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in new.items():
        if name.endswith("gate_up_proj"):
            value.normal_(std=0.02, generator=generator)
            half = old[name].shape[1] // 2
            value[:, :half] = old[name][:, :half]
            value[:, width : width + half] = old[name][:, half:]
        elif name.endswith("down_proj"):
            value.zero_()
            value[..., : old[name].shape[2]] = old[name]
        else:
            value.copy_(old[name])
    return result.eval()


def windows(batches: Batches, tokens: int, count: int) -> list[Tensor]:
    """``count`` windows ``[1, tokens]`` of consecutive text."""
    text = batches[0].reshape(-1)
    starts = range(0, tokens * count, tokens)
    if tokens * count > len(text):
        text = torch.cat([batches[i].reshape(-1) for i in range(len(batches))])
    return [text[s : s + tokens].unsqueeze(0) for s in starts]


def oracle(fetches: Sequence[tuple[int, tuple[int, ...]]], capacity: int) -> tuple[int, int]:
    """Hits and misses of Belady's rule, with room for ``capacity`` units of one size.

    ``fetches`` are (site, units) in order; what one wants is resident together.
    """
    uses: dict[tuple[int, int], list[int]] = defaultdict(list)
    for now, (site, units) in enumerate(fetches):
        for unit in units:
            uses[site, unit].append(now)

    def following(key: tuple[int, int], now: int) -> float:
        later = bisect_right(uses[key], now)
        return uses[key][later] if later < len(uses[key]) else float("inf")

    resident: set[tuple[int, int]] = set()
    hits = misses = 0
    for now, (site, units) in enumerate(fetches):
        wanted = {(site, unit) for unit in units}
        hits += len(wanted & resident)
        misses += len(wanted - resident)
        resident |= wanted
        rest = sorted(resident - wanted, key=lambda key: -following(key, now))
        while len(resident) > capacity and rest:
            resident.discard(rest.pop(0))
    return hits, misses


def run(rounds: int = 5, seconds: float = 0.25, folder: Path | None = None) -> dict[str, Any]:
    """All of it, as a JSON document. ``folder`` is for files of tens of MB (a temporary one).

    Raises AssertionError where a mode's answers are not the resident one's.
    """
    import tempfile

    small, train, text = trained()
    model = widened(small)
    profile = route_profile.profile(model, [train[i][:2] for i in range(4)])
    document: dict[str, Any] = {"budget": BUDGET, "rows": [], "memory": {}}
    document["weight_bytes"] = sum(p.nbytes for p in model.parameters())
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        for tokens in TOKENS:
            document["rows"] += _times(model, profile, text, tokens, rounds, seconds)
        example = (windows(text, 128, 2)[0],)
        document["memory"] = memory((model, example), (_slim(model), example), Path(scratch))
    return document


def _times(
    model: nn.Module, profile: Any, text: Batches, tokens: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    inputs = [(window,) for window in windows(text, tokens, 64)]
    compiled = compile_modes(model, inputs[0], MODES, profile=profile)
    return [{"tokens": tokens, **row} for row in times(compiled, inputs, rounds, seconds)]


def compile_modes(
    model: nn.Module, example: tuple[Any, ...], modes: Mapping[str, str | None], **options: Any
) -> dict[str, Any]:
    """A copy of ``model`` compiled for each of ``modes``, which are options of `prefetch-weights`
    or None for all weights in memory; ``options`` are those of `plait.compile`.
    """
    return {
        name: api.compile(
            copy.deepcopy(model),
            example_inputs=example,
            weight_budget=None if mode is None else BUDGET,
            pipeline=PIPELINE % (mode or ""),
            **options,
        )
        for name, mode in modes.items()
    }


def times(
    compiled: Mapping[str, Any],
    inputs: Sequence[tuple[Any, ...]],
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for each compiled model, one of which is called "resident", on the same inputs.

    Raises AssertionError where answers are not the resident one's.
    """
    for x in inputs[:16]:
        wanted = _answer(compiled["resident"](*x))
        for name, other in compiled.items():
            assert torch.equal(_answer(other(*x)), wanted), f"{name} gives other answers"

    calls = {name: _Calls(other, inputs) for name, other in compiled.items()}
    rows = []
    # Modes that read a disk leave the system work to do, which others would pay for.
    for disk in (False, True):
        turns = {n: c for n, c in calls.items() if n.endswith("-disk") == disk or n == "resident"}
        for call in turns.values():
            call.start()
        timings: dict[str, Timing] = interleave(turns, rounds, seconds) if len(turns) > 1 else {}
        for name, timing in timings.items():
            if disk and name == "resident":
                continue
            row: dict[str, Any] = {"mode": name, "p50_seconds": timing.median}
            base = timings["resident"].rounds
            ratios = [a / b - 1.0 for a, b in zip(timing.rounds, base, strict=True)]
            row |= {"slowdown": statistics.median(ratios), **turns[name].counted()}
            rows.append(row)
    for number, row in enumerate(rows):
        if row["mode"] == "budget":
            bound = {"mode": "oracle", "p50_seconds": None, "slowdown": None}
            rows.insert(number + 1, {**bound, **calls["budget"].oracle()})
            break
    return rows


def _answer(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


class _Calls:
    """Calls of a compiled model on one input after the other."""

    def __init__(self, compiled: Any, inputs: Sequence[tuple[Any, ...]]) -> None:
        self.compiled, self.inputs, self.number = compiled, inputs, 0
        self.before: dict[str, Any] = {}

    def __call__(self) -> Any:
        self.number += 1
        return self.compiled(*self.inputs[self.number % len(self.inputs)])

    def start(self) -> None:
        """Counts from now on."""
        self.number = 0
        if self.compiled.weight_tier is not None:
            self.before = self.compiled.weight_tier.counters.to_json()

    def counted(self) -> dict[str, Any]:
        """Hit rate, bytes per call and the like, since `start`."""
        tier = self.compiled.weight_tier
        if tier is None:
            return {"hit_rate": 1.0, "moved_per_call": 0.0}
        now = tier.counters.to_json()
        spent = {k: v - self.before[k] for k, v in now.items()}
        return {
            "hit_rate": spent["hits"] / max(1, spent["hits"] + spent["misses"]),
            "moved_per_call": spent["bytes_moved"] / self.number,
            "waited_per_call": spent["seconds"] / self.number,
            "ahead": spent["ahead"],
            "useful": spent["useful"],
            "waves": spent["waves"],
            "inside": spent["inside"] / self.number,
            "peak_bytes": now["peak_bytes"],
        }

    def oracle(self) -> dict[str, Any]:
        """What Belady's rule would have hit, and moved, of the fetches of some rounds."""
        tier = self.compiled.weight_tier
        tier.record, calls = [], 4 * len(self.inputs)
        for _ in range(calls):
            self()
        record, tier.record = tier.record, None
        unit = tier.sites[0].bytes[0]
        hits, misses = oracle(record, tier.capacity // unit)
        return {
            "hit_rate": hits / max(1, hits + misses),
            "moved_per_call": misses * unit / calls,
        }


# -- resident memory -------------------------------------------------------------------------------


Example = tuple[nn.Module, tuple[Any, ...]]
"""A model and inputs for it."""


def memory(model: Example, slim_model: Example, folder: Path) -> dict[str, Any]:
    """High-water marks in bytes of processes that load and run: the model with all weights and
    under the budget, and a slim one, without experts to speak of, which tells what a process needs
    anyway.
    """
    slim = folder / "slim.plait"
    api.compile(slim_model[0], example_inputs=slim_model[1]).save(slim)
    full = folder / "full.plait"
    api.compile(model[0], example_inputs=model[1]).save(full)
    limit = max([int(t.max()) + 1 for t in model[1] if not t.is_floating_point()], default=1)
    found = {
        "constant": _child(slim, None, limit),
        "resident": _child(full, None, limit),
        "budget": _child(full, BUDGET, limit),
    }
    weights = sum(p.nbytes for p in model[0].parameters())
    found["share"] = (found["budget"] - found["constant"]) / weights
    return found


def _slim(model: Any) -> nn.Module:
    """The same architecture with experts of 16 hidden units, untrained."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = 16
    return type(model)(config).eval()


def _child(path: Path, budget: str | None, limit: int) -> int:
    code = "from plait.bench.weight_budget import measure; measure()"
    command = [sys.executable, "-c", code, str(path), budget or "", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def measure() -> None:
    """In a process of its own: loads the file of the first argument under the budget of the second,
    runs it on random inputs, integers below the third, and prints the high-water mark of its
    resident memory.
    """
    path, budget, limit = sys.argv[1:]
    model = api.load(path, weight_budget=budget or None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            inputs = []
            for spec in model.programs[0].captured.inputs:
                shape = [int(d) for d in spec.shape]
                if spec.dtype.is_floating_point:
                    inputs.append(torch.randn(shape, generator=generator))
                else:
                    inputs.append(torch.randint(0, int(limit), shape, generator=generator))
            model(*inputs)
    print(json.dumps({"peak": high_water()}))
