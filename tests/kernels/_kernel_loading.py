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
PACKAGE = "lightning_mue.kernels._triton."


@cache
def load_kernels(name: str, path: Path | None = None) -> ModuleType:
    """Import a module with kernels anew, for the interpreter where there is no device; once a process.

    Triton reads TRITON_INTERPRET when a kernel is defined. Triton itself is imported without it: some other test
    may have done so before, and its own library then stays as it is there.
    """
    pytest.importorskip("triton")
    import triton.experimental.gluon
    import triton.language  # noqa: F401

    sys.modules.pop(name, None)
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
    """The experts' kernels: `grouped_ffn` and, anew with it, the modules that it is made of."""
    parts = ("launching", "activations", "tile_map", "tuning", "combine")
    for part in (*parts, "grouped_up", "grouped_rows", "grouped_hidden", "grouped_weights"):
        sys.modules.pop(PACKAGE + part, None)
    return load_kernels(PACKAGE + "grouped_ffn")


def load_all() -> None:
    """All kernels of backend="triton", so that it runs where the tests run."""
    load_experts()
    for part in ("routing", "dispatch"):
        load_kernels(PACKAGE + part)
