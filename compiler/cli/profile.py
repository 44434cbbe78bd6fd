"""``plait profile``: how a model routes over some batches, as a file and as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..routing.profile import Profile
from ..routing.profile import profile as run
from .console import Console
from .error import CliError, check_output
from .model import Loaded, first_line, resolve


def profile(
    loaded: Loaded,
    output: Path,
    data: str | None,
    batches: int | None,
    holdout: float,
    merge: bool,
) -> None:
    """Profiles a model, writes the profile to ``output`` and prints it.

    ``data`` names a function without arguments that returns batches, or the batches themselves;
    without it the example inputs are the only batch. At most ``batches`` are run. With ``merge``
    the counts are added to those in ``output``. Raises CliError where a name is wrong.
    """
    check_output(output)
    if loaded.saved:
        raise CliError(f"{loaded.name} is compiled already", "name the function that makes it")
    earlier = None
    if merge:
        earlier = Profile.load(output)
        earlier.check(loaded.model)  # before the work
    if data is not None:
        given = _batches(data, batches)
    elif loaded.kwargs and not loaded.args:
        given = [dict(loaded.kwargs)]
    else:
        given = [tuple(loaded.args)]
    result = run(loaded.model, given, holdout=holdout)
    if earlier is not None:
        result = earlier.merge(result)
    result.save(output)
    console = Console()
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    console.print(f"saved {output}", markup=False, highlight=False)


def _batches(name: str, most: int | None) -> list[Any]:
    found = resolve(name)
    if not _several(found) and not callable(found):
        raise CliError(f"{name} gave a {type(found).__name__}, not batches", "return a list")
    try:
        if not _several(found):
            found = found()
        if _several(found):
            return list(itertools.islice(found, most))
    except (Exception, SystemExit) as error:
        raise CliError(
            f"{name} raised {type(error).__name__}: {first_line(error)}",
            "it is called without arguments and returns batches",
        ) from error
    raise CliError(f"{name} gave a {type(found).__name__}, not batches", "return a list")


def _several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, torch.Tensor | Mapping | str)
