"""Searches an entry's numbers at one fixed length of run, by Optuna's Gaussian process.

    python benchmarks/speedrun/tune.py adamw --trials 12

The first point is the entry's own; each trial is one run of seed `SEED`, which no measurement uses. Points are kept in a journal
in ``--runs``, so that the same command goes on where it was stopped. The best point is printed as keys of the entry's YAML file.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import optuna
from entries import Entry, load
from task import Task, train

from lightning_mue.analysis.sweep.axes import parse_rates
from lightning_mue.analysis.sweep.search import distribution

SEED = 1000
STEPS = 64


def tune(task: Task, entry: Entry, column: str, trials: int, runs: Path, steps: int = STEPS) -> dict[str, float]:
    """Values of the best point of a search, by dotted key."""
    runs.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal.JournalFileBackend(str(runs / "tuning.journal"))
    study = optuna.create_study(
        study_name=f"{entry.name}/{column}",
        storage=optuna.storages.JournalStorage(journal),
        sampler=optuna.samplers.GPSampler(seed=trials, n_startup_trials=5, deterministic_objective=True),
        load_if_exists=True,
    )
    space = {key: distribution(parse_rates(text)) for key, text in entry.space.items()}
    if not study.trials:
        study.enqueue_trial({key: entry.value(key) for key in space})
    while (done := len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))) < trials:
        trial, start = study.ask(space), time.perf_counter()
        loss = train(task, entry.changed(trial.params), column, steps, SEED)
        study.tell(trial, loss)
        shown = " ".join(
            f"{key.split('.')[-1] if key[-1].isalpha() else key[-7:]} {value:.3g}"
            for key, value in trial.params.items()
        )
        print(f"{entry.name} {column} {done}: {loss:.4f} in {time.perf_counter() - start:.0f} s; {shown}", flush=True)
    return study.best_params


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+")
    parser.add_argument("--column", default="dense")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--runs", type=Path, default=Path("logs/speedrun"))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    best = {}
    for trials in range(1, args.trials + 1):  # in turn, so that a search that is stopped has given all the same budget
        best = {name: tune(Task(), load(name), args.column, trials, args.runs) for name in args.entries}
    for name, values in best.items():
        print(name, {key: float(f"{value:.3g}") for key, value in values.items()}, flush=True)


if __name__ == "__main__":
    main()
