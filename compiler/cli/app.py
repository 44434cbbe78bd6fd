"""The command line. Nothing heavy is imported before a command needs it.

``MODEL`` is ``module:function`` or ``file.py:function`` (a function that returns a model, or a
model and its example inputs; the model itself will do, too), or a file that `Compiled.save` wrote.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from ... import __version__
from .ending import reported, run_app, show_tracebacks
from .error import CliError

app = typer.Typer(
    name="plait",
    help="Compiles PyTorch models that branch into fewer, fuller kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Look after the kernel database.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="module:function, file.py:function or a saved file.")
]
Inputs = Annotated[
    list[str],
    typer.Option("--input", "-i", help="An input as dtype[sizes], such as float32[1,3,224,224]."),
]
Pipeline = Annotated[
    str | None, typer.Option("--pipeline", "-p", help="Passes, such as 'normalize,fuse-vertical'.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, max=1024, help="Threads to use (torch's default)."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version  # its callback has answered
    show_tracebacks(debug)


@app.command()
def check(model: Model, input: Inputs = []) -> None:  # noqa: B006 - typer copies it
    """Capture MODEL and report what would run as kernels, what by library, and why.

    Exits with 1 where the model cannot be captured whole.
    """
    with reported():
        from . import model as cli_model
        from . import run as cli_run

        cli_run.check(cli_model.load(model, input))


@app.command()
def passes(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="module:function or file.py:function."),
    ] = None,
    pipeline: Pipeline = None,
    input: Inputs = [],  # noqa: B006
) -> None:
    """List the passes; given MODEL, run a pipeline on it and print the graph after each pass."""
    with reported():
        from . import passes as cli_passes

        if model is None:
            if pipeline is not None:
                raise CliError("--pipeline needs a model", "plait passes MODEL --pipeline ...")
            cli_passes.list_passes()
        else:
            cli_passes.run_pipeline(model, input, pipeline)


@app.command()
def run(
    model: Model,
    input: Inputs = [],  # noqa: B006
    pipeline: Pipeline = None,
    tune: Annotated[str, typer.Option(help="Race kernels: off, quick or full.")] = "quick",
    rounds: Annotated[
        int, typer.Option("--rounds", "-n", min=1, help="In which both take turns.")
    ] = 3,
    threads: Threads = None,
    save: Annotated[Path | None, typer.Option(help="Save the compiled model here.")] = None,
    gantt: Annotated[
        Path | None, typer.Option(help="Draw a typical run here, as .svg, .png or .pdf.")
    ] = None,
    weight_budget: Annotated[
        str | None, typer.Option(help="Weights in memory at once: bytes, 2GB, or 40%.")
    ] = None,
) -> None:
    """Compile MODEL, compare its answer with eager PyTorch's, and time both."""
    with reported():
        from . import model as cli_model
        from . import run as cli_run

        text = weight_budget or ""
        budget = int(text) if text.isdecimal() else weight_budget
        loaded = cli_model.load(model, input, weight_budget=budget)
        cli_run.run(loaded, pipeline, tune, rounds, threads, save, gantt, budget)


@app.command()
def trace(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write.")],
    input: Inputs = [],  # noqa: B006
    pipeline: Pipeline = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=1, help="Take the median.")] = 15,
) -> None:
    """Run MODEL compiled and write what ran when on which thread, for Perfetto or Chrome."""
    with reported():
        from . import model as cli_model
        from . import trace as cli_trace

        cli_trace.trace(cli_model.load(model, input), output, pipeline, threads, rounds)


@app.command()
def explain(
    model: Model,
    input: Inputs = [],  # noqa: B006
    pipeline: Pipeline = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Compile MODEL and show each step's kernel, time and bound, and every remark.

    With the ID of a remark or error instead, such as PLT-FUS-004, say what it means.
    """
    with reported():
        if model.startswith("PLT-"):
            from ...passes import remarks

            try:
                print(remarks.explain(model))
            except LookupError as error:
                raise CliError(str(error)) from None
            return
        from . import explain as cli_explain
        from . import model as cli_model

        cli_explain.explain(cli_model.load(model, input), pipeline, threads, json)


@app.command()
def kernels(
    model: Model,
    input: Inputs = [],  # noqa: B006
    pipeline: Pipeline = None,
    target: Annotated[str, typer.Option(help="The GPU's generation, such as sm_90.")] = "sm_90",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write CUDA C, cubins and the plan to this directory."),
    ] = None,
    json: Json = None,
) -> None:
    """Compile MODEL's kernels for a GPU, which need not be here, and predict how they will run."""
    with reported():
        from . import kernels as cli_kernels
        from . import model as cli_model

        cli_kernels.kernels(cli_model.load(model, input), pipeline, target, output, json)


@app.command()
def tune(
    model: Model,
    input: Inputs = [],  # noqa: B006
    pipeline: Pipeline = None,
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds to spend.")] = 300.0,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to try per kernel.")] = 64,
    threads: Threads = None,
) -> None:
    """Search faster kernels for MODEL; what is found stays in the cache. Can be interrupted."""
    with reported():
        from . import model as cli_model
        from . import tune as cli_tune

        cli_tune.tune(cli_model.load(model, input), pipeline, budget, trials, threads)


@app.command()
def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Gives the batches to run (the example inputs alone).",
        ),
    ] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Take the first of them only.")] = None,
    holdout: Annotated[float, typer.Option(help="The share that is kept apart.")] = 0.25,
    merge: Annotated[bool, typer.Option("--merge", help="Add to the profile there is.")] = False,
    input: Inputs = [],  # noqa: B006
) -> None:
    """Run MODEL as it is on some batches and write how its routers route."""
    with reported():
        from . import model as cli_model
        from . import profile as cli_profile

        loaded = cli_model.load(model, input, need_inputs=data is None)
        cli_profile.profile(loaded, output, data, batches, holdout, merge)


@app.command()
def place(
    problem: Annotated[
        str,
        typer.Argument(metavar="PROBLEM", help="A problem file, plain or .gz, or module:function."),
    ],
    devices: Annotated[
        str | None, typer.Option(metavar="SPEC", help="For a model: such as 4xh100:80GB,cpu:512GB.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="RATE,DELAY", help="For a model: such as 450GB/s,5us (50GB/s,10us)."),
    ] = None,
    host_link: Annotated[
        str | None,
        typer.Option(metavar="RATE,DELAY", help="For a model: between CPUs and others, if unlike."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="OPTIMIZER",
            help="For a model: plan a training step; none, sgd, momentum or adam.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the placement to this file.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="best, single, min-cut, m-topo, m-etf, m-sct or heft.")
    ] = "best",
    budget: Annotated[
        float, typer.Option(help="Seconds to plan, from the start of the process.")
    ] = 10.0,
    objective: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    seed: Annotated[int, typer.Option(help="The same seed gives the same placement.")] = 0,
    coarsen: Annotated[
        int | None, typer.Option(metavar="OPS", help="Join ops first, down to about so many.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Let activations be freed and computed again.")
    ] = False,
    offload: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Let activations wait on this device, such as cpu:0."),
    ] = None,
    problem_output: Annotated[
        Path | None, typer.Option("--problem", help="Write a model's problem to this file.")
    ] = None,
    rewritten: Annotated[
        Path | None,
        typer.Option(help="Write the problem with what is recomputed and offloaded to this file."),
    ] = None,
    device_map: Annotated[
        Path | None, typer.Option(help="Write a model's device_map, as accelerate takes it.")
    ] = None,
    gantt: Annotated[Path | None, typer.Option(help="Draw the step to this .png or .svg.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace of the step.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Place the ops of a problem on devices with limited memory, with a proven gap.

    Exits with 2, and writes nothing, where nothing fits; the message says on which devices, and by
    how many bytes.
    """
    with reported():
        from . import place as cli_place

        files = cli_place.Files(output, problem_output, rewritten, device_map, gantt, trace)
        options = {"algorithm": algorithm, "objective": objective, "budget": budget, "seed": seed,
                   "coarsen_to": coarsen, "recompute": recompute, "offload": offload}  # fmt: skip
        model = cli_place.Model(devices, link, host_link, train)
        cli_place.run(problem, files, options, quiet, model)


@app.command("place-experts")
def place_experts(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="What `plait profile` wrote.")],
    devices: Annotated[
        str, typer.Option(metavar="N|NAMES", help="How many, or their names: gpu0,gpu1.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the placement to this file.")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Most experts of a layer on a device (as even as can be).")
    ] = None,
    copies: Annotated[
        int, typer.Option(help="Room on each device for copies of busy experts, in each layer.")
    ] = 0,
    balance: Annotated[
        float | None,
        typer.Option(help="Most load of a device, times the mean (1.2, or as round robin has it)."),
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="The placement there is: move what pays off.")
    ] = None,
    move_cost: Annotated[
        float, typer.Option(help="Tokens that moving one expert must save to pay off.")
    ] = 0.0,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Routers to place (all).")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="best, round-robin or quadratic-assignment.")
    ] = "best",
    budget: Annotated[float, typer.Option(help="Seconds that best may take, about.")] = 5.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same placement.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Place the experts of a profiled model so that few tokens change devices between layers.

    Exits with 2, and writes nothing, where no placement keeps the loads within the limits.
    """
    with reported():
        from . import experts

        options = {"capacity": capacity, "copies": copies, "balance": balance, "previous": previous,
                   "move_cost": move_cost, "layers": layer or None, "algorithm": algorithm,
                   "budget": budget, "seed": seed}  # fmt: skip
        experts.run(profile, devices, output, quiet, options)


@cache_app.command("path")
def cache_path() -> None:
    """Print where the database is."""
    with reported():
        from . import cache as cli_cache

        cli_cache.path()


@cache_app.command("info")
def cache_info() -> None:
    """Show how many kernels there are and how much room they take."""
    with reported():
        from . import cache as cli_cache

        cli_cache.info()


@cache_app.command("verify")
def cache_verify() -> None:
    """Check every entry; damaged ones are removed and built again when needed."""
    with reported():
        from . import cache as cli_cache

        cli_cache.verify()


@cache_app.command("prune")
def cache_prune(
    size: Annotated[int, typer.Argument(metavar="MIB", min=0, help="How many MiB may stay.")],
) -> None:
    """Remove kernels of other versions, then those used longest ago, until MIB are left."""
    with reported():
        from . import cache as cli_cache

        cli_cache.prune(size)


@cache_app.command("clear")
def cache_clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove all kernels."""
    with reported():
        from . import cache as cli_cache

        cli_cache.clear(yes)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Workloads or groups (all), own models (module:function), or weights."),
    ] = None,
    size: Annotated[str, typer.Option(help="Of the models: cpu or paper.")] = "cpu",
    peers: Annotated[
        str, typer.Option(help="Engines, comma-separated.")
    ] = "plait,eager,eager-cl,compile,compile-freeze,compile-max,ort,openvino",
    rounds: Annotated[
        int, typer.Option("--rounds", "-n", min=1, help="In which engines take turns.")
    ] = 5,
    seconds: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Per engine and round.")
    ] = 0.25,
    threads: Threads = None,
    json: Json = None,
    warm: Annotated[bool, typer.Option("--warm", help="Use and fill the real cache.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Of weights and inputs: float32, bfloat16 or float16.")
    ] = "float32",
    list_: Annotated[bool, typer.Option("--list", help="List workloads and engines.")] = False,
) -> None:
    """Measure workloads or own models on plait and other engines, interleaved."""
    with reported():
        from . import bench as cli_bench

        if list_:
            cli_bench.show_registry()
        else:
            cli_bench.bench(names or [], size, peers, rounds, seconds, threads, json, warm, dtype)


def main() -> None:
    """Entry point of the ``plait`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="replace")  # ASCII lacks the lines of tables
    run_app(app)
