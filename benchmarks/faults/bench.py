"""The fault bench: ten faults in the quickstart, what rose first in each, and how long before the loss showed it.

    python benchmarks/faults/bench.py [--runs DIR] [--jobs N] [--quick] [--strict]

trains every fault with every scored seed, and healthy runs of these and of other seeds (one thread each, N at a time); scores
them, and writes ``results/faults_<processor>.json`` and the pictures of docs/indicators/. Runs in DIR that have ended are not
repeated. ``--quick``: two faults of one seed and three healthy runs, all short; its results and pictures go to DIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from faults import FAULTS
from run import HEALTHY, Setting, folder_of, train
from score import Score, by_fault, score

from lightning_mue.health.series import Run, read_run

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from draw import draw

#: Seeds with faults, and those of further healthy runs. Ranges were set on other weights and data: those of the seeds 0 to 10, and
#: the healthy runs of 14 to 20.
SCORED, CALM = (11, 12, 13), (21, 22, 23, 24, 25, 26, 27)
_PICTURES = Path(__file__).parents[2] / "docs" / "indicators" / "images"


def train_missing(out: Path, seeds: Sequence[int], faults: Sequence[str], setting: Setting, jobs: int) -> None:
    """Trains what is missing of the runs of some seeds, each seed in a process of its own.

    Raises:
        SystemExit: If such a process fails.
    """
    for seed in seeds:
        missing = [f for f in (HEALTHY, *faults) if not (folder_of(out, f, seed) / "run.json").exists()]
        if not missing:
            continue
        print(f"seed {seed}: {', '.join(missing)}", flush=True)
        arguments = (out, seed, [f for f in missing if f != HEALTHY], setting, jobs)
        process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"seed {seed}: the process ended with exit code {process.exitcode}")


def read_runs(out: Path, setting: Setting) -> dict[tuple[str, int], Run]:
    """(fault, seed) -> the metrics of each run that has ended.

    Raises:
        SystemExit: If a run had other settings.
    """
    runs = {}
    for path in sorted(out.rglob("run.json")):
        told = json.loads(path.read_text())
        other = {key: told[key] for key, value in vars(setting).items() if told[key] != value}
        if other:
            raise SystemExit(
                f"{path.parent}: found a run with {other}, expected {setting}. Use another --runs, or delete it"
            )
        runs[told["fault"], told["seed"]] = read_run(path.parent)
    return runs


def score_all(runs: dict[tuple[str, int], Run], seeds: Sequence[int], setting: Setting) -> list[Score]:
    """The scores of all runs of the seeds with faults, and of all healthy runs."""
    healthy = {seed: run for (fault, seed), run in runs.items() if fault == HEALTHY}
    kept = [(f, s) for f, s in runs if f == HEALTHY or (s in seeds and s in healthy)]
    kept.sort(key=lambda key: ([*FAULTS, HEALTHY].index(key[0]), key[1]))
    return [score(f, s, runs[f, s], 0 if f == HEALTHY else setting.at, healthy) for f, s in kept]


def claims_of(scores: Sequence[Score]) -> list[common.Claim]:
    """What is claimed of the scores."""
    ill = [s for s in scores if s.fault != HEALTHY]
    calm = [s for s in scores if s.fault == HEALTHY]
    n, flagged = len({s.fault for s in ill}), [s for s in ill if s.flagged is not None]
    leads = {
        f"all {len(flagged)} flagged runs, to the end of those whose loss shows nothing": [s.lead for s in flagged],
        "runs whose loss shows the fault beside the healthy run of the seed": [
            s.shown - s.flagged for s in flagged if s.shown is not None and s.flagged is not None
        ],
        "runs whose loss leaves its range": [
            s.judged - s.flagged for s in flagged if s.judged is not None and s.flagged is not None
        ],
    }
    return [
        common.Claim(
            f"faults of {n} flagged before the loss shows them, in each run",
            "at least",
            0.9 * n,
            by_fault(ill, "early"),
        ),
        common.Claim(
            f"faults of {n} whose role (and layer) is named, in each run", "at least", 0.8 * n, by_fault(ill, "named")
        ),
        *(
            common.Claim(
                f"median lead in steps, {what}", "at least", 20, statistics.median(found) if found else float("nan")
            )
            for what, found in leads.items()
        ),
        common.Claim(
            f"false alarms in {len(calm)} healthy runs", "at most", 0, sum(s.flagged is not None for s in calm)
        ),
    ]


def main() -> None:
    """Trains what is missing, scores, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("logs/faults"), help="where the runs are (%(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=SCORED, help="seeds with faults")
    parser.add_argument("--calm", type=int, nargs="*", default=CALM, help="seeds of further healthy runs")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--quick", action="store_true", help="a small bench that only shows that all of it works")
    parser.add_argument("--no-training", action="store_true", help="score the runs that are there")
    args = common.parse(parser, threads=1)
    setting, seeds, calm, faults = Setting(), tuple(args.seeds), tuple(args.calm), args.faults
    if args.quick:
        setting, seeds, calm, faults = Setting(steps=34, at=22, ramp=4), (0,), (4, 5), ["biased rounding", "lr x 8"]
    if not args.no_training:
        train_missing(args.runs, seeds, faults, setting, args.jobs)
        train_missing(args.runs, calm, [], setting, args.jobs)
    runs = {key: run for key, run in read_runs(args.runs, setting).items() if key[1] in (*seeds, *calm)}
    scores = score_all(runs, seeds, setting)
    draw(runs, scores, setting, args.runs if args.quick else _PICTURES)
    where = {"folder": args.runs} if args.quick else {}
    name = common.result_name("faults", **where)
    common.save(name, [s.row() for s in scores], lambda _: claims_of(scores), strict=args.strict, **where)


if __name__ == "__main__":
    main()
