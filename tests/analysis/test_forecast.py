"""A forecast holds the run's loss and rate as often as it says, and refuses what its trials cannot tell."""

import math

import numpy as np
import pytest
from helpers.trials import GRID, sweep

from lightning_mue.analysis.cells import cells_of
from lightning_mue.analysis.forecast import compute_efficiency, predict

LADDER = {1: {"width": 64}, 3: {"width": 112}, 10: {"width": 200}, 30: {"width": 352}}


def law(ratio):
    return 40 * (1e12 * ratio) ** -0.15 + 1.2


def ladder(*, sizes=None, seeds=2, noise=1e-9, loss=law, rates=GRID[2:5], tokens=lambda ratio: 1e6, **more):
    sizes = sizes or LADDER
    return cells_of(
        sweep(
            sizes, seeds=seeds, noise=noise, loss=loss, rates=rates, compute=lambda r: 1e12 * r, tokens=tokens, **more
        )
    )


def test_without_noise_the_forecast_is_the_law():
    found = predict(ladder(), compute=4.8e14)
    assert found.loss.value == pytest.approx(law(480), rel=1e-3)
    assert found.rate.value == pytest.approx(0.016)
    assert (found.trials, found.rate_over, found.rate_moves) == (24, "compute", False)


def test_a_rate_that_falls_with_tokens_is_followed():
    found = predict(
        ladder(drift=-0.15, seeds=1, rates=GRID, tokens=lambda r: 1e6 * r**0.5), compute=4.8e14, tokens=1e6 * 480**0.5
    )
    assert found.rate_moves
    assert found.rate_law.exponent.value == pytest.approx(0.3)
    assert found.rate.value == pytest.approx(0.016 * 480**-0.15)


@pytest.mark.slow
def test_the_interval_holds_a_run_of_sixteen_times_the_compute():
    """90 % of 100 draws within 3.3 standard errors of the binomial; the rate's at least that. The typical error is under 1 %."""
    rng = np.random.default_rng(0)
    losses, rates, errors = [], [], []
    for draw in range(100):
        found = predict(ladder(noise=0.002, draw=draw + 1), compute=4.8e14)
        losses.append(law(480) * (1 + 0.002 * rng.normal()) in found.loss)
        rates.append(0.016 in found.rate)
        errors.append(abs(found.loss.value / law(480) - 1))
    error = math.sqrt(0.9 * 0.1 / 100)
    assert abs(np.mean(losses) - 0.9) < 3.3 * error
    assert np.mean(rates) > 0.9 - 3.3 * error
    assert np.median(errors) < 0.01


@pytest.mark.parametrize(
    ("cells", "target", "message"),
    [
        (ladder(), {"compute": 1e12}, "0 sizes with less than the run's 1e\\+12.*at least 3 smaller"),
        (ladder(seeds=4), {"compute": 1e15}, "trials: found 48, expected at most 30.*--most-trials 48"),
        (
            ladder(seeds=1, sizes={**LADDER, 60: {"width": 512}}),
            {"compute": 1e15},
            "sizes: found 5, expected at most 4",
        ),
        (ladder(), {"compute": 1e15, "tokens": 5e6}, "tokens that move in the trials"),
        (ladder(tokens=lambda r: 1e6 * r), {"compute": 1e15}, "tokens: found nan"),
        (ladder(drift=1), {"compute": 1e15}, r"complete-mue, width=112: found no optimum.*Train at"),
        (ladder(loss=lambda r: 2.0), {"compute": 1e15}, "do not fall as a power"),
        (ladder() + ladder(rule="sp"), {"compute": 1e15}, "rule: found complete-mue, sp"),
        (cells_of(sweep(LADDER)), {"compute": 1e15}, "compute: found none for width=64"),
    ],
)
def test_what_the_trials_cannot_tell_is_refused(cells, target, message):
    with pytest.raises(ValueError, match=message):
        predict(cells, **target)


def test_runs_stopped_when_they_diverged_do_not_hide_the_compute():
    trials = sweep(LADDER, rates=GRID[2:6], diverges_above=0.1, compute=lambda r: 1e12 * r, tokens=lambda r: 1e6)
    trials = [t if math.isfinite(t.loss) else type(t)(t.rule, t.size, t.seed, t.lr, t.loss) for t in trials]
    assert [cell.compute for cell in cells_of(trials)] == [1e12, 3e12, 1e13, 3e13]


def test_twice_the_compute_is_found_and_nothing_is_extrapolated():
    """Theirs needs twice the compute for every loss."""
    ours, theirs = ladder(noise=0.001), ladder(rule="sp", loss=lambda r: law(r / 2), noise=0.001)
    found = compute_efficiency(ours, theirs, 1.7)
    assert 2.0 in found
    assert found.value == pytest.approx(2, rel=0.15)
    assert compute_efficiency(theirs, ours, 1.7).value == pytest.approx(1 / found.value)
    for loss in (law(30) + 1e-3, law(0.5) - 1e-3):
        with pytest.raises(ValueError, match=r"expected a loss that both have reached\. Nothing is extrapolated"):
            compute_efficiency(ours, theirs, loss)
    with pytest.raises(ValueError, match="expected losses that fall"):
        compute_efficiency(ours, ladder(rule="sp", loss=lambda r: 2.0 + r), 1.7)


@pytest.mark.slow
def test_the_interval_of_an_efficiency_covers():
    hits = []
    for draw in range(60):
        ours = ladder(seeds=3, noise=0.003, shared=0.02, draw=2 * draw + 1)
        theirs = ladder(rule="sp", seeds=3, loss=lambda r: law(r / 2), noise=0.003, shared=0.02, draw=2 * draw + 2)
        hits.append(compute_efficiency(ours, theirs, law(6)))
    truth = np.exp(_log_compute(lambda r: law(r / 2)) - _log_compute(law))
    assert abs(np.mean([truth in h for h in hits]) - 0.9) < 3.3 * math.sqrt(0.09 / 60)


def _log_compute(loss):
    """Of straight lines between the sizes, as the definition has it."""
    ratios = np.array(list(LADDER), dtype=float)
    return np.interp(-law(6), -np.array([loss(r) for r in ratios]), np.log(ratios))
