from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from _kernel_loading import load_all

_PATH = Path(__file__).parent.parent / "references" / "moe_reference.py"
_SPEC = importlib.util.spec_from_file_location("moe_reference", _PATH)
_REFERENCE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_REFERENCE)


@pytest.fixture(scope="session")
def reference():
    return _REFERENCE


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_backend():
    """Makes backend="triton" run on the CPU, in Triton's interpreter, for the tests that follow."""
    load_all()
