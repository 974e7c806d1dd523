"""Keeping the load even over experts: auxiliary losses, and the loss-free bias update.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from lightning_mue.moe.layer import MoELayer


#: Over which tokens the switch loss takes the load: see `MoELayer`.
SCOPES = ("local", "global", "sequence")


def switch_loss(logits_TE: Tensor, counts_E: Tensor, top_k: int) -> Tensor:
    """``E * sum_i f_i P_i`` (Switch Transformer, arXiv:2101.03961, equation 4): 1 when the load is uniform.

    f_i is the fraction of the T * K assignments that went to expert i, a constant of the gradient; P_i is the mean
    over tokens of the softmax probability of i.

    Args:
        logits_TE: Router logits [T, E].
        counts_E: Assignments of each expert, int64 [E], T * K in sum.
        top_k: K.

    Returns:
        0-dim float32 with a graph to the logits; 0 for no tokens.
    """
    probability_sum_1E = logits_TE.float().softmax(-1).sum(0, keepdim=True)
    return load_balancing_loss(probability_sum_1E, counts_E[None], counts_E.sum(0, keepdim=True) / top_k)


def load_balancing_loss(probability_sum_NE: Tensor, counts_NE: Tensor, tokens_N: Tensor) -> Tensor:
    """The switch loss of each of N sets of tokens, then the mean over those that have any.

    Args:
        probability_sum_NE: float32 [N, E], sum over a set's tokens of the softmax of their logits.
        counts_NE: Assignments of each expert, int64 [N, E]; of these tokens, or of a larger set that f is to describe.
        tokens_N: How many tokens are summed in `probability_sum_NE`, [N].

    Returns:
        0-dim float32 with a graph to the probabilities; 0 if no set has tokens.
    """
    fraction_NE = counts_NE / counts_NE.sum(-1, keepdim=True).clamp(min=1)
    mean_probability_NE = probability_sum_NE / tokens_N.clamp(min=1)[:, None]
    n_experts = probability_sum_NE.shape[1]
    return n_experts * (fraction_NE * mean_probability_NE).sum() / (tokens_N > 0).sum().clamp(min=1)


def global_load(counts_E: Tensor, earlier_E: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """The load over all ranks, for the global form of the switch loss (theory.md, 5.4).

    With these as arguments of `load_balancing_loss`, the mean of the ranks' losses is the loss of all their tokens as one
    batch, in value and gradient.

    Args:
        counts_E: Assignments of this rank's micro-batch, int64 [E].
        earlier_E: Of this rank's earlier micro-batches of the optimizer step, or None.
        top_k: K.

    Returns:
        Counts over all ranks, [1, E], and the mean over ranks of the tokens of this micro-batch, [1].
    """
    stacked_2E = torch.stack([counts_E, counts_E if earlier_E is None else counts_E + earlier_E])
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed._functional_collectives import all_reduce

        group = torch.distributed.group.WORLD
        assert group is not None
        ranks = group.size()
        stacked_2E = all_reduce(stacked_2E, "sum", group)
    return stacked_2E[1:], stacked_2E[0].sum(0, keepdim=True) / (top_k * ranks)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits_TE: Router logits [T, E].

    Returns:
        0-dim float32 with a graph to the logits; 0 for no tokens.
    """
    return logits_TE.float().logsumexp(-1).square().sum() / max(len(logits_TE), 1)


@torch.no_grad()
def update_balance_bias(bias_E: Tensor, counts_E: Tensor, top_k: int, rate: float) -> None:
    """In place ``b_i -= rate * (load_i - K / E)``, load_i = fraction of tokens on expert i (arXiv:2601.20205).

    The updates sum to zero over experts. Without tokens it does nothing.

    Args:
        bias_E: float32 [E], changed in place.
        counts_E: Assignments of each expert over the global batch, int64 [E], tokens * K in sum.
        top_k: K.
        rate: Step size eta_b.
    """
    tokens = counts_E.sum() / top_k
    load_E = counts_E / tokens.clamp(min=1)
    bias_E.sub_(torch.where(tokens > 0, rate * (load_E - top_k / len(counts_E)), 0.0))


class _PerStep(Callback):
    """Follows the routing of some of the model's MoE layers from micro-batch to micro-batch of an optimizer step."""

    #: What happens without the callback, and what to do.
    without: ClassVar[str]

    def __init__(self) -> None:
        self._layers: dict[str, MoELayer] = {}
        self._step_before = 0

    def wants(self, layer: MoELayer) -> bool:
        """Whether a layer is one of them."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; their names no longer change."""
        from lightning_mue.moe.layer import MoELayer

        self._layers = {
            name: module
            for name, module in pl_module.named_modules()
            if isinstance(module, MoELayer) and self.wants(module)
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget earlier routings, so that a layer which this micro-batch skips is not counted twice."""
        self._step_before = trainer.global_step
        for layer in self._layers.values():
            layer.last_routing = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model."""
        self._layers = {}


class GlobalBatchBalance(_PerStep):
    """Let the switch loss of layers with ``balance_scope="global"`` see all micro-batches of an optimizer step so far.

    Without this callback, and without gradient accumulation, the load is that of the current micro-batch of all ranks.
    Counts of an unfinished accumulation are not saved.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     callbacks=[GlobalBatchBalance()], accumulate_grad_batches=4, logger=False, enable_checkpointing=False
        ... )
    """

    without = (
        "layers with balance_scope='global' take the load from one micro-batch, not from all that an optimizer step "
        "accumulates. Add lightning_mue.moe.GlobalBatchBalance() to its callbacks."
    )

    def wants(self, layer: MoELayer) -> bool:
        """Those whose switch loss is global."""
        return layer.balance == "switch" and layer.balance_scope == "global"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand this micro-batch's counts to the next one, or begin anew if the optimizer stepped."""
        for layer in self._layers.values():
            if trainer.global_step > self._step_before:
                layer.earlier_counts = None
            elif layer.last_routing is not None:
                counts_E, earlier_E = layer.last_routing.counts, layer.earlier_counts
                layer.earlier_counts = counts_E if earlier_E is None else earlier_E + counts_E

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the counts of an unfinished accumulation."""
        for layer in self._layers.values():
            layer.earlier_counts = None
        super().on_train_end(trainer, pl_module)


class LossFreeBalance(_PerStep):
    """Update the balance bias of every `MoELayer` with ``balance="bias"`` after each optimizer step.

    Counts add up over the micro-batches of a step and over ranks, with one collective a step for all layers together.
    A layer that a micro-batch does not reach adds nothing; if it runs several times in one micro-batch, its last run
    counts. Counts of an unfinished accumulation are saved, of the saving rank only.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossFreeBalance()], logger=False, enable_checkpointing=False)
    """

    without = (
        "the bias of layers with balance='bias' stays as it is, and nothing balances their load. Add "
        "lightning_mue.moe.LossFreeBalance() to its callbacks, or call update_balance_bias yourself."
    )

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, Tensor] = {}

    def wants(self, layer: MoELayer) -> bool:
        """Those that are balanced by their bias."""
        return layer.balance == "bias"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add this micro-batch's counts; if the optimizer stepped, update the biases."""
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
        """Take up the counts of an unfinished accumulation."""
        self._pending = dict(state_dict["pending"])

    def _update(self, trainer: Trainer) -> None:
        counts = torch.cat([self._pending[name] for name in self._layers])
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        sizes = [layer.router.n_experts for layer in self._layers.values()]
        for layer, counts_E in zip(self._layers.values(), counts.split(sizes), strict=True):
            update_balance_bias(layer.router.balance_bias, counts_E, layer.router.top_k, layer.bias_update_rate)
        self._pending.clear()


def warn_of_missing_callbacks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn where a layer's balance asks for a callback that the Trainer does not have: nothing else would tell."""
    from lightning_mue.moe.layer import MoELayer

    for callback in balance_callbacks(m for m in pl_module.modules() if isinstance(m, MoELayer)):
        if isinstance(callback, GlobalBatchBalance) and trainer.accumulate_grad_batches == 1:
            continue  # then a micro-batch of all ranks is the whole batch
        if not any(isinstance(present, type(callback)) for present in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(f"The Trainer has no {type(callback).__name__}: {callback.without}")


def balance_callbacks(layers: Iterable[MoELayer]) -> list[_PerStep]:
    """The callbacks that the balance of these layers asks for; for `configure_callbacks`."""
    layers, wanted = list(layers), (LossFreeBalance(), GlobalBatchBalance())
    return [callback for callback in wanted if any(callback.wants(layer) for layer in layers)]
