"""Callbacks that keep the load of MoE layers even over the micro-batches of an optimizer step.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.checks import mismatch
from lightning_mue.moe.balance import update_balance_bias
from lightning_mue.moe.base import MoEBase


class _PerStep(Callback):
    """Collects the routing of some of the model's MoE layers over the micro-batches of an optimizer step."""

    #: What the message of a missing callback says: what happens without it, and what to do.
    without: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self) -> None:
        self._layers: dict[str, MoEBase] = {}
        self._step_before = 0

    def wants(self, layer: MoEBase) -> bool:
        """Whether the callback is for a layer."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers; from here on their names do not change."""
        self._layers = {
            name: module
            for name, module in pl_module.named_modules()
            if isinstance(module, MoEBase) and self.wants(module)
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forgets earlier routings, so that a layer that this micro-batch skips is not counted twice."""
        self._step_before = trainer.global_step
        for layer in self._layers.values():
            layer.last_routing = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops the references to the model."""
        self._layers = {}


class GlobalBatchBalance(_PerStep):
    """Takes the load of layers with ``balance_scope="global"`` over all micro-batches of an optimizer step so far.

    Without this callback, or without gradient accumulation, the load is that of all ranks' current micro-batches.
    Counts of an unfinished accumulation are not saved.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     callbacks=[GlobalBatchBalance()], accumulate_grad_batches=4, logger=False, enable_checkpointing=False
        ... )
    """

    without = (
        "without it layers with balance_scope='global' take the load of one micro-batch, not of all micro-batches of an "
        "optimizer step"
    )
    remedy = "Add lightning_mue.moe.GlobalBatchBalance() to the Trainer's callbacks."

    def wants(self, layer: MoEBase) -> bool:
        """Whether a layer has a global switch loss."""
        return layer.balance == "switch" and layer.balance_scope == "global"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds this micro-batch's counts to the earlier ones, or clears them if the optimizer stepped."""
        for layer in self._layers.values():
            if trainer.global_step > self._step_before:
                layer.earlier_counts = None
            elif layer.last_routing is not None:
                counts_E, earlier_E = layer.last_routing.counts, layer.earlier_counts
                layer.earlier_counts = counts_E if earlier_E is None else earlier_E + counts_E

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the counts of an unfinished accumulation."""
        for layer in self._layers.values():
            layer.earlier_counts = None
        super().on_train_end(trainer, pl_module)


class LossFreeBalance(_PerStep):
    """Updates the balance bias of every `MoELayer` with ``balance="bias"`` after each optimizer step.

    Counts are summed over the micro-batches of a step and over ranks, with one collective a step for all layers together.
    A layer that does not run in a micro-batch adds nothing; of a layer that runs several times, the last run counts.
    Counts of an unfinished accumulation are saved, those of the saving rank only.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossFreeBalance()], logger=False, enable_checkpointing=False)
    """

    without = "without it the bias of layers with balance='bias' does not change, and nothing balances their load"
    remedy = "Add lightning_mue.moe.LossFreeBalance() to the Trainer's callbacks, or call update_balance_bias yourself."

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, Tensor] = {}

    def wants(self, layer: MoEBase) -> bool:
        """Whether a layer is balanced by its bias."""
        return layer.balance == "bias"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds this micro-batch's counts, and updates the biases if the optimizer stepped."""
        for name, layer in self._layers.items():
            bias_E = layer.router.balance_bias
            pending = self._pending.setdefault(name, torch.zeros_like(bias_E, dtype=torch.int64)).to(bias_E.device)
            self._pending[name] = pending if layer.last_routing is None else pending + layer.last_routing.counts
        if self._layers and trainer.global_step > self._step_before:
            self._update(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The counts not yet applied, by layer name, as plain tensors."""
        return {"pending": {name: counts.detach().cpu() for name, counts in self._pending.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of an unfinished accumulation."""
        self._pending = dict(state_dict["pending"])

    def _update(self, trainer: Trainer) -> None:
        counts = torch.cat([self._pending[name] for name in self._layers])
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        sizes = [layer.router.n_experts for layer in self._layers.values()]
        for layer, counts_E in zip(self._layers.values(), counts.split(sizes), strict=True):
            update_balance_bias(layer.router.balance_bias, counts_E, layer.router.top_k, layer.bias_update_rate)
        self._pending.clear()


def warn_of_missing_callbacks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warns if the balance of a layer needs a callback that the Trainer does not have."""
    for callback in balance_callbacks(m for m in pl_module.modules() if isinstance(m, MoEBase)):
        if isinstance(callback, GlobalBatchBalance) and trainer.accumulate_grad_batches == 1:
            continue  # then a micro-batch of all ranks is the whole batch
        if not any(isinstance(present, type(callback)) for present in trainer.callbacks):  # type: ignore[attr-defined]
            found, expected = f"no {type(callback).__name__}", f"one: {callback.without}"
            rank_zero_warn(mismatch("trainer.callbacks", found=found, expected=expected, do=callback.remedy))


def balance_callbacks(layers: Iterable[MoEBase]) -> list[_PerStep]:
    """The callbacks that the balance of these layers needs; for `configure_callbacks`."""
    layers, wanted = list(layers), (LossFreeBalance(), GlobalBatchBalance())
    return [callback for callback in wanted if any(callback.wants(layer) for layer in layers)]
