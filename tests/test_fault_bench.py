"""The fault bench: its scores of made series are what was put into them, and its small form runs from training to claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.scripts import BENCHMARKS, imported

from lightning_mue.health.series import series_of

AT, N = 50, 150


@pytest.fixture
def scripts(monkeypatch):
    """The bench's modules, by name."""
    names = ("targets", "common", "processor", "faults", "run", "score", "draw", "bench")
    with imported(monkeypatch, names, "faults") as modules:
        yield modules


def made(seed, *, router=1.0, from_step=AT, loss=1.0, loss_from=N):
    """A healthy run, but for factors on a router's metric and on the loss from some steps on."""
    rng = np.random.default_rng(seed)
    t = np.arange(N)
    values = {
        "train/loss": (2 + 4 * np.exp(-t / 10)) * np.exp(0.02 * rng.standard_normal(N)),
        "stability/z/router/01": 5 * np.exp(0.03 * rng.standard_normal(N)),
        "stability/rms/ffn/00": np.exp(0.03 * rng.standard_normal(N)),
    }
    values["train/loss"][loss_from:] *= loss
    values["stability/z/router/01"][from_step:] *= router
    return {tag: series_of(enumerate(v)) for tag, v in values.items()}


HEALTHY = {seed: made(seed) for seed in range(1, 6)}


def score(scripts, fault, **spoilt):
    return scripts.score.score(fault, 1, made(1, **spoilt), AT, HEALTHY)


def test_a_fault_that_is_seen_in_time(scripts):
    found = score(scripts, "router lr x 32", router=9.0, from_step=AT + 4, loss=1.5, loss_from=AT + 40)
    assert (found.flagged, found.indicator, found.place) == (6, "Z-value", "router, layer 01")  # the third in a row
    assert found.shown == 46  # its median of 5 is beyond at the third step, and stays there for five
    assert 40 <= found.judged <= 46
    assert found.early
    assert found.named
    assert found.lead == found.seen - 6


def test_a_fault_that_the_loss_shows_first(scripts):
    found = score(scripts, "router lr x 32", router=9.0, from_step=AT + 60, loss=1.5, loss_from=AT + 2)
    assert (found.flagged, found.early) == (62, False)
    assert found.lead < 0


def test_another_role_is_not_the_faulty_one(scripts):
    found = score(scripts, "embedding lr x 64", router=9.0)
    assert found.early
    assert not found.named


def test_a_loss_that_shows_nothing_counts_to_the_end(scripts):
    found = score(scripts, "router lr x 32", router=9.0)
    assert (found.shown, found.judged) == (None, None)
    assert found.lead == N - AT - found.flagged == 98


def test_nothing_happened(scripts):
    found = score(scripts, "router lr x 32")
    assert (found.flagged, found.lead, found.early, found.named) == (None, None, False, False)
    assert score(scripts, "router lr x 32", loss=float("nan"), loss_from=AT + 7).shown == 7


def test_claims(scripts):
    good = score(scripts, "router lr x 32", router=9.0)
    late = score(scripts, "lr x 8", router=9.0, from_step=AT + 60, loss=1.5, loss_from=AT + 2)
    calm = [scripts.score.score("healthy", seed, run, 0, HEALTHY) for seed, run in HEALTHY.items()]
    claims = {claim.what: claim for claim in scripts.bench.claims_of([good, good, late, *calm])}
    assert claims["faults of 2 flagged before the loss shows them, in each run"].measured == 1
    assert claims["faults of 2 whose role (and layer) is named, in each run"].measured == 1
    assert claims["false alarms in 5 healthy runs"].holds
    alarm = scripts.score.score("healthy", 1, made(1, router=9.0), 0, HEALTHY)
    assert not scripts.bench.claims_of([good, alarm])[-1].holds


@pytest.mark.slow
def test_the_small_bench_runs(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "faults" / "bench.py"), "--quick", "--runs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    options = {"capture_output": True, "text": True, "timeout": 280, "check": False, "env": environment}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("faults_*.json")]
    rounding = next(row for row in result["rows"] if row["fault"] == "biased rounding")
    assert (rounding["flagged"], rounding["named"], rounding["early"]) == (0, True, True)
    assert sum(row["fault"] == "healthy" for row in result["rows"]) == 3
    assert (tmp_path / "attention-error.svg").exists() is False  # that picture is drawn with a fault that did not run
    assert (tmp_path / "output-rms.svg").exists()
    again = subprocess.run([*command, "--strict"], **options)
    assert "seed 0" not in again.stdout  # what has ended is not repeated
