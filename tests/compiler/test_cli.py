"""The command line: right answers, and one clear error with cause and mend for each fault."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from plait.compiler.cli import app
from plait.compiler.pipeline import DEFAULT_PIPELINE
from plait.passes import registry
from plait.passes.pipeline_print import print_value

MODELS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        return torch.relu(self.linear(x)) * 2

class Branchy(Small):
    def forward(self, x):
        return x + 1 if self.linear(x).sum() > 0 else x - 1

class Asks(nn.Module):
    def forward(self, x):
        y = torch.kthvalue(x, 2)[0]
        return y + 1 if x.sum() > 0 else y - 1

def small():
    torch.manual_seed(0)
    return Small().eval(), (torch.randn(4, 8),)

def named():
    return Small().eval(), {"x": torch.randn(4, 8)}

def bare():
    return Small().eval()

def branchy():
    return Branchy().eval(), (torch.ones(8),)

def asks():
    return Asks(), (torch.ones(3),)

def misfit():
    return Small().eval(), (torch.ones(3),)

def sums():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.logcumsumexp(x, 0)
    return Sums(), (torch.randn(9),)

def routes():
    import plait
    branches = [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))]
    scorer = nn.Sequential(nn.Linear(8, 2), nn.Softmax(-1))
    return plait.Router(branches, scorer).eval(), (torch.randn(6, 8),)

def leaves():
    raise SystemExit(3)

def fails():
    raise RuntimeError("no weights here")

def text():
    return "not a model", ()

def function():
    return torch.relu, (torch.ones(3),)

instance = Small().eval()
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models_of_test_cli.py"
    path.write_text(MODELS, encoding="utf-8")
    return str(path)


def plait(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app.app, [str(a) for a in arguments], terminal_width=100)


def error_of(*arguments: str | Path, code: int = 2) -> str:
    result = plait(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.output
    return lines[-1]


def test_help_names_every_command() -> None:
    result = plait("--help")
    assert result.exit_code == 0
    for command in ("check", "passes", "run", "explain", "profile", "trace", "cache", "bench"):
        assert command in result.output


def test_version_is_the_packages() -> None:
    import plait as package

    assert plait("--version").output.strip() == package.__version__


# -- naming a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cause", "mend"),
    [
        ("nothing", "is neither a file nor module:function", "write it as package.module:function"),
        ("no_such_module_x:f", "raised ModuleNotFoundError", "check the name"),
        ("{models}:smal", "has no 'smal'", "did you mean 'small'?"),
        ("{models}:leaves", "raised SystemExit: 3", "it is called without arguments"),
        ("{models}", "names no function", ":function"),
        ("/nowhere/model.py:f", "there is no file /nowhere/model.py", "check the path"),
        ("{models}:fails", "raised RuntimeError: no weights here", "is called without arguments"),
        ("{models}:text", "gave a str, not a model", "return a model"),
        ("{models}:bare", "comes without example inputs", "--input"),
    ],
)
def test_a_wrong_model_name_gets_one_clear_line(
    models: str, name: str, cause: str, mend: str
) -> None:
    line = error_of("check", name.format(models=models))
    assert cause in line
    assert mend in line


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("4,8", "is not understood"),
        ("float33[4]", "no dtype 'float33'"),
        ("float32[,,]", "is not understood"),
        ("float32[3,99999999999999999999]", "cannot be made: randn(): argument 'size'"),
        ("float32[3000000000,3000000000]", "cannot be made: Storage size calculation overflowed"),
        ("qint8[3]", "cannot be made: empty_strided not supported on quantized"),
    ],
)
def test_a_wrong_input_gets_one_clear_line(models: str, text: str, cause: str) -> None:
    assert cause in error_of("check", f"{models}:bare", "--input", text)


def test_debug_shows_the_traceback(models: str) -> None:
    result = plait("--debug", "check", f"{models}:fails")
    assert result.exit_code == 1
    assert "no weights here" in str(result.exception)


# -- check --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "named"])
def test_check_reports_inputs_and_operators(models: str, name: str) -> None:
    result = plait("check", f"{models}:{name}")
    assert result.exit_code == 0, result.output
    assert "captured whole" in result.output
    assert "x: float32[4, 8] on cpu" in result.output
    assert "gemm" in result.output


def test_check_takes_a_module_instance_with_inputs(models: str) -> None:
    result = plait("check", f"{models}:instance", "-i", "float32[2,8]")
    assert "float32[2, 8]" in result.output


def test_check_names_library_operators_and_why(models: str) -> None:
    result = plait("check", f"{models}:sums")
    assert result.exit_code == 0
    assert "run by library" in result.output
    assert "aten.logcumsumexp" in result.output


def test_check_fails_where_the_model_cannot_be_captured(models: str) -> None:
    result = plait("check", f"{models}:branchy")
    assert result.exit_code == 1
    assert "not captured: PLT-CAP-001" in result.output
    assert "would run the original model" in result.output
    assert "fails on its example inputs" in error_of("check", f"{models}:misfit")


def test_check_captures_as_compiling_does(models: str) -> None:
    result = plait("check", f"{models}:asks")
    assert result.exit_code == 0 and "PLT-CAP-023" in result.output, result.output
    assert "in training mode" in result.output
    assert "aten.kthvalue" in result.output and "getitem" not in result.output


def test_commands_look_into_branches(models: str) -> None:
    result = plait("check", f"{models}:routes")
    assert result.exit_code == 0 and "plait_branches" not in result.output
    assert "run by library" not in result.output
    result = plait("run", f"{models}:routes", "--rounds", "1")
    assert result.exit_code == 0 and "1 choices of branches" in result.output
    result = plait("explain", f"{models}:routes")
    assert result.exit_code == 0 and "branches" in result.output


# -- passes -------------------------------------------------------------------------------------


def test_passes_lists_passes_with_options_as_pipelines_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = plait("passes")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    told = dict(line for line in lines if len(line) == 2)
    for word in ("fold_batch_norm=true", "max_nodes=64", "evict=value", "likely=0.9"):
        assert word in told
    # Every pass and every option of one says what it does.
    for name in registry.names():
        assert told[name], name
        for field in dataclasses.fields(registry.lookup(name)):
            assert told[f"{field.name}={print_value(field.default)}"], (name, field.name)
    assert DEFAULT_PIPELINE in result.output


def test_passes_prints_the_graph_after_each_pass(models: str) -> None:
    result = plait("passes", f"{models}:small", "-p", "normalize,normalize,fuse-vertical")
    assert result.exit_code == 0, result.output
    assert result.output.index("# captured") < result.output.index("# after normalize")
    assert "(unchanged)" in result.output
    assert "# after fuse-vertical" in result.output


@pytest.mark.parametrize(
    ("pipeline", "word"),
    [
        ("normalise", "did you mean normalize?"),
        ("normalize{fold=1}", "has no option 'fold'"),
        ("normalize{", "expected"),
    ],
)
@pytest.mark.parametrize("command", ["passes", "run"])
def test_a_wrong_pipeline_is_explained(models: str, command: str, pipeline: str, word: str) -> None:
    result = plait(command, f"{models}:small", "--pipeline", pipeline)
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_a_pipeline_needs_a_model() -> None:
    assert "--pipeline needs a model" in error_of("passes", "-p", "normalize")


# -- run and explain ----------------------------------------------------------------------------


def test_run_compares_and_times(models: str) -> None:
    result = plait("run", f"{models}:small", "-n", "1")
    assert result.exit_code == 0, result.output
    assert "largest difference from eager" in result.output
    assert "plait" in result.output
    assert "p50 ms" in result.output


def test_run_saves_and_takes_what_it_saved(models: str, tmp_path: Path) -> None:
    path = tmp_path / "small.plait"
    result = plait("run", f"{models}:small", "-n", "1", "--save", path)
    assert result.exit_code == 0, result.output
    again = plait("run", path, "-n", "1")
    assert again.exit_code == 0, again.output
    assert "leave --pipeline and --tune out" in error_of("run", path, "--pipeline", "normalize")
    path.write_bytes(path.read_bytes()[:-100])
    assert error_of("run", path)


def test_run_says_why_a_model_was_not_compiled(models: str) -> None:
    assert "was not compiled" in error_of("run", f"{models}:branchy")


def test_run_names_a_wrong_tune_level(models: str) -> None:
    assert "use one of" in error_of("run", f"{models}:small", "--tune", "fast")


def test_explain_tells_what_an_id_means() -> None:
    result = plait("explain", "PLT-FUS-002")
    assert result.exit_code == 0 and "library" in result.output
    assert "did you mean PLT-FUS-0" in error_of("explain", "PLT-FUS-999")


def test_explain_shows_each_step_and_writes_json(models: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = plait("explain", f"{models}:small", "--json", path)
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text(encoding="utf-8"))
    assert len(document["steps"]) >= 1
    for step in document["steps"]:
        assert step["seconds"] > 0
        assert step["bound_by"] in ("compute", "memory")
    assert document["remarks"]
    assert document["limits"]["measured"] >= document["limits"]["path"] > 0
    for name in ("critical path", "work over workers", "compulsory bytes", "FLOPs"):
        assert f"bound: {name}" in result.output


@pytest.mark.parametrize(
    ("command", "option"), [("explain", "--json"), ("run", "--save"), ("bench", "--json")]
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    models: str, tmp_path: Path, command: str, option: str
) -> None:
    what = "chain30" if command == "bench" else f"{models}:small"
    os.mkfifo(tmp_path / "pipe")
    for path, cause in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "does not exist"),
        (tmp_path / "pipe", "is no regular file"),
    ):
        result = plait(command, what, option, path)
        assert result.exit_code == 2 and cause in result.stderr
        assert not result.stdout


# -- cache --------------------------------------------------------------------------------------


def test_cache_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "cache"))
    assert plait("cache", "path").output.strip() == str(tmp_path / "cache")
    assert "kernels" in plait("cache", "info").output
    assert plait("cache", "verify").exit_code == 0
    assert "add --yes" in error_of("cache", "clear")
    assert "removed 0 libraries" in plait("cache", "clear", "--yes").output


@pytest.mark.parametrize("command", [("clear", "--yes"), ("prune", "1")])
def test_a_cache_that_cannot_be_written_is_not_said_to_be_changed(
    command: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "file"))
    assert "file cannot be written" in error_of("cache", *command)


def test_cache_prune_leaves_so_many_mebibytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    plait("cache", "info")
    library = tmp_path / "objects" / "ab" / f"{'ab' * 16}.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(3 << 20))
    os.utime(library, (0, 0))
    assert "removed 3.0 MiB" in plait("cache", "prune", "2").output
    assert not library.exists()
    assert "removed 0.0 MiB" in plait("cache", "prune", "2").output


def test_cache_verify_removes_damage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    damaged = tmp_path / "objects" / "ab" / f"{'ab' * 16}.so"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a library")
    result = plait("cache", "verify")
    assert result.exit_code == 1
    assert "damaged, removed" in result.output
    assert not damaged.exists()


# -- bench --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["chain31"], "did you mean 'chain30'?"),
        (["--peers", "eagr"], "did you mean 'eager'?"),
        (["--peers", ","], "names no engine"),
        (["--size", "big"], "unknown size 'big'; use cpu or paper"),
        (["--json", "/nowhere/out.json"], "/nowhere does not exist"),
    ],
)
def test_wrong_bench_options_get_one_clear_line(arguments: list[str], cause: str) -> None:
    assert cause in error_of("bench", *arguments)


def test_bench_lists_what_there_is() -> None:
    output = plait("bench", "--list").output
    assert "inception_v3" in output
    assert "openvino" in output


def test_bench_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = plait(
        "bench", "chain30", "--peers", "eager", "-n", "1", "--seconds", "0.01", "--json", path
    )
    assert result.exit_code == 0, result.output
    assert "chain30 (cpu, float32)" in result.output
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["results"][0]["status"] == "OK"
    assert document["environment"]["cores"]


def test_bench_takes_a_model_of_the_users(models: str) -> None:
    few = ("--peers", "plait,eager", "-n", "1", "--seconds", "0.01")
    result = plait("bench", f"{models}:small", *few)
    assert result.exit_code == 0, result.output
    assert ":small (cpu, float32)" in result.output.replace("\n", "")
    assert "has named example inputs" in error_of("bench", f"{models}:named", *few)
    assert "gave no torch.nn.Module" in error_of("bench", f"{models}:function", *few)
    assert "did you mean 'chain30'?" in error_of("bench", f"{models}:small", "chain31", *few)


def test_trace_writes_lanes_for_what_was_planned_and_measured(models: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    result = plait("trace", f"{models}:small", "-o", path, "-t", 2)
    assert result.exit_code == 0, result.output
    events = json.loads(path.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in slices} == {1, 2}
    assert all(e["dur"] >= 0 and e["tid"] in (0, 1) for e in slices)
    assert any(e["ph"] == "M" and e["args"]["name"] == "measured" for e in events)
    assert "bound: work" in result.output
    assert not list(tmp_path.glob(".t.json*"))
    assert "does not exist" in error_of("trace", f"{models}:small", "-o", tmp_path / "no" / "t")


def test_a_run_can_be_drawn(models: str, tmp_path: Path) -> None:
    result = plait("run", f"{models}:small", "--gantt", tmp_path / "g.svg", "-n", 1)
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "g.svg").read_text()
    assert ".svg" in error_of("run", f"{models}:small", "--gantt", tmp_path / "g.txt")
    assert not (tmp_path / "g.txt").exists()


def test_a_picture_is_written_whole_or_not_at_all(
    models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(figure: object, path: str | Path, **_: object) -> None:
        Path(path).write_text("<svg")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    picture = tmp_path / "g.svg"
    told = error_of("run", f"{models}:small", "--gantt", picture, "-n", 1, "--tune", "off")
    assert "g.svg cannot be written" in told
    assert not list(tmp_path.glob("*g.*"))
