from __future__ import annotations

import pytest
import torch
from helpers import moe_reference
from helpers.triton_kernels import load_all

from lightning_mue.moe import layer, masks, passes


@pytest.fixture(scope="session")
def reference():
    return moe_reference


@pytest.fixture(autouse=True)
def _warnings_of_one_time_only():
    """Warnings that come once in a process come once in each test, whichever ran before it."""
    for told in (layer._warn_of_reentrant_checkpoint, masks._warn_of_misfit, passes._warn_of_unused_loss):
        told.cache_clear()


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
