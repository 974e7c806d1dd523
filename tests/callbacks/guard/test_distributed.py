"""StabilityGuard on two processes, DDP and FSDP2 over gloo. One launch runs all fits (_ranks.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from callbacks.guard import _ranks
from helpers.guarded import furthest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", _ranks.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", _ranks.CASES, ids=str)
@pytest.mark.parametrize("name", _ranks.STRATEGIES)
def test_all_ranks_skip_exactly_one_step(seen, name, case):
    ranks = [run[(name, *map(str, case))] for run in seen]
    assert [run["skipped"] for run in ranks] == [1, 1]
    assert furthest(ranks[0]["weights"], ranks[1]["weights"]) == 0
    assert all(bool(w.isfinite().all()) for w in ranks[0]["weights"].values())
    # Bitwise the run that never saw the window.
    assert furthest(ranks[0]["weights"], seen[0][name, "reference", case[2], case[3]]) == 0
    (decision,) = ranks[0]["decisions"]
    assert (decision["step"], decision["kind"], decision["action"]) == (3, "nonfinite", "skip")
    if case[0] == "loss":
        assert "rank 1" in decision["where"]


def test_ranks_that_hold_different_experts_skip_together(seen):
    ranks = [run["experts"] for run in seen]
    assert [run["skipped"] for run in ranks] == [1, 1]
    assert furthest(ranks[0]["weights"], ranks[1]["weights"]) == 0
    assert furthest(ranks[0]["weights"], seen[0]["experts, never seen"]["weights"]) == 0
    assert ranks[0]["weights"]["bias"].abs().max() > 0


def test_without_the_guard_the_weights_are_lost(seen):
    """The control: FSDP2 with clipping, where Lightning has no check of its own that holds."""
    assert not all(bool(w.isfinite().all()) for w in seen[0]["without"].values())


@pytest.mark.parametrize("name", _ranks.STRATEGIES)
def test_all_ranks_go_back_together(seen, name):
    ranks = [run[name, "rollback"] for run in seen]
    assert furthest(ranks[0]["weights"], ranks[1]["weights"]) == 0
    assert ranks[0]["decisions"][0]["kind"] == "spike"
    assert "went back" in ranks[0]["decisions"][0]["done"]
    assert [d["step"] for d in ranks[0]["decisions"]] == [d["step"] for d in ranks[1]["decisions"]]
    assert {d["step"] for d in ranks[0]["decisions"]} == {30}
    rows = [json.loads(line) for line in ranks[0]["samples"].splitlines()]
    assert {row["rank"] for row in rows} == {0, 1}
    assert [row["total_batch"] for row in rows if row["rank"] == 1] == list(range(30, 31))
