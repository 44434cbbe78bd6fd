"""What a measurement was made on: the header of every report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import platformdirs
import psutil
import torch

# plait's cache directory as it is at import: `plait bench` measures with an empty one of its own.
CACHE = Path(os.environ.get("PLAIT_CACHE_DIR") or platformdirs.user_cache_dir("plait"))
PACKAGES = ("torch", "apache-tvm", "apache-tvm-ffi", "transformers", "onnxruntime", "openvino")


def cpu_name() -> str:
    """The processor's name, from /proc where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_hash() -> str:
    """The commit of the source tree, with "+" where files differ from it; "" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str | None:
    """The installed version of ``package``; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """CPU, cores, versions, commit and load, as plain JSON values."""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p))},
        "commit": git_hash(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "PLAIT_"))},
    }
