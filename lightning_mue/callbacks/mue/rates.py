"""The learning rates that the roles really had in the last step, as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mue.parameterizations import ScaledStep


def effective_rates(steps: Sequence[ScaledStep]) -> dict[str, float]:
    """``mue/lr/<role>`` -> learning rate of the last step; see `MuECallback.effective_rates`."""
    rates: dict[str, float] = {}
    counts: dict[str, int] = {}
    for step in steps:
        name = type(step.optimizer).__name__
        counts[name] = counts.get(name, 0) + 1
        label = name if counts[name] == 1 else f"{name}-{counts[name] - 1}"
        elsewhere = {tag for other in steps if other is not step for tag in other.effective_lr}
        for tag, lr in step.effective_lr.items():
            rates[f"mue/lr/{tag}/{label}" if tag in elsewhere else f"mue/lr/{tag}"] = float(lr)
    return rates
