"""Which passes through a layer count, and what is kept of them until the loss and the optimizer step.

Only training passes count: in training mode, with gradients, not repeated in a backward pass (activation checkpointing).

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import CheckpointFunction

from lightning_mue.checks import mismatch
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


class _Token:
    """Lives as long as the node of a graph on whose `metadata` it lies."""


@dataclass
class _Use:
    """Whether an auxiliary loss was read, and whether a backward pass reached it."""

    read: bool = False
    used: bool = False


@dataclass(eq=False)
class Pending:
    """The auxiliary loss of one pass.

    Attributes:
        logits: Of the pass, [T, E].
        loss: The loss itself, or what computes it, for when it is asked for.
        use: What became of the loss.
        output: Lives as long as the graph of the pass's output; None: not known, of compiled code.
        handed: Each lives as long as the graph of one sum that was read.
    """

    logits: Tensor
    loss: Tensor | Callable[[], Tensor]
    use: _Use
    output: weakref.ref[_Token] | None = None
    handed: tuple[weakref.ref[_Token], ...] = ()

    def remains(self) -> bool:
        """Whether a further pass may begin with this one still to be read: its loss is in no graph that lives.

        One that was read, only to log it, is still to be added, unless the pass itself was thrown away.
        """
        if not self.handed:
            return self.logits.requires_grad
        if self.use.used or self.output is None or self.output() is None:
            return False
        return not any(each() for each in self.handed)


class KeepsPasses(MoEBase):
    """The part of an MoE layer that keeps its passes. `MoELayer` describes the attributes."""

    def start_passes(self) -> None:
        """Forgets all passes."""
        self.token_masks: tuple[Tensor | None, ...] = ()
        self.has_followed = False
        self.earlier_counts: Tensor | None = None
        self.pending_counts = torch.zeros(self.n_experts, dtype=torch.int64) if "bias" in self.balances else None
        self._trained: RoutingInfo | None = None
        self._latest: RoutingInfo | None = None
        self._pending: tuple[Pending, ...] = ()
        self._value: Tensor | None = None
        self._total: weakref.ref[Tensor] | None = None
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
        """The auxiliary losses of the training passes whose losses wait for a backward pass, 0-dim float32 with their graph.

        Read again before the next training pass it is the same. What was read and is part of a loss is not part of the next
        sum; what was only looked at, to log it, is. 0 in evaluation mode.
        """
        if not self.training:
            return torch.zeros((), device=self.router.weight.device)
        if not self._pending:
            return torch.zeros((), device=self.router.weight.device) if self._value is None else self._value
        total = None if self._total is None else self._total()
        if total is None or not torch.is_grad_enabled():
            # Outside autocast all are float32.
            losses = [each.loss if isinstance(each.loss, Tensor) else each.loss() for each in self._pending]
            # A node of its own, though compiled code may hand out the loss itself.
            total = losses[0].view(()) if len(losses) == 1 else torch.stack(losses).sum()
            if torch.is_grad_enabled():
                self._hand_out(total)
        return total

    def _hand_out(self, total: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._pending, self._value = (), total
            return
        for each in self._pending:
            each.use.read = True
            if each.output is None and each.logits.requires_grad:
                each.logits.register_hook(partial(_reached, weakref.ref(self), each.use))
        if total.requires_grad:
            token = _mark(total)
            for each in self._pending:
                each.handed = (*each.handed, token)
            total.register_hook(partial(_use, weakref.ref(self), [each.use for each in self._pending]))
        if any(each.output is None for each in self._pending):  # compiled code: what lives is not known
            self._pending, self._value = (), total
        else:
            self._total, self._value = weakref.ref(total), total.detach()

    def keep_pass(self, routing: RoutingInfo, loss: Tensor | Callable[[], Tensor] | None, y: Tensor) -> None:
        """Keeps a training pass with output `y`; `loss` is its auxiliary loss, or computes it."""
        compiling = torch.compiler.is_compiling()
        for name in ("pending_counts", "earlier_counts"):
            counted = getattr(self, name)
            if counted is None:
                continue
            if compiling:
                _count_pass(counted, routing.counts)
            elif counted.is_meta:  # made there, and given weights one by one
                setattr(self, name, routing.counts.clone())
            else:
                counted += routing.counts
        self._trained = self._latest = routing.detach()
        if loss is None:
            return
        pending = Pending(routing.logits, loss, _Use())
        earlier = self._pending if compiling else tuple(each for each in self._pending if each.remains())
        self._pending, self._value, self._total = (*earlier, pending), None, None
        if not compiling and routing.logits.requires_grad:
            pending.output = _mark(y)
            routing.logits.register_hook(partial(_reached, weakref.ref(self), pending.use))

    def forget_losses(self) -> None:
        """Forgets the auxiliary losses of passes so far."""
        self._pending = ()

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
        counts_E, bias_E = self.pending_counts, state_dict.get(f"{prefix}router.balance_bias")
        if counts_E is not None and counts_E.is_meta and bias_E is not None and not bias_E.is_meta:  # it is assigned
            self.pending_counts = counts_E = torch.zeros_like(counts_E, device=bias_E.device)
        if counts_E is None or counts_E.is_meta:
            return
        if name in state_dict:
            counts_E.copy_(state_dict[name])
        elif bias_E is not None:  # all of the layer, saved after a step
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
        nothing = dict.fromkeys(("_trained", "_latest", "earlier_counts", "_total", "_value"))
        return {**super().__getstate__(), **nothing, "_pending": (), "token_masks": ()}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ALIVE.add(self)


_ALIVE: weakref.WeakSet[KeepsPasses] = weakref.WeakSet()


def _mark(tensor: Tensor) -> weakref.ref[_Token]:
    """What lives as long as the graph of a tensor."""
    token = _Token()
    assert tensor.grad_fn is not None
    tensor.grad_fn.metadata[_Token] = token  # type: ignore[index]
    return weakref.ref(token)


def _reached(layer: weakref.ref[KeepsPasses], use: _Use, grad: Tensor) -> None:
    """A backward pass that frees the graph has reached a pass: its loss can be in no further one."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return
    found = layer()
    if found is not None and found._pending:
        found._pending = tuple(each for each in found._pending if each.use is not use)
    if use.read and not use.used:
        _warn_of_unused_loss()


def _use(layer: weakref.ref[KeepsPasses], uses: list[_Use], grad: Tensor) -> None:
    """A backward pass has reached what was read.

    Compiled code does not know that it runs again in a backward pass: what it keeps meanwhile is dropped at the end.
    """
    for use in uses:
        use.used = True
    found = layer()
    if found is not None and torch._C._current_graph_task_id() != -1:
        restore = partial(_restore, found, found._pending, found._value, found._trained, found._latest)
        torch.autograd.Variable._execution_engine.queue_callback(restore)


def _restore(layer: KeepsPasses, pending: tuple[Pending, ...], value: Tensor | None, *routings: Any) -> None:
    layer._pending = tuple(each for each in layer._pending if any(each is other for other in pending))
    layer._value = value
    layer._trained, layer._latest = routings


@cache
def _warn_of_unused_loss() -> None:
    found = "one that was read, but was no part of the backward pass through what it belongs to"
    do = "Add it to the loss; read it under torch.no_grad() if only to log it."
    warnings.warn(mismatch("aux_loss", found=found, expected="it in the loss", do=do), stacklevel=2)


def _forget_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of a layer's weights, losses of passes before it belong to other weights."""
    waiting = [layer for layer in list(_ALIVE) if layer._pending]
    if waiting:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in waiting:
            if any(id(p) in stepped for p in layer.parameters()):
                layer.forget_losses()


register_optimizer_step_post_hook(_forget_stepped)
