"""The papers' claims in miniature: files are sweeps that can be made, scores those of made trials, trials train with controls."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import yaml
from helpers.scripts import BENCHMARKS, imported

from lightning_mue.analysis.certificate import certify
from lightning_mue.analysis.sweep.axes import parse_axis
from lightning_mue.analysis.sweep.plan import make_plan
from lightning_mue.analysis.trials import Trial
from lightning_mue.cli.sweep import read_options
from lightning_mue.parameterizations import RULES

NAMES = sorted(path.stem for path in (BENCHMARKS / "claims").glob("*.yaml") if path.stem != "lm")
RATES = (0.004, 0.008, 0.016, 0.032)


@pytest.fixture
def scripts(monkeypatch):
    """The bench's modules, by name."""
    names = ("targets", "controls", "warm", "sweeps", "scores", "gates")
    rules = dict(RULES)
    with imported(monkeypatch, names, "claims") as modules:
        yield modules
    RULES.clear()
    RULES.update(rules)


@pytest.mark.parametrize("scale", ["cpu", "quick", "gpu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_claims_file_says_what_is_swept_and_what_is_expected(scripts, name, scale):
    claim = scripts.sweeps.read_claim(name, scale)
    assert name in scripts.sweeps.claims()
    rules = set()
    for sweep in claim.sweeps.values():
        options, rest = read_options(shlex.split(sweep.options))
        assert rest == []
        assert all(parse_axis(parts).names[0] in claim.base for parts in options.axis)
        config = scripts.sweeps.merged(yaml.safe_load(scripts.sweeps.CONFIG.read_text()), sweep.config)
        rules |= set((options.rules or config["trainer"]["callbacks"][0]["init_args"]["rule"]).split(","))
        # The base of the rule is the base of the certificate, and what the config trains.
        of_rule, model = config["trainer"]["callbacks"][0]["init_args"]["base"], config["model"]["init_args"]
        assert all(of_rule[key] == value == model[key] for key, value in claim.base.items())
        assert sweep.base_of in ("", *claim.sweeps)
        assert options.seeds >= (3 if sweep.certified and scale != "quick" else 1)
    assert rules <= set(RULES)
    for target in claim.targets:
        assert target["figure"] in scripts.scores.FIGURES
        assert {target.get("rule"), target.get("over")} <= {*rules, None}
        assert target.get("sweep") in (None, *(t for t, sweep in claim.sweeps.items() if not sweep.certified))


def trials(rule, width, optimum, loss, *, seeds=3, curvature=0.02, noise=0.0, rates=RATES):
    """Runs whose losses lie on a parabola in log2 of the rate, plus what a seed adds to all of its runs."""
    rng = np.random.default_rng(width + seeds)
    of_seed = 0.05 * rng.standard_normal(seeds)
    return [
        Trial(
            rule, {"width": width}, seed, lr,
            loss * (1 + curvature * math.log2(lr / optimum) ** 2 + noise * rng.standard_normal()) + of_seed[seed],
        )
        for seed in range(seeds)
        for lr in rates
    ]  # fmt: skip


def test_figures_of_made_trials(scripts):
    made = [*trials("mup", 32, 0.012, 2.0), *trials("mup", 64, 0.012 * 2**0.5, 1.8)]
    made += [*trials("sp", 32, 0.012, 2.0), *trials("sp", 64, 0.006, 1.9)]
    certificate = certify(made, {"width": 32})
    means = {w: np.mean(0.05 * np.random.default_rng(w + 3).standard_normal(3)) for w in (32, 64)}

    def figure(name, **given):
        return scripts.scores.FIGURES[name](certificate, {}, **given)

    penalty = {
        rule: loss * 0.02 * drift**2 / (loss + means[64]) for rule, loss, drift in (("mup", 1.8, 0.5), ("sp", 1.9, 1))
    }
    assert figure("worst drift", rule="mup") == pytest.approx(0.5)
    assert figure("worst penalty", rule="mup") == pytest.approx(penalty["mup"])
    assert figure("worst penalty", rule="sp", over="mup") == pytest.approx(penalty["sp"] / penalty["mup"])
    assert figure("mean penalty", rule="sp", axis="width") == pytest.approx(penalty["sp"])
    at_base = {rule: (loss + means[64]) * (1 + penalty[rule]) for rule, loss in (("mup", 1.8), ("sp", 1.9))}
    assert figure("loss over", rule="mup", over="sp") == pytest.approx(at_base["mup"] / at_base["sp"])
    assert figure("rise", rule="mup") == pytest.approx(at_base["mup"] / (2.0 + means[32]) - 1)
    assert math.isnan(figure("worst penalty", rule="hyperp"))


def test_a_figure_of_which_a_part_is_unknown_does_not_hold(scripts):
    made = [
        *trials("sp", 32, 0.012, 2.0),
        *trials("sp", 64, 0.012, 1.9),
        *trials("sp", 128, 0.001, 1.8),
    ]  # the last: at the edge
    certificate = certify(made, {"width": 32})
    target = {"what": "a drift", "figure": "worst drift", "rule": "sp", "at most": 0.5}
    (claim,) = scripts.scores.claims_of([target], certificate, {})
    assert math.isnan(claim.measured)
    assert not claim.holds
    rows = scripts.scores.rows_of(certificate)
    assert [row["optimum"] is None for row in rows] == [False, False, True]
    assert "edge" in rows[-1]["problem"]


def test_losses_that_settings_leave_alone(scripts):
    runs = {
        decay: [
            replace(t, settings={"decay": decay}, loss=t.loss * (1 + decay)) for t in trials("hyperp", 32, 0.1, 2.0)
        ]
        for decay in (0.0, 0.001)
    }
    apart = scripts.scores.FIGURES["settings apart"]
    assert apart(None, {"decay": [*runs[0.0], *runs[0.001]]}, sweep="decay") == pytest.approx(0.001)
    assert math.isnan(apart(None, {"decay": runs[0.0]}, sweep="decay"))


def test_noise_is_told_from_what_seeds_add(scripts):
    made = trials("sp", 32, 0.012, 2.0, seeds=200, noise=0.003)
    noise = scripts.scores.noise_of(made)
    assert noise["paired"] == pytest.approx(0.003, rel=0.15)  # 199 x 2 degrees of freedom: 3.5 %
    assert noise["seeds"] == pytest.approx(0.025, rel=0.2)
    assert scripts.scores.noise_of(trials("sp", 32, 0.012, 2.0, seeds=1)) == {}


def test_square_roots_of_the_gates_keep_the_size_of_the_output(scripts):
    few, many = scripts.gates.output_rms("sqrt", 0, (2, 32))
    assert many == pytest.approx(few, rel=0.1)
    few, many = scripts.gates.output_rms("linear", 0, (2, 32))
    assert many < few / 2


@pytest.mark.slow
def test_trials_train_in_a_warm_process_with_what_only_the_bench_has(scripts, tmp_path):
    claim = scripts.sweeps.read_claim("width", "quick")
    config = scripts.sweeps.merged(yaml.safe_load(scripts.sweeps.CONFIG.read_text()), claim.sweeps["decay"].config)
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    config["data"]["init_args"]["val_batches"] = 1
    options = {"command": (), "metric": "val/loss", "rules": ("complete-mue", "sp-embedding"), "extend": 0}
    plan = make_plan(config, rates=(0.01,), lr_key=None, axes=(parse_axis(["width=32,64"]),), **options)
    found = {(t.rule, t.size["width"]): t.loss for t in scripts.sweeps.run_sweep(plan, tmp_path, 2)}
    assert found["complete-mue", 32] == found["sp-embedding", 32]  # the base's runs are those of every rule
    assert found["complete-mue", 64] != found["sp-embedding", 64]
    assert scripts.sweeps.run_sweep(plan, tmp_path, 2)
    assert len(list((tmp_path / "trials").iterdir())) == 4  # nothing was trained again
