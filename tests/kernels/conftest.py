"""The Triton kernels of a test: compiled where there is a CUDA device, else run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_kernels(name: str, path: Path | None = None) -> ModuleType:
    """Import a module with kernels anew, for the interpreter where there is no device.

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


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def triton_symmetric() -> ModuleType:
    return load_kernels("lightning_mue.kernels._triton.symmetric")


@pytest.fixture(scope="session")
def walk(triton_symmetric: ModuleType) -> ModuleType:
    """Kernels that write down what the tile map of `triton_symmetric` gives."""
    return load_kernels("tests_kernels_walk", Path(__file__).parent / "_walk.py")
