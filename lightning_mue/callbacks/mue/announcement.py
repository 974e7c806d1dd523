"""Shows the plan of a fit: on the terminal, in TensorBoard, as ``plan.yaml`` in the loggers' folders, and by its rates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.callbacks.showing import folder_of, show_text
from lightning_mue.console import wide_console
from lightning_mue.parameterizations import ScaledStep, ScalingPlan
from lightning_mue.parameterizations.planning.scaling_plan import as_markdown, headline

_log = logging.getLogger(__name__)


def announce(trainer: Trainer, plan: ScalingPlan, *, drawn: bool, verbose: bool) -> None:
    """Shows a plan on rank zero: its table if `verbose`, else one line and the notes."""
    if not trainer.is_global_zero:
        return
    if not plan.same_size:
        _log.info("MuECallback: initial weights %s", "drawn by the plan" if drawn else "kept as they are")
    if not verbose:
        _log.info("MuECallback: %s", headline(plan))
        for note in plan.notes:  # the table has them
            _log.warning("MuECallback: %s", note)
    else:
        wide_console().print(plan)
    for logger in trainer.loggers:
        try:
            show_text(logger, "parameterization", as_markdown(plan), 0)
            if (folder := folder_of(logger)) is not None:
                plan.save(folder / "plan.yaml")
        except Exception as error:  # a full disk, or whatever a logger raises: no reason to end a run
            rank_zero_warn(f"MuECallback: {type(logger).__name__} did not take the plan ({error}). The run goes on.")


def rates_by_role(steps: Sequence[ScaledStep]) -> dict[str, float]:
    """Tag -> learning rate of the last step; see :meth:`MuECallback.effective_rates`."""
    rates: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for step in steps:
        name = type(step.optimizer).__name__
        label = f"{name}-{counts[name]}" if counts[name] else name
        counts[name] += 1
        elsewhere = {tag for other in steps if other is not step for tag in other.effective_lr}
        for tag, lr in step.effective_lr.items():
            rates[f"mue/lr/{tag}/{label}" if tag in elsewhere else f"mue/lr/{tag}"] = float(lr)
    return rates
