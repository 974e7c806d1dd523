"""Two ranks measure what one process measures: whole weights under DDP, shards under FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from callbacks.monitors import _update_ranks
from callbacks.monitors.test_updates import noise_scale

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, _update_ranks.__file__, str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_ranks_log_what_one_process_does(ranks, name):
    alone = _update_ranks.fit("auto", 1)
    assert [step for step, _ in alone["records"]] == [0, 0, 1, 1, 2, 2]
    for rank in ranks:
        found = rank[name]
        assert found["sharded"] == (name == "fsdp2")
        assert found["calls"] == [1, 2, 3]  # one collective a sampled step, whatever the number of monitors
        for (step, metrics), (other, wanted) in zip(found["records"], alone["records"], strict=True):
            assert step == other
            if name == "ddp":  # its noise scale is of a rank's micro-batch, here of the global one
                metrics, wanted = ({t: v for t, v in m.items() if "noise" not in t} for m in (metrics, wanted))
            assert metrics.keys() == wanted.keys()
            for tag, value in wanted.items():
                # Signs of cosines near 0 may flip (there are 40 tokens); changes of a gain of 1 are rounded to 6e-8.
                tolerance = {"abs": 0.03} if "minority" in tag else {"rel": 1e-5, "abs": 6e-8}
                if "noise" in tag:  # a difference of nearly equal squares
                    tolerance = {"rel": 1e-3}
                assert metrics[tag] == pytest.approx(value, **tolerance), tag


@pytest.mark.slow
def test_noise_scale_from_the_gradients_of_the_ranks(ranks):
    gradients = [rank["regression"]["gradients"] for rank in ranks]
    for step, value in ranks[0]["regression"]["noise"]:
        micros = [[gradients[0][i], gradients[1][i]] for i in range(step + 1)]
        # The mean over ranks of what the rule for one last micro-batch gives: it is linear in the small square.
        traces, squares = 0.0, 0.0
        for pair in micros:
            one = sum(micro.mean(0).square().sum() for micro in pair) / 2
            whole = torch.cat(pair).mean(0).square().sum()
            squares, traces = (
                0.95 * squares + (4 * whole - 2 * one) / 2,
                0.95 * traces + (one - whole) / (1 / 2 - 1 / 4),
            )
        assert value == pytest.approx(max(0.0, (traces / squares).item()), rel=1e-3)
        assert noise_scale(micros, 2, 4) != pytest.approx(value, rel=1e-3)  # one rank's alone is another figure
    assert len(ranks[0]["regression"]["noise"]) > 20
