"""Speedrun on two cores: which optimizer reaches a validation loss in the fewest steps; what its settings cost at other sizes.

    python benchmarks/speedrun/run.py                          # everything that was not run yet, then the board
    python benchmarks/speedrun/run.py --stages dense --entries ours muon
    python benchmarks/speedrun/run.py --stages board           # from the runs of the file, without training

docs/speedrun.md has the protocol, and how to enter. Runs go to ``results/speedrun_<processor>.runs.jsonl`` one by one, the board to
``.json`` and ``.md`` beside it. ``--quick`` trains a toy model a few steps, for tests.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from board import write
from common import RESULTS, parse, result_name
from entries import load, names
from measure import confirm, curve, transfer
from runs import Runs
from task import Task

#: What can be asked for, in the order in which it is trained.
STAGES = {
    "dense": lambda runs, entry: curve(runs, entry, "dense"),
    "confirm": lambda runs, entry: confirm(runs, entry, "dense"),
    "moe": lambda runs, entry: curve(runs, entry, "moe"),
    "transfer-moe": lambda runs, entry: [transfer(runs, entry, "moe", rule) for rule in entry.settings["rules"]],
    "transfer-width": lambda runs, entry: [
        transfer(runs, entry, "width x 2", rule) for rule in entry.settings["rules"]
    ],
    "confirm-moe": lambda runs, entry: confirm(runs, entry, "moe"),
    "board": lambda runs, entry: None,
}
#: A model and lengths of run for tests.
TOY = replace(
    Task(),
    base={"width": 16, "depth": 1, "n_heads": 1, "n_experts": 0},
    columns={"dense": {}, "moe": {"n_experts": 4, "top_k": 2}, "width x 2": {"width": 32, "n_heads": 2}},
    context=16,
    batch=4,
    val_batches=2,
    target=5.0,
    start=8,
    seeds=2,
    curve_seeds=2,
    transfer_seeds=1,
)


def main() -> None:
    """Train what the stages need, and write the board."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--entries", nargs="+", default=names())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--quick", action="store_true")
    args = parse(parser)
    stem = args.results / result_name("speedrun", args.results)
    runs = Runs(TOY if args.quick else Task(), stem.with_suffix(".runs.jsonl"))
    for stage in args.stages:
        for name in args.entries:
            STAGES[stage](runs, load(name))
    runs.trains = False
    held = write(runs, [load(name) for name in names()], stem)
    if args.strict and not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
