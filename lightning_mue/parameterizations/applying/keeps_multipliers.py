"""Checkpoints that hold a module's forward multipliers beside its weights."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from lightning_mue.parameterizations.applying.initial_weights import keep_weights, set_multipliers
from lightning_mue.parameterizations.reading.sites import read_multipliers


class KeepsMultipliers:
    """For a LightningModule to inherit from: its checkpoints then hold the forward multipliers, which are not weights.

    Without them the weights define another function. Put it before other bases, whose hooks it calls, too.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the forward multipliers with the weights."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["mue_multipliers"] = read_multipliers(cast("nn.Module", self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the forward multipliers, and keeps a later fit from drawing the weights again."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        module = cast("nn.Module", self)
        keep_weights(module)
        set_multipliers(module, checkpoint.get("mue_multipliers", {}))
