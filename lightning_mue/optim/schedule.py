"""A learning-rate schedule that can be configured from YAML before the number of steps is known."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_mue.checks import require_choice, value_error


class WarmupDecay(LRScheduler):
    """Linear warm-up, then a plateau, then decay to a fraction of the peak.

    The factor is a closed form of the step, so a resumed run continues exactly. The ratios between the groups' rates stay.
    Groups that are added to the optimizer later, as finetuning callbacks do, keep the rates that their callback sets.

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
                raise value_error(name, found=value, expected="a fraction between 0 and 1")
        if warmup == 1.0:
            raise value_error("warmup", found=1.0, expected="less than 1, to leave steps at the peak rate")
        if total_steps is not None and total_steps < 1:
            expected = "at least 1, or null for the trainer's number of steps"
            raise value_error("total_steps", found=total_steps, expected=expected)
        require_choice("shape", shape, ("linear", "cosine"))
        self._total_steps = total_steps
        self.warmup, self.decay, self.final, self.shape = warmup, min(decay, 1.0 - warmup), final, shape
        super().__init__(optimizer, last_epoch)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; setting it sets the groups' rates."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        # A trainer without an end (max_steps=-1) gives inf or -1.
        if not 0 < steps < math.inf:
            do = "The trainer has no end: set trainer.max_steps, or total_steps of WarmupDecay."
            raise value_error("total_steps", found=steps, expected="a finite number of at least 1", do=do)
        self._total_steps = int(steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def factor(self, step: int) -> float:
        """Return the factor on the peak rate for the update that follows ``step`` updates."""
        if self._total_steps is None:
            return 1.0
        progress = step / self._total_steps
        # The warm-up starts above 0: an update at rate 0 would be lost.
        if progress < self.warmup:
            return (step + 1) / (self.warmup * self._total_steps + 1)
        if self.decay == 0.0 or progress <= 1.0 - self.decay:
            return 1.0
        left = max(0.0, (1.0 - progress) / self.decay)
        if self.shape == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return self.final + (1.0 - self.final) * left

    def state_dict(self) -> dict[str, Any]:
        """Return the step but not the settings, so that a run resumed with more steps decays towards its new end."""
        return {key: value for key, value in super().state_dict().items() if key not in self._SETTINGS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the step and set the groups' rates to this schedule's at that step."""
        super().load_state_dict(state_dict)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return the groups' learning rates at the current step."""
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs] + [group["lr"] for group in added]
