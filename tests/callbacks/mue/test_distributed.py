"""MuECallback on two processes: DDP and FSDP2 (gloo) against one process. One launch runs all fits (_ranks.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from callbacks.mue import _ranks

from lightning_mue import initialize, plan

pytestmark = pytest.mark.slow
SCRIPT = _ranks.__file__
STRATEGIES = ["ddp", "fsdp2", "fsdp2-full"]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    (folder / "corpus.txt").write_bytes(bytes(torch.randint(0, 64, (6000,), generator=generator).tolist()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """Initial weights of one process."""
    ranks = _ranks
    model = ranks.make_model()
    initialize(model, plan(model, base=ranks.BASE))
    return ranks.whole(model)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
def test_initial_weights_are_those_of_one_process(seen, alone, name, rank):
    """Bitwise, though rank 1 started from other weights and another state of the global generator."""
    start = seen[rank][name]["first"]["on_train_start"]["weights"]
    assert all(torch.equal(start[name], alone[name]) for name in alone)
    assert seen[rank][name]["first"]["on_train_start"]["sharded"] is (name != "ddp")


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_is_exact(seen, name):
    run = seen[0][name]
    assert largest_difference(run["end"], run["resumed end"]) == 0.0
    # The control: the steps after the checkpoint moved the weights, and so did those before it.
    middle = run["resumed"]["on_train_start"]["weights"]
    assert largest_difference(middle, run["end"]) > 1e-3
    assert largest_difference(middle, run["first"]["on_train_start"]["weights"]) > 1e-3
    assert run["resumed multipliers"]


def test_ddp_and_fsdp2_train_alike(seen):
    """The same batches; only the order of sums in the gradients' reduction may differ.

    In float64: Adam divides a gradient by its own size, so that one which cancels to rounding still makes a step of the
    rate's order. How often that happens in float32 depends on the machine.
    """
    ddp, fsdp2 = seen[0]["float64"]["ddp"], seen[0]["float64"]["fsdp2"]
    assert all(weight.dtype == torch.float64 for weight in ddp.values())
    assert largest_difference(ddp, fsdp2) < 1e-10
    # The control: the same fit in float32 ends elsewhere.
    assert largest_difference(ddp, seen[0]["ddp"]["end"]) > 1e-10


@pytest.mark.parametrize("name", STRATEGIES)
def test_second_fit_keeps_the_weights(seen, name):
    second = seen[0][name]["second fit"]
    assert largest_difference(second["on_fit_start"]["weights"], second["on_train_start"]["weights"]) == 0.0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
def test_another_plan_is_refused_on_every_rank(seen, name, rank):
    run = seen[rank][name]
    assert "ckpt_path: found a checkpoint of a run with another plan" in run["mismatch"]
    assert "base_axes.width: 32 -> " in run["mismatch"]
    assert "ckpt_path: found a checkpoint that holds no plan" in run["missing"]
    assert run["unchanged"]


def test_order_of_events(seen):
    """What exists at which hook under each strategy, on which the callback is built."""
    for name, late in (("ddp", False), ("fsdp2", True), ("fsdp2-full", True)):
        resumed = seen[0][name]["resumed"]
        assert resumed["on_fit_start"]["ckpt_path"] is not late
        assert resumed["on_train_start"]["ckpt_path"]
        assert resumed["on_load_checkpoint after on_fit_start"] is late
        assert resumed["on_fit_start"]["sharded"] is late
        assert resumed["on_fit_start"]["optimizers"] == 1
        restored = largest_difference(*(resumed[at]["weights"] for at in ("on_fit_start", "on_train_start"))) == 0.0
        assert restored is not late


def test_optimizer_made_before_sharding_is_refused(seen):
    assert "optimizer: found AdamW, which holds none of the module's parameters" in seen[0]["early"]


def test_process_groups(seen):
    """The ranks of DDP are replicas of each other; those of FSDP2 are not."""
    assert (
        seen[0]["process groups"] == seen[1]["process groups"] == {"ddp": True, "ddp, ignoring": False, "fsdp2": False}
    )


def test_run_sizes_count_the_replicas(seen):
    """4 windows of 16 tokens, 2 accumulated batches, 2 ranks; 6 steps."""
    assert seen[0]["run sizes"]["batch_tokens"] == 4 * 16 * 2 * 2
    assert seen[0]["run sizes"]["tokens"] == 4 * 16 * 2 * 2 * 6


def test_cli_with_fsdp2_moves_the_weights(seen, alone):
    start, end = seen[0]["cli"]["start"], seen[0]["cli"]["end"]
    assert largest_difference(start, alone) == 0.0
    assert all(float((end[name] - start[name]).abs().max()) > 0 for name in alone)
