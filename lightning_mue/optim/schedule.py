"""A learning-rate schedule that is configured from YAML without knowing the number of steps."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupDecay(LRScheduler):
    """Linear warm-up, then a plateau, then decay to a fraction of the peak.

    The factor is a closed form of the step, so a resumed run continues exactly; groups keep the ratios of their rates.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run; ``None``: `MoELanguageModel` fills in the trainer's number.
        warmup: Fraction of the run that warms up, in [0, 1).
        decay: Fraction of the run that decays at its end, in [0, 1]; ``1 - warmup`` or more leaves no plateau.
        final: Factor at the end, in [0, 1].
        shape: Form of the decay.
        last_epoch: Step to start from; torch's name for it.

    Raises:
        ValueError: For a fraction outside its range.
    """

    _SETTINGS = frozenset({"_total_steps", "warmup", "decay", "final", "shape"})

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.02,
        decay: float = 1.0,
        final: float = 0.0,
        shape: Literal["linear", "cosine"] = "linear",
        last_epoch: int = -1,
    ) -> None:
        for name, value in (("warmup", warmup), ("decay", decay), ("final", final)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: found {value}, expected a fraction between 0 and 1.")
        if warmup == 1.0:
            raise ValueError("warmup: found 1.0, which leaves nothing to train at the peak; expected less than 1.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(
                f"total_steps: found {total_steps}, expected at least 1, or null for the trainer's number."
            )
        if shape not in ("linear", "cosine"):
            raise ValueError(f"shape: found {shape!r}, expected 'linear' or 'cosine'.")
        self._total_steps = total_steps
        self.warmup, self.decay, self.final, self.shape = warmup, min(decay, 1.0 - warmup), final, shape
        super().__init__(optimizer, last_epoch)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        # A trainer without an end (max_steps=-1) has none to decay towards.
        if not 0 < steps < math.inf:
            raise ValueError(
                "scheduler: WarmupDecay needs the number of steps, but the trainer has no end. Set trainer.max_steps, or "
                "the scheduler's total_steps."
            )
        self._total_steps = int(steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def factor(self, step: int) -> float:
        """Factor on the peak rate for the update after ``step`` updates."""
        if self._total_steps is None:
            return 1.0
        progress = step / self._total_steps
        # The first update has a step of its own: one at rate 0 would be lost.
        if progress < self.warmup:
            return (step + 1) / (self.warmup * self._total_steps + 1)
        if self.decay == 0.0 or progress <= 1.0 - self.decay:
            return 1.0
        left = max(0.0, (1.0 - progress) / self.decay)
        if self.shape == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return self.final + (1.0 - self.final) * left

    def state_dict(self) -> dict[str, Any]:
        """The step, not the shape: a run resumed with more steps decays towards its new end."""
        return {key: value for key, value in super().state_dict().items() if key not in self._SETTINGS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the step over, and sets the groups to the rates of this shape at that step."""
        super().load_state_dict(state_dict)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the groups at the present step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]


__all__ = ["WarmupDecay"]
