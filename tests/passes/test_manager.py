"""Manager: passes run in order, watched, verified and bisected."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from plait.passes.annotations import KEY
from plait.passes.base import Pass, PassResult, allow, copy_graph
from plait.passes.manager import PassFailed, PassManager
from plait.passes.normalize import Normalize
from plait.passes.remarks import Remark
from plait.passes.verifier import InvalidGraph

from .graphs import Builder, aten, named, targets


@dataclass(frozen=True)
class Breaks(Pass):
    """Drops the values of a graph, or raises."""

    name: ClassVar[str] = "breaks"
    raises: bool = False

    def run(self, graph_module):
        if self.raises:
            raise KeyError("oops")
        result = copy_graph(graph_module)
        named(result, "relu_default").meta.clear()
        return PassResult(result)


@dataclass(frozen=True)
class Respells(Pass):
    """Respells each relu, if allowed; one of them wrongly."""

    name: ClassVar[str] = "respells"

    def run(self, graph_module):
        result = copy_graph(graph_module)
        for node in result.graph.nodes:
            if node.target is aten.relu.default and allow("respell", [node]):
                wrong = node.name == "relu_default_2"
                node.target = aten.neg.default if wrong else aten.relu6.default
        result.recompile()
        return PassResult(result, (Remark("PLT-NRM-009", "done", self.name, (), "broke"),))


def chain(n=1):
    b = Builder()
    x = b.input(4)
    for _ in range(n):
        x = b.call(aten.relu.default, x)
    return b.finish(b.call(aten.mul.Tensor, x, 1))


def test_passes_run_in_order_and_leave_records():
    graph_module = chain()
    before = str(graph_module.graph)
    result = PassManager("normalize,normalize,fuse-vertical").run(graph_module)
    assert [r.changed for r in result.records] == [True, False, True]
    assert [r.text for r in result.records] == ["normalize", "normalize", "fuse-vertical"]
    assert str(graph_module.graph) == before
    assert "PLT-NRM-007" in [r.id for r in result.remarks]
    assert str(result.records[1]).endswith("ms, (unchanged)")
    assert "4 -> 3 nodes" in str(result.records[0])


def test_the_graph_knows_what_made_it_and_the_one_before_does_not():
    graph_module = chain()
    result = PassManager([Normalize()]).run(graph_module)
    assert result.graph_module.meta[KEY].made_by == "normalize"
    assert KEY not in graph_module.meta


def test_every_stage_is_dumped_and_an_unchanged_one_is_not_repeated(tmp_path):
    PassManager("normalize,normalize,fuse-vertical", dump_dir=tmp_path / "new").run(chain())
    files = sorted((tmp_path / "new").iterdir())
    assert [f.name for f in files] == [
        "00-input.py",
        "01-normalize.py",
        "02-normalize.py",
        "03-fuse-vertical.py",
    ]
    assert files[1].read_text().startswith("# after normalize (")
    assert "relu" in files[1].read_text() and "mul" not in files[1].read_text()
    assert files[2].read_text().endswith("# (unchanged)\n")
    assert "relu" not in files[2].read_text()


def test_a_dump_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        PassManager("normalize", dump_dir=tmp_path / "file")


def test_an_invalid_graph_is_refused_before_the_first_pass():
    graph_module = chain()
    named(graph_module, "relu_default").meta.clear()
    with pytest.raises(InvalidGraph, match="before the first pass"):
        PassManager("normalize").run(graph_module)


def test_a_pass_that_leaves_an_invalid_graph_is_named():
    with pytest.raises(PassFailed, match="pass breaks failed: invalid graph after breaks"):
        PassManager([Breaks()]).run(chain())
    PassManager([Breaks()], verify="off").run(chain())


def test_a_pass_that_raises_is_named_with_its_options():
    with pytest.raises(PassFailed, match=r"pass breaks\{raises=true\} failed: KeyError") as caught:
        PassManager([Breaks(raises=True)]).run(chain())
    assert isinstance(caught.value.__cause__, KeyError)


def test_halving_the_limit_finds_the_guilty_transformation():
    graph_module = chain(5)
    x = torch.ones(4)

    def good(limit):
        result = PassManager([Normalize(), Respells()], limit=limit).run(graph_module)
        return torch.equal(result.graph_module(x)[0], x), result

    total = good(None)[1].transformations
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle)[0] else (low, middle)
    assert good(high)[1].last_transformation == "respell relu_default_2"
    assert targets(good(low)[1].graph_module) == [aten.relu6.default] * 2 + [aten.relu.default] * 3


def test_a_limit_of_zero_changes_nothing():
    graph_module = chain()
    result = PassManager("normalize", limit=0).run(graph_module)
    assert result.graph_module is graph_module and result.transformations > 0


def test_the_environment_sets_limit_dumps_and_verification(monkeypatch, tmp_path):
    monkeypatch.setenv("PLAIT_BISECT_LIMIT", "0")
    monkeypatch.setenv("PLAIT_DUMP_DIR", str(tmp_path))
    monkeypatch.setenv("PLAIT_VERIFY", "full")
    manager = PassManager("normalize")
    assert (manager.limit, manager.level, len(manager.observers)) == (0, "full", 1)
    assert PassManager("normalize", limit=7).limit == 7


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PLAIT_BISECT_LIMIT", "many", "PLAIT_BISECT_LIMIT must be a whole number, is 'many'"),
        ("PLAIT_VERIFY", "maybe", r"PLAIT_VERIFY\) is one of off, structure, full, not 'maybe'"),
    ],
)
def test_bad_environment_variables_are_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        PassManager("normalize")


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="limit must not be negative"):
        PassManager("normalize", limit=-1)


def test_observers_see_every_stage():
    class Log:
        def __init__(self):
            self.seen = []

        def start(self, graph_module):
            self.seen.append("start")

        def after(self, record, graph_module):
            self.seen.append((record.text, len(graph_module.graph.nodes)))

    log = Log()
    PassManager("normalize,fuse-vertical", observers=[log]).run(chain())
    assert log.seen == ["start", ("normalize", 3), ("fuse-vertical", 3)]
