"""``plait passes``: what passes there are, and what each does to a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence

import torch
import torch.fx as fx
from rich import box
from rich.table import Table

from ...passes import registry
from ...passes.manager import PassManager, PassRecord
from ...passes.pipeline_print import print_value
from ...passes.printer import print_graph
from ..pipeline import DEFAULT_PIPELINE
from .console import Console
from .error import CliError
from .model import captured_of, load


def list_passes() -> None:
    """Prints every pass with its options, their defaults and what they do."""
    console = Console(markup=False)
    table = Table("pass, option=default", "what it does", box=box.SIMPLE_HEAD)
    for name in registry.names():
        try:
            cls = registry.lookup(name)
        except registry.BrokenPass as error:
            table.add_row(name, str(error), style="red")
            continue
        table.add_row(name, _first_sentence(cls), style="bold")
        meanings = _attributes(cls)
        for field in dataclasses.fields(cls):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            table.add_row(f"  {field.name}={print_value(default)}", meanings.get(field.name, ""))
    console.print(table)
    console.print(f"default pipeline: {DEFAULT_PIPELINE}", soft_wrap=True, highlight=False)


def run_pipeline(model: str, inputs: Sequence[str], pipeline: str | None) -> None:
    """Prints the graph of ``model`` as captured and after each pass."""
    manager = PassManager(DEFAULT_PIPELINE if pipeline is None else pipeline, observers=[_Show()])
    loaded = load(model, inputs)
    if loaded.saved:
        raise CliError(f"{model} is compiled already", "name the model that it was made from")
    captured = captured_of(loaded)
    with torch.no_grad():
        manager.run(captured.graph_module)


class _Show:
    """Prints every stage; a stage that changed nothing as "(unchanged)"."""

    def start(self, graph_module: fx.GraphModule) -> None:
        print("# captured")
        print(print_graph(graph_module))

    def after(self, record: PassRecord, graph_module: fx.GraphModule) -> None:
        if record.changed:
            print(print_graph(graph_module))
        else:
            print(f"# after {record.text} ({record.seconds * 1e3:.1f} ms)\n# (unchanged)\n")
        for remark in record.remarks:
            print(f"# {remark}")


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def _attributes(cls: type) -> dict[str, str]:
    """What the part "Attributes:" of a docstring says of each option."""
    _, _, part = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, list[str]] = {}
    for line in part.split("\n\n")[0].splitlines():
        name, colon, rest = line.strip().partition(": ")
        if colon and line.startswith("    ") and line[4:5] != " ":
            found[name] = [rest]
        elif found:
            found[next(reversed(found))].append(line.strip())
    return {name: " ".join(texts) for name, texts in found.items()}
