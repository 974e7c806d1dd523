"""What one token costs in training."""

from __future__ import annotations

from torch import nn

from lightning_mue.contract import flops_per_token
from lightning_mue.parameterizations.reading.record import describe
from lightning_mue.parameterizations.reading.run_sizes import active_parameters


def training_flops_per_token(module: nn.Module) -> float:
    """FLOPs of one token, forward and backward: those that the module declares, else 6 x its active parameters.

    Raises:
        ValueError: If it declares none and its parameters cannot be read.
    """
    declared = flops_per_token(module)
    return 6.0 * active_parameters(describe(module).parameters) if declared is None else declared
