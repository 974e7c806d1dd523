"""``lightning-mue forecast``: predicts loss and best rate of a larger run from a few small ones, before it starts."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table

from lightning_mue.analysis.cells import SizeTable, cells_of
from lightning_mue.analysis.fits import Estimate
from lightning_mue.analysis.forecast import Prediction, compute_efficiency, predict
from lightning_mue.analysis.forecast.prediction import MOST_SIZES, MOST_TRIALS
from lightning_mue.analysis.forecast.record import config_hash, to_record, write_record
from lightning_mue.analysis.sweep.config import find_rate
from lightning_mue.callbacks.mue.run import run_sizes, steps
from lightning_mue.checks import listed, require_choice, require_number, value_error
from lightning_mue.cli.certify import read_size, read_sweeps, table_of
from lightning_mue.cli.parsing.parser import WordsParser
from lightning_mue.console import human
from lightning_mue.parameterizations.reading.flops import training_flops_per_token


def forecast_command(args: Sequence[str], cli: type[LightningCLI]) -> None:
    """Writes the forecast to a new file and prints it; with ``--over``, prints a compute efficiency instead.

    Args:
        args: The rest of the command line.
        cli: Class that builds a run from a config.

    Raises:
        ValueError: For anything that cannot be predicted.
    """
    options, overrides = _parser().parse_known_args(args)
    if overrides and not options.config:
        raise value_error("forecast", found=" ".join(overrides), expected="options of forecast", do="See --help.")
    cells = _chosen(cells_of(read_sweeps(options.sweeps)), options.size)
    if options.over or options.at is not None:
        _print_efficiency(cells, options)
        return
    rules = sorted({cell.rule for cell in cells})
    if options.rule is not None:
        require_choice("--rule", options.rule, rules)
    output = Path(options.output)
    if output.exists():
        write_record(output, {})  # refuses before the work
    target, config = _target(options, overrides, cli)
    prediction = predict(
        [cell for cell in cells if options.rule in (None, cell.rule)],
        compute=target["compute"],
        tokens=target["tokens"],
        level=options.level,
        most_sizes=options.most_sizes,
        most_trials=options.most_trials,
    )
    tables = [table_of(path) for path in options.sweeps]
    write_record(output, to_record(prediction, target=target, config=config, tables=tables, metric=options.metric))
    console = Console(soft_wrap=True, highlight=False)
    console.print(_shown(prediction, target))
    console.print(f"written: {output}; after the run: lightning-mue report RUN_DIR --forecast {output}", markup=False)


def _target(
    options: argparse.Namespace, overrides: Sequence[str], cli: type[LightningCLI]
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Compute, tokens and steps of the run, and hash, files and rate key of its config (None without one)."""
    given = {"compute": options.compute, "tokens": options.tokens}
    for name, value in given.items():
        if value is not None:
            require_number(f"--{name}", value, above=0)
    if not options.config:
        if options.compute is None:
            do = "Give --config FILE, or --compute FLOPS and --tokens N."
            raise value_error("forecast", found="no run", expected="the run to predict", do=do)
        return {**{key: math.nan if value is None else value for key, value in given.items()}, "steps": math.nan}, None
    made = _built(cli, [*(part for path in options.config for part in ("--config", path)), *overrides])
    config = yaml.safe_load(made.parser.dump(made.config, skip_none=False, skip_check=True))
    sizes, lr_key = _sizes(made, given), find_rate(config, options.lr_key)
    return sizes, {
        "sha256": config_hash(config, lr_key),
        "lr_key": lr_key,
        "files": [str(Path(path).resolve()) for path in options.config],
        "overrides": list(overrides),
    }


def _built(cli: type[LightningCLI], args: Sequence[str]) -> Any:
    """The run of a config, without memory for the weights."""
    errors = io.StringIO()
    try:
        with torch.device("meta"), contextlib.redirect_stderr(errors):
            return cli(args=list(args), run=False)
    except SystemExit as stop:
        told = " ".join(errors.getvalue().split())[-500:]
        raise value_error("--config", found=told, expected="a config that `lightning-mue fit` takes") from stop


def _sizes(made: Any, given: Mapping[str, float | None]) -> dict[str, float]:
    tokens, compute = given["tokens"], given["compute"]
    known = {"batch_tokens": math.nan, "tokens": math.nan}
    if tokens is None:
        tokens = run_sizes(known, {}, made.trainer, made.model, made.datamodule, optimizers=1)["tokens"]
    if compute is None:
        compute = training_flops_per_token(made.model) * tokens
    try:
        length = float(steps(made.trainer, 1))
    except LookupError:
        length = math.nan
    return {"compute": compute, "tokens": tokens, "steps": length}


def _chosen(cells: Sequence[SizeTable], sizes: Sequence[str]) -> list[SizeTable]:
    """The cells that agree with at least one of the given sizes; all, if none is given."""
    wanted = [size for text in sizes if (size := read_size(text))]
    chosen = [c for c in cells if not wanted or any(size.items() <= dict(c.size).items() for size in wanted)]
    if not chosen:
        known = listed([cell.label for cell in cells])
        raise value_error("--size", found=" ".join(sizes), expected=f"a size of the trials ({known})")
    return chosen


def _print_efficiency(cells: Sequence[SizeTable], options: argparse.Namespace) -> None:
    rules = sorted({cell.rule for cell in cells})
    if options.rule is None or options.over is None or options.at is None:
        do = "For example --rule hyperp --over sp --at 2.1."
        raise value_error("--over", found="not all of --rule, --over and --at", expected="all three", do=do)
    require_choice("--rule", options.rule, rules)
    require_choice("--over", options.over, rules)
    of = {rule: [cell for cell in cells if cell.rule == rule] for rule in (options.rule, options.over)}
    found = compute_efficiency(of[options.rule], of[options.over], options.at, level=options.level)
    level = f"{100 * options.level:g} % interval {found.low:.3g} to {found.high:.3g}"
    print(
        f"{options.over} needs {found.value:.3g} times the compute of {options.rule} for loss {options.at:g} ({level})"
    )


def _shown(prediction: Prediction, target: Mapping[str, float]) -> Table:
    p, law = prediction, prediction.loss_law
    largest = law.measured[1]
    table = Table(
        title=f"Forecast for {human(target['compute'])} FLOPs, {target['compute'] / largest:.3g} x the largest fitted"
    )
    for heading in ("", "predicted", f"{100 * law.level:g} % interval", "law"):
        table.add_column(heading)
    rate = f"{p.rate_over}^{-p.rate_law.exponent.value:.3g}" if p.rate_moves else f"flat over {p.rate_over}"
    of_loss = f"{law.a.value:.3g} C^-{law.b.value:.3g} + {law.l0.value:.4g}"
    for name, estimate, of_law in (("loss", p.loss, of_loss), ("best rate", p.rate, rate)):
        table.add_row(name, f"{estimate.value:.4g}", _ends(estimate), of_law)
    table.caption = f"{p.trials} trials of {len(p.sizes)} sizes: {'; '.join(o.cell.label for o in p.sizes)}"
    return table


def _ends(estimate: Estimate) -> str:
    return f"{estimate.low:.4g} to {estimate.high:.4g}"


def _parser() -> argparse.ArgumentParser:
    parser = WordsParser(
        "forecast",
        description=__doc__,
        epilog="Other options go to the run, as in `lightning-mue fit`, e.g. --trainer.max_steps 2000.",
    )
    add = parser.add_argument
    add("sweeps", nargs="+", metavar="SWEEP", help="a sweep's folder, or its trials.csv, of smaller sizes")
    add(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of the run, as of `lightning-mue fit`; repeatable",
    )
    add("--compute", type=float, metavar="FLOPS", help="of the run (default: FLOPs of a token x tokens)")
    add("--tokens", type=float, metavar="N", help="of the run (default: by its trainer and data)")
    add("--rule", help="rule of the trials, if they have several")
    add("--size", action="append", default=[], metavar="NAME=VALUE,...", help="sizes to fit (default: all); repeatable")
    add("--output", default="forecast.json", help="a new file (default: %(default)s)")
    add("--metric", default="val/loss", help="logged loss that the trials hold (default: %(default)s)")
    add("--lr-key", metavar="KEY", help="the config's key of the rate, if it is not found")
    add("--level", type=float, default=0.9, help="of the intervals (default: %(default)s)")
    add("--most-sizes", type=int, default=MOST_SIZES, metavar="N", help="sizes fitted at most (default: %(default)s)")
    add("--most-trials", type=int, default=MOST_TRIALS, metavar="N", help="trials at most (default: %(default)s)")
    add("--over", metavar="RULE", help="compute efficiency of --rule over this rule, at the loss --at; no forecast")
    add("--at", type=float, metavar="LOSS", help="loss for --over")
    return parser
