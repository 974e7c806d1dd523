"""Which passes through a layer count, and what is kept of them until the loss and the optimizer step.

Only training passes count: in training mode, with gradients, not repeated in a backward pass (activation checkpointing).

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import CheckpointFunction

from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.router import RoutingInfo


def records_gradients() -> bool:
    """Whether what runs now is the first run of something with gradients: not without them, and not again in a backward pass.

    What reentrant activation checkpointing runs first, without gradients, counts: its second run is in the backward pass.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if torch._C._current_graph_task_id() != -1:
        return False
    return torch.is_grad_enabled() or _in_reentrant_checkpoint()


def is_training_pass(module: nn.Module) -> bool:
    """Whether a pass through the module counts now."""
    return module.training and records_gradients()


def _in_reentrant_checkpoint() -> bool:
    """Whether a caller is a reentrant checkpoint whose result will have gradients."""
    frame = sys._getframe()
    while (outer := frame.f_back) is not None:
        frame = outer
        if frame.f_code is CheckpointFunction.forward.__code__:
            return any(frame.f_locals["ctx"].needs_input_grad)
    return False


@torch.library.custom_op("lightning_mue::count_pass", mutates_args={"total_E"})
def _count_pass(total_E: Tensor, counts_E: Tensor) -> None:
    # An operator, so that compiled code too finds out when it runs again in a backward pass.
    if torch._C._current_graph_task_id() == -1:
        total_E += counts_E


class Pending(NamedTuple):
    """The auxiliary loss of one pass: itself, or what computes it from the logits, for when it is asked for."""

    logits: Tensor
    loss: Tensor | Callable[[], Tensor]


class KeepsPasses(MoEBase):
    """The part of an MoE layer that keeps its passes. `MoELayer` describes the attributes."""

    def start_passes(self) -> None:
        """Forgets all passes."""
        self.token_masks: tuple[Tensor | None, ...] = ()
        self.earlier_counts: Tensor | None = None
        self.pending_counts = torch.zeros(self.n_experts, dtype=torch.int64) if "bias" in self.balances else None
        self._trained: RoutingInfo | None = None
        self._latest: RoutingInfo | None = None
        self._unread: tuple[Pending, ...] = ()
        self._total: Tensor | None = None
        _ALIVE.add(self)

    @property
    def last_routing(self) -> RoutingInfo | None:
        """`RoutingInfo` of the last training pass (in evaluation: of the last pass), detached; None before the first."""
        return self._trained if self.training and self._trained is not None else self._latest

    @last_routing.setter
    def last_routing(self, routing: RoutingInfo | None) -> None:
        self._trained = self._latest = routing

    @property
    def aux_loss(self) -> Tensor:
        """The auxiliary losses of the training passes since it was last read, 0-dim float32 with their graph.

        Read again before the next training pass it is the same. 0 in evaluation mode. Read without gradients, which no loss
        is, it does not count as read.
        """
        if not self.training or (self._total is None and not self._unread):
            return torch.zeros((), device=self.router.weight.device)
        if not self._unread:
            assert self._total is not None
            return self._total
        # Outside autocast all are float32.
        losses = [each.loss if isinstance(each.loss, Tensor) else each.loss() for each in self._unread]
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if torch.is_grad_enabled():
            self._unread, self._total = (), total
            if total.requires_grad and not torch.compiler.is_compiling():
                total.register_hook(partial(_forget_repeated, weakref.ref(self)))
        return total

    def keep_pass(self, routing: RoutingInfo, loss: Tensor | Callable[[], Tensor] | None) -> None:
        """Keeps a training pass; `loss` is its auxiliary loss, or computes it."""
        compiling = torch.compiler.is_compiling()
        for counted in (self.pending_counts, self.earlier_counts):
            if counted is not None:
                if compiling:
                    _count_pass(counted, routing.counts)
                else:
                    counted += routing.counts
        self._trained = self._latest = routing.detach()
        if loss is None:
            return
        pending = Pending(routing.logits, loss)
        self._unread, self._total = (*self._unread, pending), None
        if routing.logits.requires_grad and not compiling:
            routing.logits.register_hook(partial(_forget_used, weakref.ref(self), weakref.ref(routing.logits)))

    def forget_losses(self) -> None:
        """Forgets auxiliary losses that nobody has read."""
        self._unread = ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        counts_E = self.pending_counts
        # Only between optimizer steps, so that the names of a state dict are as ever else.
        if counts_E is not None and not counts_E.is_meta and bool(counts_E.any()):
            destination[f"{prefix}pending_counts"] = counts_E

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}pending_counts"
        rest = {key: value for key, value in state_dict.items() if key != name} if name in state_dict else state_dict
        super()._load_from_state_dict(rest, prefix, *args)
        counts_E = self.pending_counts
        if counts_E is None or counts_E.is_meta:
            return
        if name in state_dict:
            counts_E.copy_(state_dict[name])
        elif f"{prefix}router.balance_bias" in state_dict:  # all of the layer, saved after a step
            counts_E.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = self.router.balance_bias.device
        for name in ("pending_counts", "earlier_counts"):
            counts_E = getattr(self, name)
            if counts_E is not None and counts_E.device != device:
                setattr(
                    self, name, torch.zeros_like(counts_E, device=device) if counts_E.is_meta else counts_E.to(device)
                )
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled, and a copy has not run anything yet.
        nothing = dict.fromkeys(("_trained", "_latest", "earlier_counts", "_total"))
        return {**super().__getstate__(), **nothing, "_unread": (), "token_masks": ()}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ALIVE.add(self)


_ALIVE: weakref.WeakSet[KeepsPasses] = weakref.WeakSet()


def _forget_used(layer: weakref.ref[KeepsPasses], logits: weakref.ref[Tensor], grad: Tensor) -> None:
    """A backward pass that frees the graph has reached a pass: its loss can be in no further one."""
    found = layer()
    if found is not None and found._unread and not torch._C._autograd._get_current_graph_task_keep_graph():
        found._unread = tuple(each for each in found._unread if each.logits is not logits())


def _forget_repeated(layer: weakref.ref[KeepsPasses], grad: Tensor) -> None:
    """Compiled code does not know that it runs again in a backward pass: what it keeps meanwhile is dropped at the end."""
    found = layer()
    if found is not None and torch._C._current_graph_task_id() != -1:
        before, restore = found._unread, partial(setattr, found, "_unread")
        torch.autograd.Variable._execution_engine.queue_callback(partial(restore, before))


def _forget_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of a layer's weights, losses of passes before it belong to other weights."""
    waiting = [layer for layer in list(_ALIVE) if layer._unread]
    if waiting:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in waiting:
            if any(id(p) in stepped for p in layer.parameters()):
                layer.forget_losses()


register_optimizer_step_post_hook(_forget_stepped)
