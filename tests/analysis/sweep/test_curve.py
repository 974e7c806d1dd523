"""A grid grows by its own factor until the best rate lies between two finite losses, and no further."""

import math

import pytest
from helpers.sweeps import plan
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mue.analysis.sweep.curve import next_rate, wanted_points
from lightning_mue.analysis.sweep.plan import Point

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.0, 2.0], None),
        ([1.0, 2.0, 3.0], 0.005),
        ([3.0, 2.0, 1.0], 0.08),
        ([INF, INF, INF], 0.005),
        ([2.0, 1.0, INF], math.sqrt(0.02 * 0.04)),
        ([1.0, INF, INF], 0.005),
        ([NAN, 1.0, 2.0], 0.01),  # a crash is no measurement: 0.02 is the lowest rate
    ],
)
def test_next_rate(losses, expected):
    rate = next_rate(dict(zip([0.01, 0.02, 0.04], losses, strict=True)))
    assert rate == expected if expected is None else rate == pytest.approx(expected, rel=1e-11)


def test_one_rate_is_no_grid():
    assert next_rate({0.01: 1.0}) is None


@settings(max_examples=30, deadline=None)
@given(st.floats(-12, 4), st.floats(0.05, 3.0))
def test_a_grid_grows_to_any_optimum(optimum, diverges_above):
    """Loss is a parabola in log2 lr that diverges somewhere above its optimum."""

    def loss(rate):
        octave = math.log2(rate)
        return math.inf if octave > optimum + diverges_above else (octave - optimum) ** 2

    swept = plan(rates=(0.01, 0.02, 0.04), extend=40)
    curve = {}
    for _ in range(60):
        new = [p for p in wanted_points(swept, curve) if p not in curve]
        if not new:
            break
        curve |= {p: loss(p.lr) for p in new}
    losses = {p.lr: value for p, value in curve.items()}
    rates = sorted(losses)
    best = rates.index(min(losses, key=losses.get))
    assert 0 < best < len(rates) - 1
    assert all(math.isfinite(losses[rates[i]]) for i in (best - 1, best, best + 1))


def test_a_grid_waits_for_all_its_points_and_stops_at_its_limit():
    swept = plan(rates=(0.01, 0.02, 0.04), extend=1)
    falling = {Point(0.01): 3.0, Point(0.02): 2.0}
    assert {p.lr for p in wanted_points(swept, falling)} == {0.01, 0.02, 0.04}
    assert {p.lr for p in wanted_points(swept, {**falling, Point(0.04): None})} == {0.01, 0.02, 0.04}
    grown = {**falling, Point(0.04): 1.0}
    assert {p.lr for p in wanted_points(swept, grown)} == {0.01, 0.02, 0.04, 0.08}
    assert {p.lr for p in wanted_points(swept, {**grown, Point(0.08): 0.5})} == {0.01, 0.02, 0.04, 0.08}
    assert wanted_points(swept, {})[0].lr == 0.02  # the middle first
