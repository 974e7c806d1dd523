"""The speedrun: its scores of made losses are what was put into them, and its small form runs from training to the board."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.scripts import BENCHMARKS, imported
from scipy import stats
from torch import nn

import lightning_mue

TARGET = 2.0


@pytest.fixture
def scripts(monkeypatch):
    """The speedrun's modules, by name."""
    names = ("targets", "common", "processor", "entries", "task", "runs", "scoring", "measure", "tune", "board", "run")
    with imported(monkeypatch, names, "speedrun") as modules:
        yield modules


def loss_at(steps, met=100.0, slope=-0.25, offset=0.0):
    """A curve that is a line in log2 steps and meets the target at `met`."""
    return TARGET + slope * math.log2(steps / met) + offset


def curve_of(lengths, offsets, **curve):
    return {length: {seed: loss_at(length, offset=o, **curve) for seed, o in enumerate(offsets)} for length in lengths}


def test_the_crossing_of_a_line_is_exact(scripts):
    offsets = (-0.02, 0.0, 0.02)
    met = scripts.scoring.crossing(curve_of((60, 85, 120), offsets), TARGET)
    assert met.steps == pytest.approx(100.0)
    assert met.slope == pytest.approx(-0.25)
    assert met.deviation == pytest.approx(0.02)
    half = stats.t.ppf(0.95, 2) * (0.02 / 0.25) / math.sqrt(3)  # in doublings
    assert (met.low, met.high) == (pytest.approx(100 * 2**-half), pytest.approx(100 * 2**half))


def test_no_crossing_without_losses_on_both_sides(scripts):
    assert scripts.scoring.crossing(curve_of((60, 85), (0.0,)), TARGET) is None
    assert scripts.scoring.crossing(curve_of((120, 170), (0.0,)), TARGET) is None
    assert scripts.scoring.crossing({}, TARGET) is None
    assert scripts.scoring.crossing({60: {0: 2.1}, 120: {1: 1.9}}, TARGET) is None  # no seed in common


def test_the_interval_covers_the_true_crossing(scripts):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        noise = rng.normal(0, 0.02, 4)  # of a seed, the same at both lengths
        losses = {n: {s: loss_at(n) + noise[s] + rng.normal(0, 0.005) for s in range(4)} for n in (71, 141)}
        met = scripts.scoring.crossing(losses, TARGET)
        inside += met.low <= 100 <= met.high
    assert 0.83 <= inside / 200 <= 0.96  # 90 % by construction; 200 draws have a standard error of 2 %


def test_a_length_counts_at_the_error_of_its_test(scripts):
    rng, counts = np.random.default_rng(1), scripts.scoring.counts
    at_target = sum(counts(list(TARGET + rng.normal(0, 0.03, 10)), TARGET, 10) for _ in range(200))
    assert at_target <= 8  # 2 by construction; its standard deviation is 1.4
    below = [TARGET - 0.05 + 0.01 * (-1) ** i for i in range(10)]
    assert counts(below, TARGET, 10)
    assert not counts(below[:9], TARGET, 10)  # too few
    assert not counts([*below[:9], TARGET + 1.0], TARGET, 10)
    assert scripts.scoring.p_value([1.0, 1.0], TARGET) == 0.0
    assert scripts.scoring.p_value([TARGET, TARGET], TARGET) == 1.0


def test_the_length_to_confirm_is_expected_to_count(scripts):
    met = scripts.scoring.crossing(curve_of((71, 141), (-0.03, 0.0, 0.03)), TARGET)
    length = scripts.scoring.length_to_confirm(met, 10)
    spread = np.linspace(-1, 1, 10)
    spread *= 0.03 / spread.std(ddof=1)  # ten losses with just the deviation that was seen
    assert scripts.scoring.counts(list(loss_at(length) + spread), TARGET, 10)
    assert not scripts.scoring.counts(list(loss_at(length - 2) + spread), TARGET, 10)


def test_extra_steps_are_those_that_win_the_loss_back(scripts):
    assert scripts.scoring.extra_steps(loss_at(100), loss_at(150), -0.25) == pytest.approx(0.5)


def test_the_best_factor_is_the_parabolas(scripts):
    curve = {f: 2.0 + 0.1 * (math.log2(f) + 0.3) ** 2 for f in (0.5, 1.0, 2.0)}
    assert scripts.scoring.best_factor(curve) == (pytest.approx(2**-0.3), pytest.approx(2.0))
    assert scripts.scoring.best_factor({0.5: 2.1, 1.0: 2.2, 2.0: 2.4}) == (0.5, 2.1)


class Made:
    """Runs whose losses are a curve's, for a task with the real one's lengths."""

    def __init__(self, scripts, offset=0.0):
        self.task = scripts.run.replace(scripts.task.Task(), target=TARGET)
        self.offset, self.asked = offset, []

    def losses(self, entry, column, steps, seeds, rule="sp", factor=1.0):
        self.asked.append((column, steps, rule, factor))
        wrong = 0.1 * abs(math.log2(factor) - (rule == "sp" and column != "dense"))
        return {seed: loss_at(steps, 130, offset=0.01 * (seed % 3 - 1) + wrong + self.offset) for seed in range(seeds)}


def test_an_entry_is_measured_around_the_target(scripts):
    runs, entry = Made(scripts), scripts.entries.load("adamw")
    met = scripts.measure.curve(runs, entry, "dense")
    assert met.steps == pytest.approx(130)
    assert [steps for _, steps, *_ in runs.asked] == [64, 91, 129, 182]
    found = scripts.measure.confirm(runs, entry, "dense")
    assert 130 < found.steps < 136
    assert len(found.losses) == 10
    assert scripts.measure.curve(Made(scripts, offset=2.0), entry, "dense") is None  # never reaches it


def test_a_transfer_is_compared_with_other_rates(scripts):
    entry = scripts.entries.load("adamw")
    found = {rule: scripts.measure.transfer(Made(scripts), entry, "moe", rule) for rule in entry.settings["rules"]}
    assert found["complete-mue"].extra == pytest.approx(0.0)
    assert found["complete-mue"].to_target == pytest.approx(
        130 * 2**-0.02
    )  # the two seeds lie 0.005 nats below the line
    assert found["sp"].best == 2.0
    assert found["sp"].extra == pytest.approx(2 ** (0.1 / 0.25) - 1)
    assert scripts.measure.transfer(Made(scripts, offset=2.0), entry, "moe", "sp") is None


def test_every_entry_can_be_built_and_searched(scripts):
    sizes = {"width": 16, "depth": 1, "n_heads": 1, "n_experts": 4, "top_k": 2}
    for name in scripts.entries.names():
        entry = scripts.entries.load(name)
        assert len(entry.space) == 7  # the same number of searched settings for all
        assert entry.changed({key: entry.value(key) for key in entry.space}).settings == entry.settings
        model = lightning_mue.MoELanguageModel(**sizes, **entry.settings["model"])
        groups = entry.optimizer(model.named_parameters()).param_groups
        held = [parameter for group in groups for parameter in group["params"]]
        assert len({id(parameter) for parameter in held}) == len(held) == len(list(model.parameters()))
        rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        arguments = entry.settings["optimizer"]["init_args"]
        table = arguments.get("adamw_lr") or arguments["lr"] * entry.settings["embedding_rate"]
        assert rate[id(model.transformer.embedding.weight)] == table
        assert rate[id(model.transformer.blocks[0].attention.w_q)] == arguments["lr"]


def test_a_factor_multiplies_every_rate(scripts):
    for name in scripts.entries.names():
        entry = scripts.entries.load(name)
        own, twice = (
            [g["lr"] for g in e.optimizer(pairs()).param_groups] for e in (entry, scripts.runs.rated(entry, 2.0))
        )
        assert len(own) == 2
        assert twice == [2 * rate for rate in own]


def pairs():
    return [("embedding.weight", nn.Parameter(nn.Embedding(4, 4).weight)), ("w", nn.Parameter(nn.Linear(4, 4).weight))]


@pytest.mark.slow
def test_the_small_speedrun_runs(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "speedrun" / "run.py"), "--quick", "--results", str(tmp_path)]
    command += ["--entries", "ours"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    options = {"capture_output": True, "text": True, "timeout": 280, "check": False, "env": environment}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("speedrun_*.json")]
    row = {(row["entry"], row["column"], row["rule"]): row for row in result["rows"]}
    assert row["soap", "dense", ""]["steps"] == "not run yet"
    assert row["ours", "dense", ""]["low"] <= row["ours", "dense", ""]["steps"] <= row["ours", "dense", ""]["high"]
    assert set(row["ours", "moe", "hyperp"]["losses"]) == {"0.5", "1.0", "2.0"}
    assert "not run yet" in next(tmp_path.glob("speedrun_*.md")).read_text()
    again = subprocess.run([*command, "--stages", "dense"], **options)
    assert "loss" not in [line.split(" ")[0] for line in again.stdout.splitlines()]
    assert "seconds" not in again.stdout  # no run is done twice
