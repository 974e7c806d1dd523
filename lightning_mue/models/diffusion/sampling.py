"""Samplers: integrate a velocity field from noise at time 0 to images at time 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_mue.checks import require_choice, require_positive

Method = Literal["euler", "heun"]


def integrate(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int = 20, method: Method = "heun"
) -> Tensor:
    """Solves ``dx/dt = velocity(x, t)`` from time 0 to time 1 in equal steps.

    Args:
        velocity: From a state and a time in [0, 1] to the state's velocity, of the same shape.
        x: State at time 0, any shape.
        steps: Number of steps.
        method: "euler": order 1, one evaluation a step. "heun": order 2 (explicit trapezoid), two evaluations a step.

    Returns:
        The state at time 1.

    Raises:
        ValueError: For fewer than one step or an unknown method.

    Example:
        >>> import torch
        >>> round(float(integrate(lambda x, t: x, torch.tensor(1.0), 50)), 2)
        2.72
    """
    require_positive(steps=steps)
    require_choice("method", method, ("euler", "heun"))
    for step in range(steps):
        start, stop = step / steps, (step + 1) / steps
        slope = velocity(x, start)
        end = x + slope / steps
        x = end if method == "euler" else x + (slope + velocity(end, stop)) / (2 * steps)
    return x
