"""The gradient noise scale of each role, from gradients of two batch sizes in one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.probes import UnhookedProbe
from lightning_mue.callbacks.monitors.updates.weights import RoleProbe, elements, sample
from lightning_mue.diagnostics import gradient_noise
from lightning_mue.sharded import is_sharded

#: Of the running sums, what is left of a sample at the next one: about the last 20 samples count.
_DECAY = 0.95
#: The tag of all roles together.
ALL = "all"
_NONE = "UpdateMonitor logs no gradient noise scale: "


class NoiseProbe(UnhookedProbe):
    """Compares the gradient of one micro-batch on one rank with the whole batch's.

    A plain weight's micro-batch gradient is seen by a hook on it, which runs before DDP averages over ranks. FSDP2 averages
    before anything can be seen, so a sharded weight's is what the last micro-batch of all ranks added to its gradient.

    Statistics: [ranks, samples in the small batch, in the large batch]; for each role [elements, squares of the small batch's
    gradient, of the large batch's].

    Attributes:
        sums: Role (or `ALL`) -> running [tr(Sigma), |G|^2].
        batches: Samples in the (small, large) batch of the sampled step; None: nothing is measured.
    """

    def __init__(self, probes: Sequence[RoleProbe]) -> None:
        super().__init__("noise")
        self._roles = {role: i for i, role in enumerate(dict.fromkeys(probe.role for probe in probes))}
        self.size = 3 + 3 * len(self._roles)
        self._probes, self._factor = probes, 1.0
        self._small: dict[str, Tensor] = {}
        self._former: dict[Tensor, Tensor] = {}
        self.sums: dict[str, list[float]] = {}
        self.batches: tuple[float, float] | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the batch sizes, if this step has two of them."""
        self.batches, steps = None, trainer.accumulate_grad_batches
        samples = _samples(batch)
        if (
            _obstacle(trainer, pl_module) or samples is None or (batch_idx + 1) % steps
        ):  # at its end an epoch may step early
            return
        sharded = any(is_sharded(weight) for probe in self._probes for weight in probe.weights)
        small = samples * trainer.world_size if sharded else samples
        large = samples * trainer.world_size * steps
        if large > small:
            self.batches, self._factor = (float(small), float(large)), steps / _loss_scale(trainer)

    def attach(self, device: torch.device) -> RemovableHandle:
        """Hooks the weights; the handle is not theirs, see `finish`."""
        handle = super().attach(device)
        self._small, self._former, self._handles = {}, {}, list[RemovableHandle]()
        if self.batches is None:
            return handle
        for probe in self._probes:
            self._small.setdefault(probe.role, torch.zeros((), device=device))
            for weight in probe.weights:
                if is_sharded(weight) and weight.grad is not None:
                    self._former[weight] = sample(weight.grad, probe.limit, probe.ranks)
                elif weight.requires_grad and not is_sharded(weight):
                    self._handles.append(weight.register_hook(self._hook(probe)))
        return handle

    def _hook(self, probe: RoleProbe) -> Any:
        def see(gradient: Tensor) -> None:
            with torch.no_grad():
                # Of a plain weight every rank has a gradient of its own: all of them count.
                square = sample(gradient, probe.limit, 1).square().sum() / probe.ranks
                self._small[probe.role] += square * self._factor**2

        return see

    def see(self, weights: Mapping[RoleProbe, Sequence[Tensor]]) -> None:
        """Measures the whole batch's gradients of weights that are about to be updated."""
        if self.batches is None or self.total is None:
            return
        self.total[:3] = self.total.new_tensor([1.0, *self.batches])
        for probe, held in weights.items():
            found = [weight for weight in held if weight.grad is not None]
            large, small = self.total.new_zeros(()), self.total.new_zeros(())
            for weight in found:
                assert weight.grad is not None
                taken = sample(weight.grad, probe.limit, probe.ranks)
                large += taken.square().sum()
                if is_sharded(weight):
                    former = self._former.get(weight, taken.new_zeros(()))
                    small += ((taken - former) * self._factor).square().sum()
            count = sum(elements(weight, probe.ranks) for weight in found)
            self._small[probe.role] += small
            start = 3 + 3 * self._roles[probe.role]
            self.total[start : start + 3] += torch.stack([torch.full_like(large, count), small * 0, large])
        for role, small in self._small.items():
            self.total[3 + 3 * self._roles[role] + 1] = small

    def finish(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._former = {}

    def metrics(self, total: Tensor) -> dict[str, float]:
        """The noise scales of the last samples, in samples; of a role only where its true gradient is above the noise."""
        if total[0] == 0:
            return {}
        small_batch, large_batch = (float(x) for x in total[1:3] / total[0])
        found = {role: total[3 + 3 * i :][:3] for role, i in self._roles.items()}
        found[ALL] = sum(found.values(), torch.zeros(3, dtype=total.dtype))
        tags = {}
        for role, (count, small, large) in found.items():
            if count == 0 or not (small.isfinite() and large.isfinite()):
                continue
            true, noise = gradient_noise(float(small), float(large), small_batch, large_batch)
            last = self.sums.get(role, [0.0, 0.0])
            self.sums[role] = [_DECAY * last[0] + noise, _DECAY * last[1] + true]
            if self.sums[role][1] > 0:
                tags[f"updates/gradient_noise_scale/{role}"] = max(0.0, self.sums[role][0] / self.sums[role][1])
        return tags


def why_no_noise(trainer: Trainer, pl_module: LightningModule, probes: Sequence[RoleProbe]) -> str:
    """Why this run has no gradient noise scale; empty if it has one."""
    if reason := _obstacle(trainer, pl_module):
        return _NONE + reason
    sharded = any(is_sharded(weight) for probe in probes for weight in probe.weights)
    if trainer.accumulate_grad_batches > 1 or (trainer.world_size > 1 and not sharded):
        return ""
    return (
        f"{_NONE}an optimizer step sees gradients of one batch size. It needs accumulate_grad_batches above 1, or several ranks "
        "under DDP."
    )


def _obstacle(trainer: Trainer, pl_module: LightningModule) -> str:
    if not pl_module.automatic_optimization:
        return "under manual optimization it is not known which batches a gradient is made of."
    if getattr(trainer.model, "parameters_to_ignore", None):
        return "DDP ignores some of the parameters, whose gradients are then not those of the whole batch."
    return ""


def _samples(batch: Any) -> int | None:
    """Samples in a batch; None if that cannot be told."""
    try:
        return extract_batch_size(batch)
    except Exception:  # a foreign kind of batch
        return None


def _loss_scale(trainer: Trainer) -> float:
    """What a GradScaler multiplies the loss by, and with it the gradients until they are unscaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None or not math.isfinite(scale := float(scaler.get_scale())) else scale
