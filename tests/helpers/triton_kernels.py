"""Imports Triton kernels for the tests: compiled where there is a CUDA device, else run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = "lightning_mue.kernels."
EXPERTS = KERNELS + "grouped_ffn.triton."


@cache
def load_kernels(name: str, path: Path | None = None) -> ModuleType:
    """Import a module with kernels anew, for the interpreter where there is no device; once a process.

    Triton reads TRITON_INTERPRET when a kernel is defined. Triton itself is imported without it: some other test
    may have done so before, and its own library then stays as it was loaded.
    """
    pytest.importorskip("triton")
    import triton.experimental.gluon
    import triton.language  # noqa: F401

    for part in [
        m for m in sys.modules if m == name or m.startswith(name + "_")
    ]:  # triton.py and, beside it, triton_*.py
        del sys.modules[part]
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        if path is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@cache
def load_experts() -> ModuleType:
    """The experts' kernels: their entry and, anew with it, the modules that it is made of."""
    for name in ("triton_tools.launching", "combine.triton"):
        sys.modules.pop(KERNELS + name, None)
    for name in ("activations", "tile_map", "tilings", "tuning", "up", "rows", "hidden", "weights"):
        sys.modules.pop(EXPERTS + name, None)
    return load_kernels(EXPERTS + "experts")


def part_of_experts(name: str) -> ModuleType:
    """A module that the experts' kernels, as loaded, are made of."""
    elsewhere = {"combine": "combine.triton", "launching": "triton_tools.launching"}
    return sys.modules[KERNELS + elsewhere[name] if name in elsewhere else EXPERTS + name]


def load_all() -> None:
    """All kernels of backend="triton", so that it runs where the tests run."""
    load_experts()
    for op in ("routing", "dispatch"):
        load_kernels(f"{KERNELS}{op}.triton")
