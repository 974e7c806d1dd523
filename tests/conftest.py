"""Settings for all tests."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

#: Helpers, and scripts that tests start in processes of their own: doctest would import them.
collect_ignore_glob = ["*/_[a-z]*.py", "helpers/*"]
# `pythonpath` of the pytest settings, for the processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def _seeded(request):
    """What a test draws does not depend on the tests before it. LIGHTNING_MUE_TEST_SEED=1, 2, ... gives other draws."""
    seed = int(os.environ.get("LIGHTNING_MUE_TEST_SEED", "0"))
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + seed)


@pytest.fixture(autouse=True)
def _seed_of_no_other_test():
    """`seed_everything` leaves its seed in the environment; Trainers of later tests, and of their processes, would take it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors of the tests are too small to share out, and spinning workers slow a loaded machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing that a Trainer writes by default lands in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _float32_by_default(monkeypatch):
    """Newton-Schulz in float32 wherever a test does not name another type: some CPUs would choose bfloat16."""
    monkeypatch.setattr("lightning_mue.optim.precision._cpu_has_bfloat16_units", lambda: False)
