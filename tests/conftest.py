"""What all tests share: numbers drawn, a kernel cache, and few searches for garbage."""

from __future__ import annotations

import gc
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Before torch starts: idle OpenMP threads of parallel test processes must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# How long an example takes says how busy the machine is: nothing is wrong where it is slow. Every
# run has the same examples; `--hypothesis-profile=chance` draws others.
settings.register_profile("chance", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("plait", settings.get_profile("chance"), derandomize=True)
settings.load_profile("plait")


def pytest_collection_finish() -> None:
    """What was imported until now is no garbage: searching it took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test, with its fixtures, draws the same numbers whatever files were tested before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_functions() -> Iterator[None]:
    """No test leaves torch's functions without modes and overrides, for those after it."""
    yield
    enabled = torch._C._TorchFunctionState.ENABLED
    if (state := torch._C._get_torch_function_state()) != enabled:
        torch._C._set_torch_function_state(enabled)
        pytest.fail(f"torch functions are left {state}")


@pytest.fixture(autouse=True)
def samples_are_no_test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch searches the stack, with its sources, for a TestCase whenever it draws samples."""
    for name in ("common_utils", "opinfo.core"):
        if (module := sys.modules.get(f"torch.testing._internal.{name}")) is not None:
            monkeypatch.setattr(module, "extract_test_fn", lambda: None, raising=False)


@pytest.fixture
def kernels_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """No race is won by the library: on a busy machine it may win by chance."""
    from plait.compiler.lowering.trial import Trial

    monkeypatch.setattr(Trial, "library_seconds", lambda self: math.inf)


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[str]:
    """An empty cache directory for the whole run of one test process."""
    before = os.environ.get("PLAIT_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="plait-test-") as folder:
        os.environ["PLAIT_CACHE_DIR"] = folder
        yield folder
    if before is None:
        del os.environ["PLAIT_CACHE_DIR"]
    else:
        os.environ["PLAIT_CACHE_DIR"] = before
