"""Builds every model of a sweep without memory for its weights, so that a size or rule that does not fit is refused at once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from argparse import ArgumentError

import torch
from lightning.pytorch.cli import LightningCLI

from lightning_mue.analysis.sweep.plan import Job, Point, SweepPlan
from lightning_mue.callbacks import MuECallback
from lightning_mue.checks import value_error
from lightning_mue.cli.before_fit import stand_in_optimizers


def check_builds(plan: SweepPlan, cli: type[LightningCLI]) -> None:
    """Builds the module of each cell and makes the plan of its MuECallback.

    Raises:
        ValueError: With the cell and the reason, if one cannot be built.
    """
    searched = tuple((name, span.low) for name, span in plan.search.items() if name != "lr")
    rate = plan.rates[0] if plan.rates else plan.search["lr"].low
    for cell in plan.cells():
        config = plan.config_of(Job(cell, Point(rate, searched), 0))
        of_fit = {"ckpt_path", "weights_only"}
        try:
            _build({key: value for key, value in config.items() if key not in of_fit}, cli)
        except (ValueError, TypeError, ArgumentError, SystemExit) as error:
            reason: BaseException = error
            while (deeper := reason.__cause__ or reason.__context__) is not None:
                reason = deeper  # the configuration parser wraps the module's message in a long text of its own
            expected = "sizes, settings and rule that fit together"
            raise value_error("cell", found=str(cell), expected=expected, do=str(reason)) from error
        except RuntimeError:
            continue  # this constructor needs values, which tensors on meta have not; the trial will tell


def _build(config: dict[str, object], cli: type[LightningCLI]) -> None:
    with torch.device("meta"), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            made = cli(args=config, run=False)
            callbacks = made.trainer.callbacks  # type: ignore[attr-defined]
            callback = next((c for c in callbacks if isinstance(c, MuECallback)), None)
            if callback is not None:
                callback.make_plan(
                    made.model, stand_in_optimizers(made.model, None, made.trainer), made.trainer, made.datamodule
                )
        finally:
            logging.disable(before)
