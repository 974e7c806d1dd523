"""Fits find the constants that made the data, intervals hold them as often as they say, what data cannot say is refused."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lightning_mue.analysis.fits import Estimate, fit_loss_law, fit_parabola, fit_rate_law

RATES = 0.01 * 2.0 ** np.arange(-2, 3)
BEST = 0.012


def valley(rates, best=BEST, loss=2.5, curvature=0.1):
    return loss + curvature * (np.log2(rates) - math.log2(best)) ** 2


def assert_covers(hits, level=0.9):
    """Within 3.3 standard errors of the binomial (1 in 1000) of the level."""
    error = math.sqrt(level * (1 - level) / len(hits))
    assert abs(np.mean(hits) - level) < 3.3 * error, np.mean(hits)


def test_a_parabola_is_found_exactly():
    for reach in (1.5, 5):
        fit = fit_parabola(RATES[::-1], valley(RATES)[::-1], reach=reach)
        found = [fit.rate.value, fit.loss.value, fit.curvature.value]
        np.testing.assert_allclose(found, [BEST, 2.5, 0.1], rtol=1e-9)
    assert fit.rates == pytest.approx(RATES)
    assert fit_parabola(RATES, valley(RATES)).rates == pytest.approx(RATES[1:4])


def test_points_beside_the_best_count_at_any_distance():
    assert len(fit_parabola([0.001, 0.01, 0.1], valley(np.array([0.001, 0.01, 0.1]), best=0.01)).rates) == 3


@pytest.mark.parametrize(("seeds", "noise", "reach"), [(3, 0.01, 1.5), (5, 0.03, 1.5), (2, 0.004, 5), (1, 0.004, 5)])
def test_the_intervals_of_a_parabola_cover(seeds, noise, reach):
    """Noise of a seed that all rates share, ten times as large, does not widen the interval of the best rate."""
    rng = np.random.default_rng(seeds)
    hits, widths = [], []
    for _ in range(300):
        shared = rng.normal(0, 0.1, (seeds, 1)) if seeds > 1 else 0.0
        fit = fit_parabola(RATES, valley(RATES) + shared + rng.normal(0, noise, (seeds, 5)), reach=reach)
        hits.append([math.log2(BEST) in fit.log2_rate, 2.5 in fit.loss, 0.1 in fit.curvature])
        widths.append(fit.log2_rate.high - fit.log2_rate.low)
    for column in np.array(hits).T:
        assert_covers(column)
    assert np.median(widths) < 1


def test_noise_above_the_curvature_bounds_nothing():
    """Negative control: no interval may look finite where the differences between rates are noise."""
    rng = np.random.default_rng(0)
    draws = [valley(RATES, curvature=0.001) + rng.normal(0, 0.05, (2, 5)) for _ in range(200)]
    outcomes = []
    for losses in draws:
        try:
            outcomes.append(math.isinf(fit_parabola(RATES, losses).log2_rate.high))
        except ValueError:
            outcomes.append(True)  # the best at the edge
    assert np.mean(outcomes) > 0.9
    assert math.isinf(fit_parabola(RATES, valley(RATES)).log2_rate.high), "one seed, three points: no noise is known"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (valley(RATES, best=1), r"best at the edge, 0\.04, the highest.*Train at 0\.08 and higher too"),
        (valley(RATES, best=1e-4), r"best at the edge, 0\.0025, the lowest.*Train at 0\.00125 and lower too"),
        ([1.0, 2.0, math.inf, math.nan, math.inf], "2 rates with finite losses, expected at least 3"),
        ([3, 2.9, 2.8, math.inf, math.nan], r"best, 0\.01, next to 0\.02, which diverged.*such as 0\.0141"),
        ([[3, 2.9, 2.8, 2.9, 3], [3, 2.9, 2.8, math.inf, 3]], "next to 0.02, which diverged"),
        ([2.0, 2.0, 2.0, 2.0, 2.0], "best at the edge"),
        ([[1.0, 2.0]], "shapes"),
    ],
)
def test_no_optimum_is_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        fit_parabola(RATES, losses)


def test_a_parabola_that_opens_downwards_is_refused():
    with pytest.raises(ValueError, match="a parabola without a minimum between"):
        fit_parabola(RATES, [2.4, 3.0, 2.3, 3.0, 2.4], reach=2)


def test_a_diverged_rate_beyond_the_neighbours_is_no_point():
    losses = valley(RATES)
    losses[-1] = math.inf
    assert fit_parabola(RATES, losses, reach=5).rates == pytest.approx(RATES[:4])


@pytest.mark.parametrize("rates", [[0.1, 0.1, 0.2], [0, 1, 2], [-1, 1, 2], [math.nan, 1, 2]])
def test_rates_are_positive_and_each_once(rates):
    with pytest.raises(ValueError, match=r"rates: found .*, expected positive rates, each once"):
        fit_parabola(rates, [3, 2, 3])


def test_a_rate_law_is_found_and_covered():
    tokens = 1e6 * 2.0 ** np.arange(4)
    exact = fit_rate_law(tokens, 3 * tokens**-0.32)
    np.testing.assert_allclose([exact.coefficient.value, exact.exponent.value], [3, 0.32], rtol=1e-9)
    assert exact.residual < 1e-9
    assert exact.predict(6.4e7).value == pytest.approx(3 * 6.4e7**-0.32)
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(500):
        law = fit_rate_law(tokens, 3 * tokens**-0.32 * 2 ** rng.normal(0, 0.1, 4))
        new = 3 * 6.4e7**-0.32 * 2 ** rng.normal(0, 0.1)
        hits.append([3 in law.coefficient, 0.32 in law.exponent, new in law.predict(6.4e7)])
    for column in np.array(hits).T:
        assert_covers(column)


@pytest.mark.parametrize("fit", [fit_rate_law, fit_loss_law])
def test_laws_refuse_what_they_cannot_fit(fit):
    with pytest.raises(ValueError, match="expected at least"):
        fit([1, 2], [1, 2])
    with pytest.raises(ValueError, match="expected at least"):
        fit([2, 2, 2, 2], [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"found (inf|nan).*Leave out the sizes whose runs diverged"):
        fit([1, 2, 3, 4], [3, 2, math.inf, 1])
    with pytest.raises(ValueError, match="sizes: found 0"):
        fit([0, 1, 2, 3], [3, 2, 1, 1])
    with pytest.raises(ValueError, match="of one shape"):
        fit([1, 2, 3], [[1, 2, 3]])


COMPUTE = 1e12 * np.array([1.0, 3, 10, 30])


def law(compute):
    return 40 * compute**-0.15 + 1.2


def test_a_loss_law_is_found():
    exact = fit_loss_law(COMPUTE, law(COMPUTE))
    assert exact.b.value == pytest.approx(0.15, rel=0.01)  # the step between two exponents that are tried
    assert exact.predict(16 * COMPUTE[-1]).value == pytest.approx(law(16 * COMPUTE[-1]), rel=2e-4)
    assert exact.measured == pytest.approx((1e12, 3e13))


@pytest.mark.slow
def test_the_intervals_of_a_loss_law_cover_sixteen_times_the_compute():
    rng, compute, far = np.random.default_rng(1), np.repeat(COMPUTE, 3), 16 * COMPUTE[-1]
    hits = []
    for _ in range(150):
        fit = fit_loss_law(compute, law(compute) * (1 + rng.normal(0, 0.003, 12)))
        run = law(far) * (1 + rng.normal(0, 0.003))
        hits.append(
            [
                40 in fit.a,
                0.15 in fit.b,
                1.2 in fit.l0,
                law(far) in fit.predict(far, new=False),
                run in fit.predict(far),
            ]
        )
    for column in np.array(hits).T:
        assert_covers(column)


def least_squares(compute, losses, at):
    """The same law by SciPy, without weights against outliers."""
    found, _ = curve_fit(
        lambda c, a, b, l0: a * c**-b + l0, compute / 1e12, losses, p0=(0.6, 0.2, 1), sigma=losses, maxfev=20000
    )
    return found[0] * (at / 1e12) ** -found[1] + found[2]


def test_one_run_that_went_wrong_moves_least_squares_but_not_the_law():
    rng, compute, far = np.random.default_rng(3), np.repeat(COMPUTE, 3), 16 * COMPUTE[-1]
    losses = law(compute) * (1 + rng.normal(0, 0.001, 12))
    clean = fit_loss_law(compute, losses).predict(far).value
    assert clean == pytest.approx(least_squares(compute, losses, far), rel=0.003)
    losses[-1] *= 1.1
    assert fit_loss_law(compute, losses).predict(far).value == pytest.approx(clean, rel=0.01)
    assert abs(least_squares(compute, losses, far) / clean - 1) > 0.02


def test_losses_that_rise_with_compute_are_refused():
    with pytest.raises(ValueError, match="do not fall as a power"):
        fit_loss_law(COMPUTE, [2.0, 2.1, 2.2, 2.3])
    with pytest.raises(ValueError, match="do not fall as a power"):
        fit_loss_law(COMPUTE, [2.0, 2.0, 2.0, 2.0])


def test_an_estimate_contains_its_ends():
    assert 1.0 in Estimate(2, 1, 3)
    assert 3.1 not in Estimate(2, 1, 3)
    with pytest.raises(ValueError, match="level"):
        fit_parabola(RATES, valley(RATES), level=90)
