from __future__ import annotations

import math

import pytest

from lightning_mue.analysis.slopes import Record, fit_slope, fit_slopes


def law(
    name, power, *, quantity="update", role="hidden", sizes=(1, 2, 4, 8), seeds=(0, 1), step=5, factor=1.0, base=None
):
    """Records of rms = factor * size^power, the seeds off by a factor of 2 each way, which a geometric mean takes out."""
    return [
        Record(size, seed, step, name, role, quantity, factor * size**power * 2.0 ** (1 - 2 * (seed % 2)), base)
        for size in sizes
        for seed in seeds
    ]


def fit(records, *, tolerance=0.15, depth_moves=False, step=5):
    slopes = fit_slopes(records, step=step, tolerance=tolerance, depth_moves=depth_moves)
    return {(s.name, s.quantity): s for s in slopes}


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.149, 0.151, 0.5])
def test_a_power_law_gives_its_exponent(power):
    slope = fit(law("head.w", power))["head.w", "update"]
    for value in (slope.slope, slope.lower, slope.upper):
        assert value == pytest.approx(power, abs=1e-12)
    assert slope.error == pytest.approx(0.0, abs=1e-12)
    assert slope.status == ("pass" if abs(power) <= 0.15 else "FAIL")
    assert slope.rms == pytest.approx([size**power for size in (1, 2, 4, 8)])


def test_halves_and_error_over_seeds():
    """rms 1, 1, 2, 4: flat below, slope 1 above; two seeds of slopes s +- 0.1 have the standard error 0.1."""
    bent = [Record(x, 0, 5, "w", "hidden", "update", y) for x, y in zip((1, 2, 4, 8), (1, 1, 2, 4), strict=True)]
    slope = fit(bent)["w", "update"]
    assert (slope.lower, slope.upper) == pytest.approx((0.0, 1.0))
    assert math.isnan(slope.error)
    two = [Record(x, s, 5, "w", "hidden", "update", x ** (0.3 + 0.1 * (2 * s - 1))) for x in (1, 2, 4) for s in (0, 1)]
    slope = fit(two)["w", "update"]
    assert (slope.slope, slope.error) == pytest.approx((0.3, 0.1))


def test_layers_are_averaged_geometrically():
    records = law("blocks.0.w", 0.0, factor=4.0) + law("blocks.1.w", 0.4, factor=1.0)
    slope = fit(records)["blocks.*.w", "update"]
    assert slope.slope == pytest.approx(0.2)
    assert slope.rms[0] == pytest.approx(2.0)


def test_only_the_asked_step_counts():
    records = law("w", 0.0, step=1) + law("w", 1.0, step=5)
    assert fit(records, step=1)["w", "update"].slope == pytest.approx(0.0, abs=1e-12)
    assert fit(records, step=5)["w", "update"].slope == pytest.approx(1.0)


def test_what_decides():
    records = [
        *law("blocks.0.w", 0.0),
        *law("blocks.0", 0.0, quantity="change", role="residual stream"),
        *law("blocks.0.attention", 1.0, quantity="change", role=""),
        *law("head", 0.0, quantity="change", role="unembedding"),
        *law("blocks.0", 1.0, quantity="propagated", role="residual stream"),
        *law("blocks.0", 1.0, quantity="output", role="residual stream"),
        *law("", 1.0, quantity="loss", role=""),
    ]
    slopes = fit(records)
    assert {key for key, s in slopes.items() if s.decides} == {
        ("blocks.*.w", "update"),
        ("blocks.*", "change"),
        ("head", "change"),
    }
    assert not any(s.status == "FAIL" for s in slopes.values())
    assert ("", "loss") not in slopes


def test_without_numbered_layers_every_change_decides():
    assert fit(law("encoder", 1.0, quantity="change", role=""))["encoder", "change"].status == "FAIL"


def test_worst_first():
    records = law("a", 0.05) + law("b", -0.9) + law("c", 0.1) + law("d", 0.5) + law("e", 2.0, quantity="output")
    names = [s.name for s in fit_slopes(records, step=5, tolerance=0.15, depth_moves=False)]
    assert names == ["b", "d", "c", "a", "e"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails_wherever_it_is(bad):
    records = [*law("w", 0.0), Record(8, 2, 5, "w", "hidden", "output", bad), *law("w", 0.0, quantity="output")]
    slopes = fit(records)
    assert slopes["w", "output"].status == "non-finite"
    assert slopes["w", "output"].decides
    assert slopes["w", "update"].status == "pass"


def test_zeros_are_counted_and_left_out():
    records = [*law("w", 0.3), Record(8, 2, 5, "w", "hidden", "update", 0.0)]
    assert fit(records)["w", "update"].slope == pytest.approx(0.3)
    assert fit(records)["w", "update"].zeros == 1
    only = fit([Record(x, 0, 5, "w", "hidden", "update", 0.0) for x in (1, 2)])["w", "update"]
    assert only.status == "zero"
    assert math.isnan(only.slope)


def test_a_layer_of_one_size_has_no_slope():
    slopes = fit(law("w", 0.0) + law("router", 0.0, sizes=(8,)))
    assert slopes["router", "update"].status == "one size"


def test_dense_and_expert_matrices_share_a_line_where_neither_is_at_every_size():
    dense = law("blocks.0.ffn.w", 0.0, sizes=(1,), base="blocks.0.ffn.w")
    experts = law("blocks.0.ffn.experts.w", 0.1, sizes=(2, 4), base="blocks.0.ffn.w")
    other = law("blocks.0.attention.w", 0.0, sizes=(1, 2, 4), base="blocks.0.elsewhere.w")
    slopes = fit(dense + experts + other)
    assert set(slopes) == {("blocks.*.ffn.w", "update"), ("blocks.*.attention.w", "update")}
    assert slopes["blocks.*.ffn.w", "update"].sizes == (1, 2, 4)


def stream(depth, power=0.0):
    """A residual stream that grows linearly along the layers, as a sum of equal branches does."""
    return [
        record
        for layer in range(depth)
        for record in law(
            f"blocks.{layer}",
            0.0,
            quantity="change",
            role="residual stream",
            sizes=(depth,),
            factor=(layer + 1) / depth * depth**power,
        )
    ]


@pytest.mark.parametrize(("power", "status"), [(0.0, "pass"), (0.5, "FAIL")])
def test_in_depth_layers_are_compared_at_equal_relative_positions(power, status):
    """Averaging over all layers instead would see a slope, because deeper models have more early layers."""
    records = [r for depth in (2, 4, 8) for r in stream(depth, power)] + law("blocks.0.w", -1.0, sizes=(2, 4, 8))
    slopes = fit(records, depth_moves=True)
    for name in ("blocks.* @ 1/2", "blocks.* @ 2/2"):
        assert slopes[name, "change"].slope == pytest.approx(power, abs=1e-12)
        assert slopes[name, "change"].status == status
    assert not any(s.decides for (_, quantity), s in slopes.items() if quantity == "update")
    averaged = fit(records)["blocks.*", "change"].slope
    assert abs(averaged - power) > 0.15


def test_a_list_of_experts_is_one_line_but_no_layers():
    """Their numbers are no layer index: one line for all experts of all layers, and no position along the depth."""
    records = law("blocks.0.experts.0.w", 0.0) + law("blocks.0.experts.1.w", 0.2) + law("blocks.1.experts.0.w", 0.4)
    assert set(fit(records)) == {("blocks.*.experts.each.w", "update")}
    assert fit(records)["blocks.*.experts.each.w", "update"].slope == pytest.approx(0.2)
    alone = law("experts.0", 0.0, quantity="change", role="", sizes=(2, 4))
    assert set(fit(alone, depth_moves=True)) == {("experts.each", "change")}


def test_fit_slope_of_too_little():
    assert math.isnan(fit_slope([4.0], [1.0]))


@pytest.mark.parametrize(
    ("power", "coherent", "status"),
    [(-0.3, 0.05, "settles"), (-0.3, -0.3, "FAIL"), (0.3, 0.0, "FAIL"), (-0.1, 0.5, "pass"), (-0.3, None, "FAIL")],
)
def test_logits_settle_where_only_their_random_part_shrinks(power, coherent, status):
    records = law("head", power, quantity="change", role="unembedding")
    records += law("blocks.0", 0.0, quantity="change", role="residual stream")
    if coherent is not None:
        records += law("head", coherent, quantity="coherent", role="unembedding")
    assert fit(records)["head", "change"].status == status
