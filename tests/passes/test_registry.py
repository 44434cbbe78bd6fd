"""Registry: names become passes lazily, plugins join, mistakes are told."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from plait.passes import registry
from plait.passes.base import Pass, PassResult
from plait.passes.normalize import Normalize


@dataclass(frozen=True)
class Plugin(Pass):
    name: ClassVar[str] = "my-plugin"

    def run(self, graph_module):
        return PassResult(graph_module)


@pytest.fixture
def clean():
    yield
    registry.unregister("my-plugin")


def test_built_in_names_are_found():
    assert registry.lookup("normalize") is Normalize
    for name in registry._BUILT_IN:
        assert registry.lookup(name).name == name


def test_the_package_offers_what_a_plugin_needs_without_importing_torch():
    code = (
        "import sys, plait.passes, plait.passes.remarks; assert 'torch' not in sys.modules;"
        "from plait.passes import Pass, PassResult, Remark, register"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_names_imports_no_pass():
    code = (
        "import sys, plait.passes.registry as r; r.names();"
        "assert 'plait.passes.normalize' not in sys.modules and 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_and_a_path_can_be_registered(clean):
    registry.register("my-plugin", Plugin)
    assert registry.lookup("my-plugin") is Plugin
    registry.register("my-plugin", "plait.passes.normalize:Normalize", replace=True)
    assert registry.lookup("my-plugin") is Normalize


def test_entry_points_join_but_cannot_take_a_built_in_name(monkeypatch):
    plugins = {"theirs": "plait.passes.normalize:Normalize", "normalize": "nowhere:Evil"}
    monkeypatch.setattr(registry, "_plugins", lambda: plugins)
    assert registry.lookup("theirs") is Normalize
    assert registry.lookup("normalize") is Normalize


def test_a_name_is_taken_over_only_on_request(clean):
    registry.register("my-plugin", Plugin)
    with pytest.raises(ValueError, match="replace=True"):
        registry.register("my-plugin", Plugin)
    with pytest.raises(ValueError, match="exists"):
        registry.register("normalize", Plugin)


@pytest.mark.parametrize("name", ["My", "a_b", "a--b", ""])
def test_malformed_names_are_refused(name):
    with pytest.raises(ValueError, match="lower case words"):
        registry.register(name, Plugin)


def test_malformed_targets_are_refused():
    with pytest.raises(ValueError, match="module:Class"):
        registry.register("my-plugin", "plait.passes.normalize")


def test_unknown_names_propose_the_nearest():
    with pytest.raises(registry.UnknownPass, match="did you mean fuse-vertical"):
        registry.lookup("fuse-vertcal")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_here:Class", "cannot be imported"),
        ("plait.passes.normalize:Nothing", "cannot be imported"),
        ("plait.passes.remarks:Remark", "not a subclass"),
    ],
)
def test_broken_targets_say_why(clean, target, message):
    registry.register("my-plugin", target)
    with pytest.raises(registry.BrokenPass, match=message):
        registry.lookup("my-plugin")
