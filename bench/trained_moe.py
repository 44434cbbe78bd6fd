"""A small language model with a trained router: real routing is skewed and depends on the text.

Mixtral (transformers) over bytes: 4 layers, hidden 128, 8 experts of 256, two for each token, 3.4
million parameters. It learns to continue the sources of Python's standard library, found beside the
interpreter. 400 steps take a minute or two on two cores and reach 1.7 nats a byte; the weights are
kept in plait's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .environment import CACHE

STEPS = 400
WINDOW = 128  # bytes a row
ROWS = 16  # rows a batch
RATE = 2e-3
SEED = 0
TEXT = 4 << 20  # bytes of text to train on
HELD_OUT = 16  # batches
FORMAT = 1
AUXILIARY = 0.001
"""Weight of the loss that balances the router's loads: Mixtral's own, little pressure."""

SETTINGS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "router_aux_loss_coef": AUXILIARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Batches:
    """Rows of consecutive bytes: ``batches[i]`` is int64 ``[ROWS, WINDOW]``."""

    text: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Tensor:
        return self.text[self.starts[number].unsqueeze(1) + torch.arange(WINDOW)].long()


def library_text(limit: int = TEXT) -> bytes:
    """The sources of the standard library in the order of their names, cut at ``limit`` bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts:
            continue
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def trained(
    steps: int | None = None,
    folder: Path | None = None,
    report: Callable[[int, float], None] | None = None,
    auxiliary: float = AUXILIARY,
) -> tuple[nn.Module, Batches, Batches]:
    """``(model, train_batches, heldout_batches)``; the model in eval mode, the same on every call.

    The last tenth of the text is held out. ``steps`` is `STEPS` where it is not given. Weights are
    looked for, and kept, in ``folder`` (plait's cache directory). ``report`` is told the number and
    the loss (nats a byte) of every step. ``auxiliary`` weighs the router's balancing loss.
    """
    steps = STEPS if steps is None else steps
    text = library_text()
    config = {**SETTINGS, "router_aux_loss_coef": auxiliary}
    path = (folder or CACHE / "bench") / f"moe-{_key(text, steps, config)}.safetensors"
    flat = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(flat) * 9 // 10
    generator = torch.Generator().manual_seed(SEED)
    train = Batches(flat[:cut], _starts(cut, steps, generator))
    held_out = Batches(flat[cut:], _starts(len(flat) - cut, HELD_OUT, generator))
    model = _model(config)
    if not _restore(model, path):
        _train(model, train, report)
        _keep(model, path)
    return model.eval(), train, held_out


def loss(model: nn.Module, batch: Tensor) -> float:
    """Mean cross entropy, nats a byte, of ``batch`` ``[rows, bytes]``."""
    with torch.no_grad():
        return float(model(batch, labels=batch).loss)


def _model(config: dict[str, Any]) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return MixtralForCausalLM(MixtralConfig(**config, use_cache=False))


def _starts(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, size - WINDOW, (count, ROWS), generator=generator)


def _train(model: nn.Module, batches: Batches, report: Callable[[int, float], None] | None) -> None:
    """AdamW with a linear warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=len(batches) + 1, pct_start=0.1
    )
    model.train()
    with torch.enable_grad():
        for number in range(len(batches)):
            batch = batches[number]
            value = model(batch, labels=batch, output_router_logits=True).loss
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if report is not None:
                report(number, value.item())


def _key(text: bytes, steps: int, config: dict[str, Any]) -> str:
    """Whatever decides the weights, hashed, but for the machine, which rounds in its own way."""
    import transformers

    parts = [FORMAT, config, steps, WINDOW, ROWS, RATE, SEED, HELD_OUT]
    parts += [torch.__version__, transformers.__version__, hashlib.sha256(text).hexdigest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _restore(model: nn.Module, path: Path) -> bool:
    """Loads ``path`` into ``model``; False where there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _keep(model: nn.Module, path: Path) -> None:
    """Writes beside ``path`` and renames: a reader never sees half a file. Best effort."""
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            written = Path(scratch) / path.name
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, written)
            os.replace(written, path)
    except OSError:
        return
