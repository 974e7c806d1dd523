"""A paper's claim in miniature: its sweeps, its certificate, its targets.

    python benchmarks/claims/run.py complete_mue [--quick | --scale gpu] [--runs DIR] [--jobs N] [--strict]

trains what is missing of the sweeps in complete_mue.yaml, as `lightning-mue sweep` does, certifies them together, and writes
results/claims/complete_mue_<processor>.json, .csv (all trials) and .png. Interrupted, the same command continues. ``--quick``:
a few minutes, to see that all of it works; its results go to DIR. ``--scale gpu``: ten times the size. ``--no-training``:
scores the trials that are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import gates
from scores import claims_of, noise_of, rows_of
from sweeps import SCALES, ClaimFile, claims, plan_of, read_claim, run_sweep, with_sizes

from lightning_mue.analysis.certificate import Certificate, certify
from lightning_mue.analysis.certificate.pictures import draw
from lightning_mue.analysis.trials import Trial, read_trials, write_trials
from lightning_mue.console import wide_console
from lightning_mue.files import whole_file


def trials_of(claim: ClaimFile, folder: Path, jobs: int | None, *, train: bool) -> dict[str, list[Trial]]:
    """Sweep -> its trials, with the sizes of all sweeps; trains what is missing, or leaves out sweeps that have no trials."""
    tables = {title: folder / title / "trials.csv" for title in claim.sweeps}
    plans = {title: plan_of(sweep) for title, sweep in claim.sweeps.items() if train or tables[title].exists()}
    names = {*claim.base, *(axis.names[0] for plan in plans.values() for axis in plan.axes)}
    found: dict[str, list[Trial]] = {}
    for title, plan in plans.items():
        trials = run_sweep(plan, folder / title, jobs) if train else read_trials(tables[title])
        trials = with_sizes(trials, plan, names)
        found[title] = trials + base_runs(claim, trials, found.get(claim.sweeps[title].base_of, []))
    return found


def base_runs(claim: ClaimFile, trials: Sequence[Trial], others: Sequence[Trial]) -> list[Trial]:
    """The base's runs of another sweep, for each rule of these trials: at the base no rule changes anything."""
    of_base = [t for t in others if claim.base.items() <= t.size.items()]
    return [replace(t, rule=rule) for rule in dict.fromkeys(t.rule for t in trials) for t in of_base]


def figures_of(claim: ClaimFile, certificate: Certificate, trials: Mapping[str, Sequence[Trial]]) -> list[common.Claim]:
    """The claim's figures with their targets."""
    others = {title: of for title, of in trials.items() if not claim.sweeps[title].certified}
    figures = claims_of(claim.targets, certificate, others)
    if claim.name == "hyperp":
        what = f"output RMS of an MoE at initialization, largest over smallest for top-k of {gates.ACTIVE}"
        figures.append(common.Claim(f"{what}, square roots of the gates", "at most", 1.1, gates.spread("sqrt")))
        figures.append(common.Claim(f"{what}, the gates themselves", "at least", 2, gates.spread("linear")))
    return figures


def main() -> None:
    """Trains what is missing, certifies, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=claims())
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--quick", dest="scale", action="store_const", const="quick", help="the same as --scale quick")
    parser.add_argument("--runs", type=Path, help="where the trials are (logs/claims/NAME-SCALE)")
    parser.add_argument("--jobs", type=int, help="trials at a time (a core or a GPU each)")
    parser.add_argument("--no-training", action="store_true", help="score the trials that are there")
    args = common.parse(parser, threads=1)
    folder = args.runs or Path("logs/claims") / f"{args.claim}-{args.scale}"
    claim = read_claim(args.claim, args.scale)
    trials = trials_of(claim, folder, args.jobs, train=not args.no_training)
    certified = [t for title, of in trials.items() if claim.sweeps[title].certified for t in of]
    certificate = certify(certified, claim.base)
    wide_console().print(certificate)
    noise = noise_of(certified)
    print(f"noise: {', '.join(f'{name} {value:.2%}' for name, value in noise.items())}")

    results = folder if args.scale == "quick" else common.RESULTS / "claims"
    name = common.result_name(args.claim, results)
    rows = [{**row, **{f"noise of {key}": value for key, value in noise.items()}} for row in rows_of(certificate)]
    common.save(name, rows, lambda _: figures_of(claim, certificate, trials), strict=args.strict, folder=results)
    write_trials(results / f"{name}.csv", [t for of in trials.values() for t in of])
    with whole_file(results / f"{name}.png") as part:
        draw(certificate.results).savefig(part, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
