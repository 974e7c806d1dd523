"""Settings for all tests."""

from __future__ import annotations

import logging
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

#: Helpers, and scripts that tests start in processes of their own: doctest would import them.
collect_ignore_glob = ["*/_[a-z]*.py", "helpers/*"]
# `pythonpath` of the pytest settings, for the processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

_LOGGERS = [
    logging.getLogger(name) for name in ("", "lightning_mue", "lightning.pytorch", "lightning.fabric", "transformers")
]
#: Settings of the whole process, each with what puts it back.
_STATE = [
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    *((lambda log=log: log.level, log.setLevel) for log in _LOGGERS),
]


@pytest.fixture(autouse=True)
def _seeded(request):
    """What a test draws does not depend on the tests before it. LIGHTNING_MUE_TEST_SEED=1, 2, ... gives other draws."""
    seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("LIGHTNING_MUE_TEST_SEED", "0"))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what `seed_everything` sets


@pytest.fixture(autouse=True)
def _as_found():
    """The state of the process that a test changes is as before for the next one.

    The environment: `seed_everything` leaves its seed there, for Trainers of later tests and of their processes. One thread:
    the tensors of the tests are too small to share out, and spinning workers slow a loaded machine down.
    """
    environment = dict(os.environ)
    restore = [(put, get()) for get, put in _STATE]
    torch.set_num_threads(1)
    yield
    for put, value in restore:
        put(value)
    if dict(os.environ) != environment:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing that a Trainer writes by default lands in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _float32_by_default(monkeypatch):
    """Newton-Schulz in float32 wherever a test does not name another type: some CPUs would choose bfloat16."""
    monkeypatch.setenv("LIGHTNING_MUE_CPU_DTYPE", "float32")
