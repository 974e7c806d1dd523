"""A sweep trains everything once, goes on where it was interrupted, stops what diverges, and waits for nobody who is dead."""

import math

import pytest
from helpers.sweeps import FakeRunner, Watch, axis, plan

from lightning_mue.analysis.sweep import loop
from lightning_mue.analysis.sweep.axes import Range
from lightning_mue.analysis.sweep.loop import Sweep, curve_of, is_far_above, missing_jobs
from lightning_mue.analysis.sweep.runner import Progress
from lightning_mue.analysis.sweep.storage import Entry, Outcome, SweepStorage
from lightning_mue.analysis.trials import read_trials


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LOOK", 0.01)
    monkeypatch.setattr(loop, "_READ", 0.05)

    def sweep(swept, runner, jobs=2, watch=None):
        storage = SweepStorage(str(tmp_path / "journal.log"), "sweep", swept)
        return Sweep(storage, runner, tmp_path, jobs, watch or Watch())

    return sweep


def test_every_run_once_with_the_same_seeds_at_every_rate(sweep, tmp_path):
    swept = plan(axes=(axis(width=[64, 128]),), seeds=2, rates=(2.0**-7, 2.0**-6, 2.0**-5))
    runner = FakeRunner()
    sweep(swept, runner).run()
    rates = (2.0**-7, 2.0**-6, 2.0**-5)
    assert sorted(runner.starts) == sorted((r, s, w) for r in rates for s in (0, 1) for w in (64, 128))
    table = read_trials(tmp_path / "trials.csv")
    assert {(t.lr, t.seed, t.size["width"]): t.loss for t in table} == {
        start: (math.log2(start[0]) + 6) ** 2 for start in runner.starts
    }


@pytest.mark.parametrize(("optimum", "extend", "added"), [(-4, 4, [-5, -4, -3]), (-9, 4, [-10, -9]), (0, 2, [-5, -4])])
def test_a_grid_grows_towards_the_optimum(sweep, optimum, extend, added):
    runner = FakeRunner(optimum)
    sweep(plan(rates=(2.0**-8, 2.0**-7, 2.0**-6), extend=extend), runner).run()
    octaves = sorted(round(math.log2(lr)) for lr, _, _ in runner.starts)
    assert octaves == sorted([-8, -7, -6, *added])


def test_what_was_finished_before_a_stop_is_not_repeated(sweep):
    swept = plan(seeds=2, rates=(2.0**-7, 2.0**-6, 2.0**-5))
    first = FakeRunner(stop_at=3, ends_after=1)
    with pytest.raises(KeyboardInterrupt):
        sweep(swept, first).run()
    begun = set(first.starts) - set(first.stopped)
    assert first.stopped
    second = FakeRunner()
    entries = sweep(swept, second).run()
    assert len(entries) == 6
    assert set(first.stopped) <= set(second.starts)
    assert not begun & set(second.starts)
    third = FakeRunner()
    sweep(swept, third).run()
    assert third.starts == []


def test_more_seeds_later_are_trained_alone(sweep):
    rates = (2.0**-7, 2.0**-6, 2.0**-5)
    sweep(plan(rates=rates), FakeRunner()).run()
    more = FakeRunner()
    sweep(plan(rates=rates, seeds=2), more).run()
    assert sorted(more.starts) == [(r, 1, 64) for r in rates]


def test_a_run_without_a_finite_loss_is_stopped_and_recorded(sweep, tmp_path):
    def losses(lr, seed, width):
        return Progress(0.3, math.inf) if lr > 0.03 else (math.log2(lr) + 6) ** 2

    runner = FakeRunner(losses=losses)
    sweep(plan(rates=(2.0**-7, 2.0**-6, 2.0**-5)), runner).run()
    assert runner.stopped[0] == (2.0**-5, 0, 64)
    assert {t.lr for t in read_trials(tmp_path / "trials.csv") if math.isinf(t.loss)} == {r[0] for r in runner.stopped}


def test_a_crash_is_told_and_tried_again_by_the_next_call_only(sweep):
    def crash(lr, seed, width):
        return Outcome(math.nan, error="boom") if lr == 2.0**-6 else 1.0 + lr

    swept, watch, runner = plan(rates=(2.0**-7, 2.0**-6), extend=0), Watch(), FakeRunner(losses=crash)
    entries = sweep(swept, runner, watch=watch).run()
    assert len(runner.starts) == 2
    assert [e.state for e in entries].count("crashed") == 1
    assert {o.error for _, o in watch.outcomes} == {"boom", ""}
    again = FakeRunner()
    assert {e.state for e in sweep(swept, again).run()} == {"finished"}
    assert [lr for lr, _, _ in again.starts] == [2.0**-6]


def test_a_sweep_in_which_nothing_works_ends(sweep):
    runner = FakeRunner(losses=lambda *start: Outcome(math.nan, error="no data"))
    with pytest.raises(ValueError, match="trials: found 3 that crashed, the last with 'no data'"):
        sweep(plan(axes=(axis(width=[64, 128, 256]),)), runner, jobs=1).run()
    assert len(runner.starts) == 3


def test_a_run_that_another_process_took_over_is_stopped(sweep):
    swept = plan(rates=(2.0**-7,))
    runner = FakeRunner(ends_after=20)
    mine = sweep(swept, runner, jobs=1)
    take = mine.storage.take

    def take_and_lose(job):
        trial_id = take(job)
        if len(runner.starts) == 0:
            mine.storage.give_up(trial_id)
        return trial_id

    mine.storage.take = take_and_lose
    entries = mine.run()
    assert runner.stopped == [(2.0**-7, 0, 64)]
    assert len(runner.starts) == 2
    assert [e.state for e in entries] == ["finished"]


def test_a_search_takes_its_samples_in_its_range_and_pairs_its_seeds(sweep):
    swept = plan(rates=Range("log", 2.0**-10, 2.0**-2), samples=8, seeds=2)
    runner = FakeRunner()
    entries = sweep(swept, runner, jobs=3).run()
    by_rate = {}
    for lr, seed, _ in runner.starts:
        by_rate.setdefault(lr, []).append(seed)
    assert len(by_rate) == 8
    assert all(sorted(seeds) == [0, 1] for seeds in by_rate.values())
    assert all(2.0**-10 <= lr <= 2.0**-2 for lr in by_rate)
    assert min(e.outcome.loss for e in entries) < 1.0  # within an octave


def test_another_key_is_searched_at_one_rate(sweep, tmp_path):
    key = "model.init_args.optimizer.init_args.weight_decay"
    sweep(plan(search={key: Range("lin", 0.0, 1.0)}, samples=3), FakeRunner()).run()
    table = read_trials(tmp_path / "trials.csv")
    assert {t.lr for t in table} == {0.01}
    assert len({t.settings[key] for t in table}) == 3


def entry(early, state="finished"):
    cell = plan().cells()[0]
    job = next(missing_jobs(plan(), []))
    assert str(job.cell) == str(cell)
    return Entry(0, 0, job, "w", state, Outcome(1.0), early)


@pytest.mark.parametrize(
    ("loss", "twentieth", "expected"),
    [(8.1, 10, True), (7.9, 10, False), (100.0, 4, False), (100.0, 11, False), (2.0, 10, False)],
)
def test_far_above_is_as_far_above_the_start_as_the_best_is_below(loss, twentieth, expected):
    others = [entry({1: 5.0, 10: 2.0}), entry({1: 5.2, 10: 3.0}, "running"), entry({1: 4.9, 10: 4.0}), entry({})]
    assert is_far_above(loss, twentieth, others) is expected
    shifted = [entry({k: v - 7.0 for k, v in e.early.items()}) for e in others]
    assert is_far_above(loss - 7.0, twentieth, shifted) is expected


def test_noise_of_runs_that_hardly_learn_stops_nobody():
    others = [entry({1: 5.545, 8: 5.58, 16: 5.54}), entry({1: 5.55, 8: 5.52, 16: 5.56})]
    assert not is_far_above(5.576, 16, others)
    assert is_far_above(5.7, 16, others)


def test_others_that_learned_nothing_stop_nobody():
    assert not is_far_above(99.0, 10, [entry({1: 5.0, 10: 5.0})])


def test_of_several_tries_the_last_counts():
    swept = plan(rates=(2.0**-7,))
    job = next(missing_jobs(swept, []))
    tries = [
        Entry(0, 0, job, "w", "crashed", Outcome(math.nan, "boom")),
        Entry(1, 1, job, "w", "finished", Outcome(2.0)),
    ]
    assert curve_of(swept, tries) == {job.point: 2.0}
    assert list(missing_jobs(swept, tries)) == []
