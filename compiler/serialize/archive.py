"""The zip archive of a saved program: written as a whole or not at all, checked when it is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.files import replacing
from ..build import store_for
from ..errors import FileError
from ..options import Options

if TYPE_CHECKING:
    from ..weights.budget import WeightStore

FORMAT = "plait-program"
VERSION = 2
WEIGHTS = "weights.safetensors"
_MEND = "save the model again"


def write(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes beside ``path`` and renames: a reader never sees half a file. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with replacing(path) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def read(
    path: Path, weight_budget: int | str | None = None
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, torch.Tensor], WeightStore | None]:
    """The manifest, the other members but the weights, the weights and, where there is a budget for
    them, given or among the saved options, the store in whose files they lie.

    Raises FileError when ``path`` is missing, truncated, altered or of another version, or where
    weights cannot be written.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _read(archive, path, weight_budget)
    except FileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError("PLT-SAV-004", f"cannot read {path}: {reason}") from error
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FileError(
            "PLT-SAV-004", f"{path} is truncated or not a saved plait program ({error})", _MEND
        ) from error


def _read(archive: zipfile.ZipFile, path: Path, weight_budget: int | str | None) -> Any:
    small = [name for name in archive.namelist() if name != WEIGHTS]
    members = {name: archive.read(name) for name in small}
    manifest = json.loads(members.pop("manifest.json"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileError("PLT-SAV-004", f"{path} is not a saved plait program", _MEND)
    if manifest.get("version") != VERSION:
        reason = f"{path} has format version {manifest.get('version')}, this is {VERSION}"
        raise FileError("PLT-SAV-005", reason, _MEND)
    digests = dict(manifest["sha256"])
    found = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    budget = weight_budget or manifest["options"].get("weight_budget")
    store = store_for(Options(weight_budget=budget))
    digest = hashlib.sha256()
    if store is None:
        content = archive.read(WEIGHTS)
        digest.update(content)
        tensors = _parse(content)
    else:
        from ..weights.mapped import read_mapped

        with archive.open(WEIGHTS) as source:
            tensors = read_mapped(source, store, digest.update)
    found[WEIGHTS] = digest.hexdigest()
    for name in digests.keys() | found.keys():
        if found[name] != digests[name]:
            raise FileError("PLT-SAV-004", f"{path} is damaged: {name} was altered", _MEND)
    return manifest, members, tensors, store


def _parse(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"weights: {error}") from None
