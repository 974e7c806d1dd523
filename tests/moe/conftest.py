from __future__ import annotations

import pytest
import torch
from helpers import moe_reference
from helpers.triton_kernels import load_all


@pytest.fixture(scope="session")
def reference():
    return moe_reference


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
