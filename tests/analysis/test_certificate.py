"""A certificate finds the drift and the penalty that made the trials, says when it cannot tell, and is written whole."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.trials import GRID, WIDTHS, sweep

from lightning_mue.analysis.certificate import Limits, certify
from lightning_mue.analysis.trials import Trial
from lightning_mue.console import to_text


def only(certificate):
    (result,) = certificate.results
    return result


def test_known_drift_and_penalty_are_found():
    """With a noise of 1e-9: the optimum moves by -0.3 octaves for each doubling, at 5 % an octave squared."""
    result = only(certify(sweep(WIDTHS, drift=-0.3)))
    assert [t.drift.value for t in result.transfers] == pytest.approx([0, -0.3, -0.6, -0.9])
    assert [t.penalty.value for t in result.transfers] == pytest.approx([0, 0.0045, 0.018, 0.0405], rel=1e-4)
    assert result.figures.exponent.value == pytest.approx(0.3)
    assert result.figures.law_error.value == pytest.approx(0, abs=1e-5)
    assert result.figures.flat_error.value == pytest.approx(np.std([0, 0.3, 0.6, 0.9]))
    assert result.figures.kappa.value == pytest.approx(0, abs=1e-5)
    assert (result.verdict, result.worst.label) == ("drifts", "width=512")
    assert "at width=512 the optimum is -0.90" in result.reason


def test_kappa_and_the_limit_of_the_penalty():
    """Curvature grows as N^0.5; the optimum goes to 1/2 octave as 1 - 1/N, so its penalty has a limit."""
    trials = []
    for ratio, size in WIDTHS.items():
        trials += sweep(
            {1: size}, best=0.016 * 2 ** (0.5 * (1 - 1 / ratio)), curvature=lambda _, n=ratio: 0.05 * n**0.5
        )
    figures = only(certify(trials)).figures
    assert figures.kappa.value == pytest.approx(0.5)
    flat = []
    for ratio, size in WIDTHS.items():
        flat += sweep({1: size}, best=0.016 * 2 ** ((0.2 - 0.2 / ratio) ** 0.5))
    assert only(certify(flat)).figures.penalty_limit.value == pytest.approx(0.05 * 0.2, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "noise", "drift"), [(3, 0.003, 0.0), (3, 0.003, 0.3), (8, 0.01, 0.3)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, noise, drift):
    """Of the drift 90 %, of the penalty at least that: 3.3 standard errors of the binomial. Noise that seeds share cancels."""
    hits = []
    for draw in range(40):
        transfers = only(
            certify(sweep(WIDTHS, seeds=seeds, noise=noise, shared=0.1, drift=drift, draw=draw + 1))
        ).transfers
        for octaves, t in zip((1, 2, 3), transfers[1:], strict=True):
            hits.append([drift * octaves in t.drift, 0.05 * (drift * octaves) ** 2 in t.penalty])
    of_drift, of_penalty = np.mean(hits, axis=0)
    error = math.sqrt(0.9 * 0.1 / 40)  # the three sizes of a draw share the base
    assert abs(of_drift - 0.9) < 3.3 * error
    assert of_penalty > 0.9 - 3.3 * error


def test_noise_that_a_seed_adds_to_all_runs_cancels():
    quiet, loud = (only(certify(sweep(WIDTHS, noise=0.002, shared=s, draw=4))) for s in (0.0, 0.1))
    for a, b in zip(quiet.transfers[1:], loud.transfers[1:], strict=True):
        assert b.drift.high - b.drift.low == pytest.approx(a.drift.high - a.drift.low, rel=0.05)
    assert loud.transfers[0].optimum.loss.high - loud.transfers[0].optimum.loss.low > 0.1


def test_verdicts():
    assert only(certify(sweep(WIDTHS, noise=0.002, draw=1))).verdict == "transfers"
    noisy = only(certify(sweep(WIDTHS, noise=0.02, draw=1)))
    assert noisy.verdict == "cannot tell"
    assert "too noisy" in noisy.reason
    edge = only(certify(sweep(WIDTHS, drift=1.0, rates=GRID[:5])))
    assert edge.verdict == "cannot tell"
    assert "at the edge" in edge.reason
    one = only(certify(sweep(WIDTHS, seeds=1)))
    assert one.verdict == "cannot tell"
    assert "at least 3 seeds" in one.reason
    strict = certify(sweep(WIDTHS, noise=0.002, draw=1), limits=Limits(penalty=1e-6))
    assert only(strict).verdict == "cannot tell"
    assert not strict.holds()


def test_an_optimum_missing_elsewhere_does_not_hide_a_drift():
    trials = sweep({1: WIDTHS[1], 4: WIDTHS[4]}, drift=-0.5)
    trials += sweep({8: WIDTHS[8]}, drift=-1, rates=GRID[2:])  # its best is at the lowest rate
    result = only(certify(trials))
    assert (result.verdict, result.transfers[2].optimum) == ("drifts", None)


def test_a_transferred_rate_that_diverges_or_did_not_run():
    trials = sweep({1: WIDTHS[1]}, noise=0.001) + sweep({8: WIDTHS[8]}, drift=-0.67, diverges_above=0.01, noise=0.001)
    result = only(certify(trials))
    assert result.verdict == "drifts"
    assert math.isinf(result.transfers[1].penalty.value)
    trials = sweep({1: WIDTHS[1]}) + sweep({8: WIDTHS[8]}, best=0.004, rates=GRID[:3])
    result = only(certify(trials))
    assert "outside the rates that ran here" in result.transfers[1].problem
    assert result.verdict == "drifts", "the drift alone is beyond doubt"
    trials = sweep({1: WIDTHS[1]}) + sweep({8: WIDTHS[8]}, best=0.012, rates=0.012 * np.array([0.5, 1.0, 1.2]))
    result = only(certify(trials))
    assert "the base's best rate, 0.016, is outside the rates that ran here" in result.reason


def test_beyond_the_parabola_the_penalty_is_read_from_measured_losses():
    """A valley with a wall: a parabola through its bottom would say 0.05 * 4 at 2 octaves."""

    def walled(trial):
        far = math.log2(trial.lr / 0.004)
        return replace(trial, loss=trial.loss * (1 + (0.5 * (far - 1) if far > 1 else 0)))

    trials = sweep({1: WIDTHS[1]}) + [walled(t) for t in sweep({4: WIDTHS[4]}, drift=-1)]
    assert only(certify(trials)).transfers[1].penalty.value == pytest.approx((1 + 0.2) * 1.5 - 1)


def test_axes_are_what_differs_from_the_base():
    dense = {"width": 64, "n_experts": 0, "top_k": 1}
    sizes = {
        "width": {**dense, "width": 128},
        "dense -> MoE": {**dense, "n_experts": 8, "top_k": 2},
        "width+dense -> MoE": {"width": 128, "n_experts": 4, "top_k": 1},
    }
    trials = sweep({1: dense}, noise=0.001)
    for size in sizes.values():
        trials += sweep({2: size}, noise=0.001)
    results = {r.axis: r for r in certify(trials).results}
    assert set(results) == set(sizes)
    assert [t.ratio for t in results["width"].transfers] == [1, 2]
    assert math.isnan(results["dense -> MoE"].transfers[1].ratio)
    assert results["dense -> MoE"].transfers[1].label == "n_experts=8, top_k=2"
    experts = certify(sweep({1: {"n_experts": 0}, 8: {"n_experts": 8}}))
    assert only(experts).transfers[1].ratio == 8, "a dense FFN counts as one expert"


def test_seeds_that_change_nothing_are_refused():
    copies = [replace(t, seed=seed) for t in sweep(WIDTHS, seeds=1) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"seeds 0 and 1 with the same losses .*MuECallback\(seed"):
        certify(copies)


def test_the_base_can_be_another_size():
    result = only(certify(sweep(WIDTHS, drift=0.2), {"width": 256}))
    assert result.transfers[0].label == "width=256"
    assert [t.drift.value for t in result.transfers[1:]] == pytest.approx([-0.4, -0.2, 0.2])
    with pytest.raises(ValueError, match=r"base: found \{'width': 96\}, expected a size of the trials"):
        certify(sweep(WIDTHS), {"width": 96})


def test_seeds_that_did_not_run_everywhere_are_left_out_and_named():
    extra = [t for t in sweep({1: WIDTHS[1]}, seeds=4) if t.seed == 3]
    certificate = certify(sweep(WIDTHS) + extra)
    assert only(certificate).seeds == (0, 1, 2)
    assert "seeds [3] left out" in certificate.notes[0]
    few = [t for t in sweep(WIDTHS, seeds=4) if t.seed == 3 and t.lr == GRID[3]]
    assert only(certify(sweep(WIDTHS) + few)).seeds == (0, 1, 2)


def test_searched_settings_are_chosen_at_the_base():
    worse = [replace(t, loss=1.1 * t.loss, settings={"std": 1}) for t in sweep(WIDTHS, drift=1)]
    better = [replace(t, settings={"std": 2}) for t in sweep(WIDTHS)]
    certificate = certify(worse + better)
    assert only(certificate).transfers[3].drift.value == pytest.approx(0, abs=1e-5)
    assert '"std": 2' in certificate.notes[0]


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], "base: found {}"),
        (sweep({1: WIDTHS[1]}), "expected the base .* and at least one other size"),
        ([*sweep(WIDTHS), Trial("complete-mue", WIDTHS[1], 0, float(GRID[0]), 9.0)], "two runs with the losses"),
        ([Trial("sp", WIDTHS[n], 0, lr, -1.0) for n in (1, 2) for lr in (1, 2, 3)], "expected a positive loss"),
        ([Trial("sp", WIDTHS[n], n, lr, 1.0) for n in (1, 2) for lr in (1, 2, 3)], "one that ran at every size"),
    ],
)
def test_what_cannot_be_certified_is_refused(trials, message):
    with pytest.raises(ValueError, match=message):
        certify(trials)


@pytest.mark.slow  # draws
def test_the_files_hold_what_was_measured(tmp_path):
    two = {1: WIDTHS[1], 8: WIDTHS[8]}
    trials = sweep(two, noise=0.002) + sweep(two, rule="sp", drift=-0.5, noise=0.002, diverges_above=0.1)
    certificate = certify(trials)
    page = certificate.write(tmp_path / "new").read_text()
    for expected in ("complete-mue", "drifts", "transfers", "<svg", "width=512"):
        assert expected in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "self-contained"
    assert (tmp_path / "new" / "certificate.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "new" / "certificate.json").read_text())
    sp = next(axis for axis in data["axes"] if axis["rule"] == "sp")
    assert sp["sizes"][1]["drift"]["value"] == pytest.approx(-1.5, abs=0.2)
    assert sp["sizes"][1]["losses"][-1] is None, "diverged"
    with (tmp_path / "new" / "certificate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["rule"], r["size"]) for r in rows][2:] == [("sp", "width=64"), ("sp", "width=512")]
    assert float(rows[3]["penalty"]) == pytest.approx(sp["sizes"][1]["penalty"]["value"])
    assert "transfers" in to_text(certificate)
    assert not certificate.holds()
    assert certificate.holds(["complete-mue"])
