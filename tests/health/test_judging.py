"""The judge: healthy series are healthy, faults are found when and where they are, and it never looks into the future."""

import numpy as np
import pytest

from lightning_mue.health.card import as_markdown, headline, look
from lightning_mue.health.departures import LEAST_HISTORY, LONGEST_MEMORY, Level, levels, surely_healthy
from lightning_mue.health.indicators import INDICATORS
from lightning_mue.health.judging import RunJudge, judge
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import Series, series_of

N = 200


def learning(seed, n=N):
    """Tags of a healthy run: a falling loss, growing Z-values, noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(n)

    def noisy(values, noise=0.04):
        return values * np.exp(noise * rng.standard_normal(n))

    return {
        "train/loss": noisy(1.5 + 5 * np.exp(-t / 15)),
        "stability/z/attention/00": noisy(27 + 110 * t / (t + 60)),
        "stability/z/attention/01": noisy(27 + 60 * t / (t + 60)),
        "stability/rms/ffn/00": noisy(0.6 + 1.0 * t / (t + 5)),
        "routing/max_violation_max": noisy(1.2 * np.exp(-t / 60) + 0.15, 0.15),
        "routing/token_entropy_min": 1.5 + 0.05 * rng.standard_normal(n),
        "routing/dead_experts_max": np.zeros(n),
    }


def as_run(values, steps=None):
    return {tag: series_of(zip(range(len(v)) if steps is None else steps, v, strict=True)) for tag, v in values.items()}


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_is_healthy(seed):
    verdict = judge(as_run(learning(seed)))
    assert verdict.level is Level.HEALTHY, verdict.symptoms
    assert (verdict.samples, verdict.indicators, verdict.last_step) == (N, 6, N - 1)


FAULTS = {
    "stability/z/attention/01": lambda v: v * 8,
    "stability/rms/ffn/00": lambda v: v / 5,
    "routing/max_violation_max": lambda v: v + 4,
    "routing/token_entropy_min": lambda v: v * 0.1,
    "routing/dead_experts_max": lambda v: v + 4,
    "train/loss": lambda v: v * 1.6,
}


@pytest.mark.parametrize("tag", FAULTS)
def test_a_fault_is_found_when_and_where_it_is(tag):
    values = learning(1)
    values[tag][120:] = FAULTS[tag](values[tag][120:])
    verdict = judge(as_run(values))
    (symptom,) = verdict.symptoms
    assert verdict.level is Level.WATCH
    assert 120 <= symptom.step <= 120 + symptom.indicator.hold
    assert (symptom.indicator.tag in tag) or symptom.indicator.name == "loss"
    assert symptom.layer == {"1": "01", "0": "00", "x": "max", "n": "min", "s": ""}[tag[-1]]


def test_without_evidence_a_run_is_not_called_healthy():
    """Few samples, or many of what no indicator is; a symptom is evidence at once."""
    values = {"train/loss": learning(0)["train/loss"][:LEAST_HISTORY], "val_loss": np.ones(N), "lr-AdamW": np.ones(N)}
    assert judge(as_run(values)).known
    values["train/loss"] = values["train/loss"][1:]
    few, nothing = judge(as_run(values)), judge(as_run({"val_loss": np.ones(N), "lr-AdamW": np.ones(N)}))
    assert look(few)[0] == look(nothing)[0] == "not known yet"
    assert headline(few).startswith(f"{LEAST_HISTORY - 1} samples of 1 indicator to step {N - 1}, {LEAST_HISTORY} are")
    assert (nothing.samples, nothing.indicators) == (0, 0)
    assert as_markdown(few).startswith("# NOT KNOWN YET")
    live = RunJudge()
    live.add(0, {"lr-AdamW": 1.0})
    assert (live.verdict.samples, live.verdict.known) == (0, False)
    live.add(1, {"train/loss": float("nan")})
    assert (look(live.verdict)[0], live.verdict.known) == ("act", True)


@pytest.mark.parametrize("tag", ["updates/weight_rms/bias/00", "stability/rms/ffn/00", "updates/gradient_rms/gate/00"])
@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_growth_from_zero_is_no_evidence_but_a_jump_after_it_is(tag, power):
    """Weights that begin as zeros grow with the root of the steps, the steps, or (in a warm-up) their square."""
    grown = 1e-4 * np.arange(500) ** power * np.exp(0.05 * np.random.default_rng(0).standard_normal(500))
    assert judge(as_run({tag: grown})).level is Level.HEALTHY
    for at in (30, 400):
        jumped = np.where(np.arange(500) < at, grown, 30 * grown)
        (symptom,) = judge(as_run({tag: jumped[: at + 5]})).symptoms
        assert at <= symptom.step <= at + 2


@pytest.mark.parametrize(
    ("tag", "tiny"), [("routing/max_violation/00", 0.01), ("stability/attention_error/attention/00", 1e-6)]
)
def test_ratios_of_values_too_small_to_matter_say_nothing(tag, tiny):
    rises = tiny * np.where(np.arange(N) < 100, 1, 10)
    assert judge(as_run({tag: rises})).level is Level.HEALTHY
    assert judge(as_run({tag: 1000 * rises})).level is Level.WATCH


def test_the_settling_of_the_first_samples_is_no_drift():
    """A router that grows certain in the first 20 samples, and one that does so later."""
    for begins, level in ((10, Level.HEALTHY), (60, Level.WATCH)):
        entropy = 1.85 - 0.65 * np.clip((np.arange(N) - begins) / 8, 0, 1)
        assert judge(as_run({"routing/token_entropy/00": entropy})).level is level


def test_a_slow_drift_is_found():
    values = learning(2)
    values["stability/z/attention/00"][80:] *= np.exp(np.arange(N - 80) / 25)
    (symptom,) = judge(as_run(values)).symptoms
    assert 80 < symptom.step < 150
    assert symptom.lasts


def test_what_is_over_is_said_to_be_over():
    values = learning(3)
    values["stability/rms/ffn/00"][100:105] *= 20
    (symptom,) = judge(as_run(values)).symptoms
    assert not symptom.lasts


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_calls_for_action_at_once(bad):
    values = learning(4)
    values["train/loss"][3] = bad
    verdict = judge(as_run(values))
    (symptom,) = verdict.symptoms
    assert verdict.level is Level.ACT
    assert symptom.step == 3
    assert symptom.told == "a finite number"
    assert not symptom.lasts


def test_early_values_have_no_history_to_depart_from():
    values = learning(5)
    values["stability/rms/ffn/00"][: LEAST_HISTORY - 1 : 2] *= 50
    assert all(f.step >= LEAST_HISTORY for f in judge(as_run(values)).symptoms)


def test_a_reference_shows_what_the_history_cannot():
    """A load that never becomes even has nothing to depart from, but the healthy runs' became even."""
    values = learning(6)
    values["routing/max_violation_max"] = 1.2 * np.exp(0.1 * np.random.default_rng(0).standard_normal(N))
    assert judge(as_run(values)).level is Level.HEALTHY
    reference = Reference([as_run(learning(seed)) for seed in (7, 8)])
    (symptom,) = judge(as_run(values), reference=reference).symptoms
    assert symptom.indicator.name == "MaxVio"
    assert symptom.told.endswith("as in the reference")
    assert judge(as_run(learning(9)), reference=reference).level is Level.HEALTHY


def steady(seed, rate=1.0):
    """A rate that the optimizer sets, with a schedule and the noise of a small batch, and one that nothing sets."""
    rng, t = np.random.default_rng(seed), np.arange(N)
    schedule = np.minimum(1, (t + 1) / 20) * (1 - t / N)
    tag = "updates/update_ratio/hidden/00"
    return as_run(
        {
            tag: 0.08 * rate * schedule * np.exp(0.02 * rng.standard_normal(N)),
            "stability/z/router_max": np.full(N, rate),
        }
    )


def test_where_healthy_runs_agree_a_small_departure_counts():
    """1.6 times the rate is far below the factor of 2.5; of two runs nobody knows how well they agree; a Z-value is not steady."""
    reference = Reference([steady(seed) for seed in range(1, 6)])
    for seed in range(10, 16):
        assert judge(steady(seed), reference=reference).level is Level.HEALTHY
    (symptom,) = judge(steady(20, 1.6), reference=reference).symptoms
    assert (symptom.indicator.name, symptom.where, symptom.step) == ("update ratio", "hidden", 10)
    assert judge(steady(20, 1.6), reference=Reference([steady(1), steady(2)])).level is Level.HEALTHY
    assert judge(steady(20, 1.6)).level is Level.HEALTHY
    longer = {tag: Series(3 * series.steps, series.values) for tag, series in steady(30).items()}
    stretched = Reference([steady(seed) for seed in range(1, 6)], steps=3 * (N - 1) + 1)
    assert judge(longer, reference=stretched).level is Level.HEALTHY


def test_what_healthy_runs_do_too_is_expected_whatever_the_own_past_says():
    tag = "stability/z/attention/00"
    rise = 20 * np.exp(np.clip((np.arange(N) - 100) / 5, 0, 2.5))
    assert judge(as_run({tag: rise})).level is Level.WATCH
    reference = Reference([as_run({tag: 1.2 * rise}), as_run({tag: 0.9 * rise})])
    assert judge(as_run({tag: rise}), reference=reference).level is Level.HEALTHY
    flat = Reference([as_run({tag: np.full(N, 20.0)})])
    (symptom,) = judge(as_run({tag: rise}), reference=flat).symptoms
    assert 105 <= symptom.step <= 125


def test_an_expert_without_a_token_for_some_samples_is_chance_beside_healthy_runs_too():
    dead = np.where((np.arange(N) >= 5) & (np.arange(N) < 14), 1.0, 0.0)  # as in a healthy run of the fault bench
    reference = Reference([as_run({"routing/dead_experts/01": np.zeros(N)})])
    assert judge(as_run({"routing/dead_experts/01": dead}), reference=reference).level is Level.HEALTHY
    dead[5:] = 1.0
    (symptom,) = judge(as_run({"routing/dead_experts/01": dead}), reference=reference).symptoms
    assert symptom.step == 14


def test_a_reference_of_another_length_is_stretched():
    values = as_run(learning(10), steps=range(0, 5 * N, 5))
    reference = Reference([as_run(learning(11))], steps=5 * N)
    assert judge(values, reference=reference).level is Level.HEALTHY
    unstretched = Reference([as_run({"train/loss": learning(11)["train/loss"] / 2})])
    assert judge(values, reference=unstretched).level is Level.WATCH


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_judge_beside_the_run_says_the_same_and_may_be_interrupted(seed, with_reference):
    values = learning(seed)
    values["stability/rms/ffn/00"][90:] *= 4
    values["stability/z/attention/00"][70:75] *= 30
    values["train/loss"][150] = float("nan")
    reference = Reference([as_run(learning(seed + 50))]) if with_reference else None
    live, told = RunJudge(reference=reference), []
    for step in range(N):
        if step in (71, 92, 151):
            resumed = RunJudge(reference=reference)
            resumed.load_state_dict(live.state_dict())
            live = resumed
        told += live.add(step, {tag: float(v[step]) for tag, v in values.items()})
    offline = judge(as_run(values), reference=reference)
    assert str(live.verdict) == str(offline)  # NaN is expected where any finite number is
    assert len(offline.symptoms) >= 3
    assert {(f.indicator.name, f.step) for f in offline.symptoms} <= {(f.indicator.name, f.step) for f in told}


def test_the_past_is_not_changed_by_the_future():
    values = learning(12)
    values["stability/rms/ffn/00"][120:] *= 6
    known = judge(as_run({tag: v[:130] for tag, v in values.items()})).symptoms
    values["stability/rms/ffn/00"][160:] *= 100
    assert [(f.step, f.value) for f in judge(as_run(values)).symptoms] == [(f.step, f.value) for f in known]


def test_a_loss_of_another_name_can_be_given():
    values = {"objective": learning(13)["train/loss"]}
    values["objective"][150:] *= 2
    assert judge(as_run(values)).level is Level.HEALTHY
    (symptom,) = judge(as_run(values), losses=["objective"]).symptoms
    assert symptom.indicator.name == "loss"


def test_what_is_surely_healthy_is_healthy():
    """On walks, jumps and drifts of every indicator; most values of a healthy run are told so, none that is not healthy."""
    rng = np.random.default_rng(7)
    sure, ill = 0, 0
    for indicator in INDICATORS * 3:
        walk = np.exp(rng.uniform(-1, 3) + np.cumsum(rng.normal(0, rng.choice([0.002, 0.02, 0.2]), 160)))
        walk[rng.integers(30, 150) :] *= rng.choice([1.0, 1.0, 0.2, 5.0])
        walk[rng.integers(30, 150)] = rng.choice([np.nan, walk[0], 0.0])
        for n in rng.integers(1, len(walk), 12):
            values = walk[max(0, n - LONGEST_MEMORY) : n]
            level = levels(indicator, series_of(enumerate(values)), only_last=True)[0][-1]
            told = surely_healthy(indicator, values.tolist())
            assert not (told and level)
            sure, ill = sure + told, ill + (level > 0)
    assert sure > 50
    assert ill > 50
