"""Callbacks that keep the load of MoE layers even over the micro-batches of an optimizer step.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_mue.checks import mismatch
from lightning_mue.contract import REWOUND
from lightning_mue.moe.balance import update_balance_bias
from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.masks import follow_attention_mask
from lightning_mue.names import clean_name

_KEY = "lightning_mue_pending_counts"  # in a checkpoint of the Trainer


class _PerStep(Callback):
    """Serves some of the model's MoE layers once an optimizer step."""

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
        follow_attention_mask(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the step, to see whether the optimizer steps."""
        self._step_before = trainer.global_step

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
        return "switch" in layer.balances and layer.balance_scope == "global"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the layers count from here on."""
        super().on_train_start(trainer, pl_module)
        for layer in self._layers.values():
            layer.earlier_counts = torch.zeros_like(layer.router.balance_bias, dtype=torch.int64)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clears the counts if the optimizer stepped."""
        for layer in self._layers.values():
            if trainer.global_step > self._step_before and layer.earlier_counts is not None:
                layer.earlier_counts.zero_()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the counts of an unfinished accumulation."""
        for layer in self._layers.values():
            layer.earlier_counts = None
        super().on_train_end(trainer, pl_module)


class LossFreeBalance(_PerStep):
    """Updates the balance bias of every `MoELayer` with "bias" in its `balance`, in the same call as the optimizer's step.

    The layers count the assignments of all their training passes since the last step (`MoELayer.pending_counts`); they are
    summed over ranks, with one collective a step for all layers together. A layer whose weights another optimizer holds waits
    for that one. Counts of an unfinished accumulation are in the layers' state dict; a checkpoint of the Trainer has the sum over
    ranks, which rank 0 goes on with, so that a resumed run is exact on any number of ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossFreeBalance()], logger=False, enable_checkpointing=False)
    """

    without = "without it the bias of layers with balance='bias' does not change, and nothing balances their load"
    remedy = "Add lightning_mue.moe.LossFreeBalance() to the Trainer's callbacks, or call update_balance_bias yourself."

    def __init__(self) -> None:
        super().__init__()
        self._restored: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._unhooked: list[MoEBase] = []
        self._warned = False

    def wants(self, layer: MoEBase) -> bool:
        """Whether a layer is balanced by its bias."""
        return "bias" in layer.balances

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the optimizers, so that whoever saves the model after a step saves the bias after it too."""
        super().on_train_start(trainer, pl_module)
        for name, counts_E in self._restored.items():
            layer = self._layers.get(name)
            if layer is not None and layer.pending_counts is not None:
                layer.pending_counts += counts_E.to(layer.pending_counts.device)
        self._restored = {}
        hooked = [o for o in trainer.optimizers if hasattr(o, "_optimizer_step_post_hooks")]
        # torch marks a class whose step runs hooks; one that does not call Optimizer.__init__ has none.
        hooked = [o for o in hooked if getattr(type(o).step, "hooked", False)]
        self._unhooked = list(self._layers.values())
        for optimizer in hooked:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            layers = [each for each in self._layers.values() if any(id(p) in held for p in each.parameters())]
            self._unhooked = [each for each in self._unhooked if not any(each is other for other in layers)]
            if layers:
                hook = partial(self._on_step, trainer, layers)
                self._hooks.append(optimizer.register_step_post_hook(hook))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the biases of layers that no hooked optimizer holds, if one stepped."""
        if self._unhooked and trainer.global_step > self._step_before:
            self._update(trainer, self._unhooked)

    def on_step_skipped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the counts of a step that StabilityGuard did not take: NaN routes anywhere."""
        for layer in self._layers.values():
            if layer.pending_counts is not None:
                layer.pending_counts.zero_()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the hooks."""
        self._remove()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the hooks."""
        self._remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of an unfinished accumulation from a checkpoint of an earlier version, which held them here."""
        self._restored = dict(state_dict.get("pending", {}))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the counts of all ranks, which also distributed checkpoints then hold."""
        layers = {clean_name(n): m for n, m in pl_module.named_modules() if isinstance(m, MoEBase) and self.wants(m)}
        counts = self._counts_of_all_ranks(trainer, layers.values()) if layers else ()
        checkpoint[_KEY] = dict(zip(layers, counts, strict=True))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gives the counts of all ranks to rank 0, after the model's own state is loaded."""
        for name, layer in pl_module.named_modules() if _KEY in checkpoint else ():
            if isinstance(layer, MoEBase) and layer.pending_counts is not None:
                layer.pending_counts.zero_()
                # The batches that they count are repeated where the checkpoint takes them back.
                counts_E = None if REWOUND in checkpoint else checkpoint[_KEY].get(clean_name(name))
                if trainer.global_rank == 0 and counts_E is not None:
                    layer.pending_counts += counts_E.to(layer.pending_counts.device)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._unhooked = [], []

    def _on_step(self, trainer: Trainer, layers: list[MoEBase], *_: Any) -> None:
        self._update(trainer, layers)

    def _update(self, trainer: Trainer, layers: list[MoEBase]) -> None:
        counts = self._counts_of_all_ranks(trainer, layers)
        for layer, counts_E in zip(layers, counts, strict=True):
            bias_E, top_k = layer.router.balance_bias, layer.router.top_k
            update_balance_bias(bias_E, counts_E, top_k, layer.bias_update_rate, layer.bias_update)
            if layer.pending_counts is not None:
                layer.pending_counts.zero_()
        if not self._warned and not all(layer.training for layer in layers):
            self._warned = True
            expected = "training mode: passes in evaluation mode are not counted, and the bias stays as it is"
            do = "Call model.train() before fitting (transformers' from_pretrained returns a model in evaluation mode)."
            rank_zero_warn(mismatch("training", found="a MoELayer in evaluation mode", expected=expected, do=do))

    @staticmethod
    def _counts_of_all_ranks(trainer: Trainer, layers: Iterable[MoEBase]) -> tuple[Tensor, ...]:
        pending = [layer.pending_counts for layer in layers if layer.pending_counts is not None]
        return trainer.strategy.reduce(torch.cat(pending), reduce_op="sum").split([len(each) for each in pending])


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
