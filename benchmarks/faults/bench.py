"""The fault bench: ten faults in the quickstart, what rose first in each, and how long before the loss showed it.

    python benchmarks/faults/bench.py [--runs DIR] [--jobs N] [--quick]

trains every fault with every scored seed, and healthy runs of these and of other seeds (on one thread each, N at a time); scores
them, and writes ``results/faults_<processor>.json`` and the pictures of docs/indicators/. Runs in DIR that have ended are not
repeated. ``--quick``: two faults, one seed and two healthy runs, short ones; writes into DIR only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from faults import FAULTS
from run import HEALTHY, Setting, folder_of, train

sys.path.insert(0, str(Path(__file__).parents[1]))

#: Seeds with faults, and those of healthy runs besides. Seed 0 and seeds from 20 on are those that ranges were tuned on.
SCORED, CALM = (1, 2, 3), (4, 5, 6, 7, 8, 9, 10)


def train_missing(out: Path, seeds: Sequence[int], faults: Sequence[str], setting: Setting, jobs: int) -> None:
    """Trains what is missing of the runs of some seeds, each seed in a process of its own."""
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


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("logs/faults"), help="where the runs are")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="*", default=SCORED, help="seeds with faults")
    parser.add_argument("--calm", type=int, nargs="*", default=CALM, help="seeds of further healthy runs")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    args = parser.parse_args()
    setting = Setting()
    train_missing(args.runs, args.seeds, args.faults, setting, args.jobs)
    train_missing(args.runs, args.calm, [], setting, args.jobs)


if __name__ == "__main__":
    main()
