"""Packaging: the repository's root is the package ``plait``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_FOUND = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text("utf-8"), re.M)
assert _FOUND is not None
VERSION = _FOUND[1]

LAYERS = ("bench", "compiler", "kernels", "passes", "runtime")
FOLDERS = [p.parent.relative_to(ROOT) for x in LAYERS for p in (ROOT / x).rglob("__init__.py")]
PACKAGES = ["plait", *sorted(".".join(("plait", *folder.parts)) for folder in FOLDERS)]

REQUIRED = [
    "apache-tvm==0.27.0.post1",
    "apache-tvm-ffi==0.1.14.post0",  # MetaSchedule crashes with 0.1.15
    "cloudpickle",
    "filelock",
    "matplotlib",
    "networkx",
    "numpy",
    "platformdirs",
    "psutil",
    "rich",
    "safetensors",
    "scipy",
    "sympy",
    "torch==2.13.0",
    "typer",
]

EXTRAS = {
    "bench": ["onnx", "onnxruntime", "onnxscript", "openvino", "transformers>=5.23,<6"],
    "test": [
        "expecttest",
        "hypothesis",
        "pyright",
        "pytest",
        "pytest-xdist",
        "ruff",
        "transformers>=5.23,<6",
    ],
    "tune": ["xgboost-cpu"],
}

setup(
    name="plait",
    version=VERSION,
    description="A graph-level deep-learning compiler for PyTorch models that branch",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"plait.passes.placement": ["*.c"]},
    package_dir={"plait": "."},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["plait = plait.compiler.cli:main"],
        "torch_dynamo_backends": ["plait = plait.compiler.backend:plait_backend"],
    },
)
