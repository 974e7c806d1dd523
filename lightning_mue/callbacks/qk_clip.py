"""QKClip: bounds attention logits by scaling the query and key weights of heads whose logits grew too large.

Shape legend: N query heads, B batch, S query positions, T key positions.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_mue.callbacks.monitors.seeing.torch_attention import QueryKeyRows, WeightRows
from lightning_mue.callbacks.qk_logits import Logits, measured
from lightning_mue.callbacks.qk_weights import find_attentions
from lightning_mue.checks import listed, require_number, value_error
from lightning_mue.optim.split import cut_of, pieces
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS, parts_of


class QKClip(Callback):
    """After an optimizer step, scales down the queries and keys of heads whose largest logit exceeded a threshold (MuonClip).

    With the largest logit m of a head in the batches of the step and g = min(1, threshold / m), the head's logits are
    multiplied by g: its rows of the key weight by sqrt(g), those of the query weight by sqrt(g). Where query heads share a
    key head, its rows are multiplied by the square root of the smallest g among them, s, and the rows of each query head by
    g / s: the logits of every head change by its own g, and those of a head below the threshold not at all.

    On the sphere the radius follows: it is multiplied by what the weight's norm (that of its part, if it is split) changed by,
    so that the next step does not undo the clip. The angle of a step stays what the learning rate says.

    Attentions are: causal modules with ``mue_attention_core`` beside weights called ``w_q`` and ``w_k`` (or ``q_proj``, ``k_proj``,
    and other usual names); ``nn.MultiheadAttention``; classes called attention that hold such weights, as those of transformers,
    and call ``scaled_dot_product_attention`` or softmax over logits ``[B, N, S, T]``. Latent attention (MLA of DeepSeek, with
    transformers' names) is scaled by its parts: rows of the not rotated queries and keys by sqrt(g), those of rotated queries by
    g, as the rotated key is one for all heads. Measuring costs a product of queries and keys more a step, in blocks, except where
    the logits exist. Attentions that normalize their queries or keys are left out, as their logits do not follow the weights;
    what else is left out is named in a warning when training begins, and after the first step what no forward was seen of.

    Under DDP the largest logits of all ranks count, also where only some ranks had any. All ranks must hold the same attentions,
    in replicas, and step them together: that they have the same names and sizes is checked when training begins, and where
    parameters are added to an optimizer later (finetuning callbacks), whose attentions are clipped from then on.

    Compiled code does not run hooks that are added after it was made. Code with an attention in it is compiled again in the
    first step, other code is not; when training ends, the code from before is valid again.

    Metrics, at the Trainer's logging steps: ``qk_clip/clipped``, the heads clipped since the last logged step, and
    ``qk_clip/max_logit``, the largest logit of the last step.

    Source: arXiv:2507.20534, algorithm 1.

    Args:
        threshold: Largest logit that is left alone.

    Raises:
        ValueError: If ``threshold`` is not positive, or (when training begins) ranks hold different attentions.
        TypeError: If it is not a number.
    """

    def __init__(self, threshold: float = 100.0) -> None:
        require_number("threshold", threshold, above=0)
        self.threshold = float(threshold)
        self.clipped = 0
        self._logged, self._largest = 0, 0.0
        self._shared = self._told = self._stepped = False
        self._sizes: list[int] = []
        self._attentions: list[Logits] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attentions and the optimizer that steps them."""
        self.clipped = self._logged = 0
        self._find(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find them again where a callback has added parameters to an optimizer."""
        if self._sizes != _sizes(trainer):
            self._find(trainer, pl_module)

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        self._sizes = _sizes(trainer)
        found, left_out = find_attentions(pl_module)
        for name, module, weights in found:
            holders = [o for o in trainer.optimizers if _holds(o, weights.rows)]
            if len(holders) == 1 and hasattr(holders[0], "register_step_post_hook"):
                attention = measured(name, module, weights)
                self._attentions.append(attention)
                self._handles += [attention, holders[0].register_step_post_hook(self._after(attention))]
            else:
                left_out.append(f"{name} (no single optimizer steps its queries and keys)")
        if left_out or not found:
            do = "Their logits are not bounded by this callback." if left_out else "It does nothing."
            rank_zero_warn(f"QKClip leaves out {listed(left_out, 'every module: it found no attention')}. {do}")
        self._shared, self._told = trainer.world_size > 1 and torch.distributed.is_initialized(), False
        if self._shared:
            _check_ranks(
                {a.name: [tuple(each.tensor.shape) for each in a.weights.rows.queries] for a in self._attentions}
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many heads were clipped; tell once of attentions whose logits no hook saw."""
        if not self._told and any(attention.stepped for attention in self._attentions):
            self._told = True
            if unseen := [a.name for a in self._attentions if a.stepped and not a.seen]:
                rank_zero_warn(
                    f"QKClip: found no forward of {listed(unseen)} before the optimizer's first step, expected one of every "
                    "attention. Its logits are not bounded until a hook sees them: call the module itself, not its `forward`, "
                    "and compile functions that call it after training began."
                )
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        # Not after batches that only accumulate: their zeros would take the place of the step's figures.
        stepped, self._stepped = self._stepped, False
        if stepped and every and trainer.global_step % every == 0:
            metrics = {"qk_clip/clipped": float(self.clipped - self._logged), "qk_clip/max_logit": self._largest}
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)
            self._logged = self.clipped

    def on_step_skipped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the logits of a step that StabilityGuard did not take, which may be NaN."""
        for attention in self._attentions:
            attention.largest_N = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._attentions = [], []

    def _after(self, attention: Logits) -> Any:
        first = not self._attentions[:-1]

        @torch.no_grad()
        def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._stepped, self._largest = True, 0.0 if first else self._largest
            self._clip(attention, optimizer)

        return clip

    def _clip(self, attention: Logits, optimizer: Optimizer) -> None:
        largest_N, attention.largest_N, attention.stepped = attention.largest_N, None, True
        rows = attention.weights.rows
        if self._shared:
            largest_N = _over_ranks(largest_N, rows.queries[0])
        if largest_N is None:  # no training forward since the last step
            return
        top = float(largest_N.max())
        self._largest = max(self._largest, top)
        if not top > self.threshold:  # also where it is NaN
            return
        factor_N = self.threshold / largest_N.double().clamp_min(
            self.threshold
        )  # in float32 the threshold itself is rounded
        for made, factors in zip(rows, attention.weights.row_factors(factor_N), strict=True):
            for each in made:
                _scale(each, factors, optimizer)
        self.clipped += int((factor_N < 1).sum())


def _scale(rows: WeightRows, factors: Tensor, optimizer: Optimizer) -> None:
    """Scale rows of a parameter, and its radius by what its norm changed by."""
    tensor, state = rows.tensor, optimizer.state.get(rows.tensor, {})
    parts = [part for group in optimizer.param_groups for part in parts_of(group)]
    group = next((part for part in parts if any(tensor is p for p in part["params"])), {})
    radius = state.get("radius") if group.get("kind") in SPHERE_KINDS else None
    before = _norms(tensor, group.get("split"), radius) if radius is not None else torch.ones(())
    part = tensor.data[rows.start : rows.stop]
    part.mul_(factors.to(part.dtype).view(-1, *[1] * (tensor.ndim - 1)))
    if radius is not None:
        radius.mul_((_norms(tensor, group.get("split"), radius) / before).to(radius.dtype))


def _norms(tensor: Tensor, split: Any, radius: Tensor) -> Tensor:
    if radius.ndim == 0:
        return torch.linalg.vector_norm(tensor.double())
    cut = cut_of(split, tensor.shape)
    assert cut is not None
    return torch.stack([torch.linalg.vector_norm(part.double()) for part in pieces(tensor, cut)])


def _sizes(trainer: Trainer) -> list[int]:
    """How many parameters each optimizer holds."""
    return [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in trainer.optimizers]


def _holds(optimizer: Optimizer, rows: QueryKeyRows) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(each.tensor) in held for each in (rows.queries[0], rows.keys[0]))


def _over_ranks(largest_N: Tensor | None, queries: WeightRows) -> Tensor | None:
    """The largest logits of all ranks; None if no rank has any.

    A rank without a forward does not know the number of heads, so all send one number for each row of the query weight.
    """
    sent = torch.full((1 + queries.stop - queries.start,), float("-inf"), device=queries.tensor.device)
    if largest_N is not None:
        sent[0] = len(largest_N)
        sent[1 : 1 + len(largest_N)] = largest_N
    torch.distributed.all_reduce(sent, op=torch.distributed.ReduceOp.MAX)
    return sent[1 : 1 + int(sent[0])] if sent[0] > 0 else None


def _check_ranks(own: dict[str, list[tuple[int, ...]]]) -> None:
    """Refuse, on all ranks, ranks with different attentions: the wrong logits would be compared, or ranks wait for ever."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            names = sorted(name for name in {*other, *ranks[0]} if other.get(name) != ranks[0].get(name))
            found = f"{listed(names)} of other sizes, or only on one of ranks 0 and {rank}"
            expected = "the same attentions, in replicas, on all ranks"
            do = "Leave the callback out where ranks hold different layers, or parts of heads."
            raise value_error("QKClip", found=found, expected=expected, do=do)
