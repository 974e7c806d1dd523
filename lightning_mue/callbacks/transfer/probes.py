"""What TransferMonitor watches: every trainable weight, the branches, the residual stream and the logits, each with its place.

Shape legend: T tokens, K experts per token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.probes import Probe, UnhookedProbe, find_modules, first_tensor
from lightning_mue.callbacks.transfer.layers import OUTSIDE, Layers
from lightning_mue.callbacks.transfer.reach import (
    OUTSIDE_ROLES,
    folded_queries,
    folded_residuals,
    reach_factor,
    tied_outputs,
)
from lightning_mue.contract import branch_kind, is_router
from lightning_mue.diagnostics import even_sample, update_rms, update_summary, weight_rms
from lightning_mue.diagnostics.updates import UPDATE_SIZE
from lightning_mue.names import clean_name
from lightning_mue.parameterizations import Role, ScalingPlan
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS
from lightning_mue.sharded import local

#: Averaged over tensors or modules by the mean; all others, which are RMS values, by the RMS.
_MEANS = ("z/", "loss/")
#: Only used to compute others.
_INNER = ("change/", "gates/")


class _Mean(Probe):
    """Statistics: [sum, count]."""

    size = 2

    def metrics(self, total: Tensor) -> dict[str, float]:
        return {self.label: float(total[0] / total[1])} if total[1] > 0 else {}


class UpdateProbe(UnhookedProbe):
    """Measures the change of one weight in a step. Statistics: those of `update_summary`, on a sample of the elements.

    Shards of a DTensor add up over ranks; replicas on several ranks count alike in both sums.

    Attributes:
        label: ``<role>/<place>/<name>``.
        reach: Factor from the RMS of its change (``relative``: to its own RMS) to its reach (see `TransferMonitor`).
    """

    size = UPDATE_SIZE

    def __init__(self, label: str, weight: Tensor, reach: float, relative: bool, max_elements: int) -> None:
        super().__init__(label)
        self.weight, self.reach, self.relative, self.max_elements = weight, reach, relative, max_elements
        self._before: Tensor | None = None

    def attach(self, device: torch.device) -> RemovableHandle:
        """Forgets the previous step."""
        self._before = None
        return super().attach(device)

    def before_step(self) -> None:
        """Copies the weights before the first optimizer step of a sampled batch."""
        if self._before is None and self.weight.requires_grad:
            self._before = even_sample(local(self.weight), self.max_elements)

    def after_step(self) -> None:
        """Compares the weights with the copy."""
        if self._before is not None:
            self.total = update_summary(self._before, even_sample(local(self.weight), self.max_elements))
            self._before = None

    def metrics(self, total: Tensor) -> dict[str, float]:
        """RMS of the change, and of the weight before it."""
        if total[0] == 0:
            return {}
        return {f"change/{self.label}": float(update_rms(total)), f"weight/{self.label}": float(weight_rms(total))}


class LossProbe(UnhookedProbe, _Mean):
    """The mean over ranks of the loss that the training step returned."""

    def __init__(self) -> None:
        super().__init__("loss/train/outside/")

    def see(self, outputs: Any) -> None:
        """Takes the loss from what the training step returned, if it is there."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and self.total is not None:
            sum_and_count = torch.stack([loss.detach().float().reshape(()), loss.new_ones(()).float()])
            self.total = sum_and_count.to(self.total.device)


class _RmsProbe(Probe):
    """RMS of a module's output over all calls and ranks. Statistics: [sum of squares, elements]."""

    size = 2

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        x = first_tensor(output)
        if x is None or x.numel() == 0:
            return None
        square = x.float().square().sum()
        return torch.stack([square, torch.full_like(square, x.numel())])

    def metrics(self, total: Tensor) -> dict[str, float]:
        return {self.label: float((total[0] / total[1]).sqrt())} if total[1] > 0 else {}


class _GateProbe(_Mean):
    """Mean over tokens of the sum of a token's gates [T, K] in one router."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        gates_TK = getattr(output, "gates", None)
        if not isinstance(gates_TK, Tensor) or gates_TK.ndim != 2:
            return torch.zeros(self.size, device=next(self.module.parameters()).device)  # a foreign router
        return torch.stack([gates_TK.detach().float().sum(), gates_TK.new_tensor(float(gates_TK.shape[0])).float()])


def update_probes(
    module: nn.Module,
    plan: ScalingPlan,
    layers: Layers,
    multipliers: Mapping[str, list[tuple[str, float]]],
    max_elements: int,
) -> list[UpdateProbe]:
    """One probe per parameter of the plan, in the plan's order."""
    weights = {clean_name(name): p for name, p in module.named_parameters()}
    passed = folded_residuals(module, plan, layers) | tied_outputs(module, plan, multipliers)
    queries = folded_queries(module, plan)
    probes = []
    for entry in plan.parameters:
        if entry.name in weights:
            place = OUTSIDE if Role(entry.role) in OUTSIDE_ROLES else layers.place(entry.name)
            reach = (
                reach_factor(entry, layers, multipliers) * passed.get(entry.name, 1.0) * queries.get(entry.name, 1.0)
            )
            label, relative = f"{entry.role}/{place}/{entry.name}", entry.kind in SPHERE_KINDS
            probes.append(UpdateProbe(label, weights[entry.name], reach, relative, max_elements))
    return probes


def activation_probes(
    module: LightningModule, layers: Layers, *, attention: bool
) -> tuple[list[Probe], dict[str, str]]:
    """Probes of branches, residual stream, routers and logits.

    Returns:
        The probes, and the keys ``<quantity>/<role>/<place>/<module>`` of those whose metrics have names of their own.
    """
    modules = find_modules(module, lambda _: True)
    branches = {name: m for name, m in modules.items() if branch_kind(m) is not None}
    probes: list[Probe] = [_RmsProbe(m, f"rms/{branch_kind(m)}/{layers.place(n)}/{n}") for n, m in branches.items()]
    blocks = [n for n in modules if n in {b.rpartition(".")[0] for b in branches} and layers.place(n) != OUTSIDE]
    if blocks:  # the residual stream, which is comparable between depths only at its end
        probes.append(_RmsProbe(modules[blocks[-1]], f"rms/residual/{OUTSIDE}/{blocks[-1]}"))
    for name, router in modules.items():
        if is_router(router):
            probes.append(_GateProbe(router, f"gates/expert_down/{layers.place(name)}/{name}"))
    names, keys = {id(m): name for name, m in modules.items()}, {}
    logits = LogitsZMonitor(attention=attention).find_probes(module)
    for probe in logits:
        kind, name = probe.label.partition("/")[0], names[id(probe.module)]
        place = OUTSIDE if kind == "lm_logits" else layers.place(name)
        keys[f"stability/z/{probe.label}"] = f"z/{kind}/{place}/{name}"
    return probes + logits, keys


def measurements(raw: Mapping[str, float], keys: Mapping[str, str], updates: Sequence[UpdateProbe]) -> dict[str, float]:
    """Merges what the probes of a sampled step measured into one value per quantity, role and place.

    Args:
        raw: ``<quantity>/<role>/<place>/<name>`` (or a tag in ``keys``) -> value of one tensor or module.
        keys: From `activation_probes`.
        updates: The probes of the weights, of which ``raw`` holds ``change/<label>`` and ``weight/<label>``.

    Returns:
        ``<quantity>/<role>/<place>`` -> value, as in a `Fingerprint`. Neither ``update`` nor ``reach`` if nothing moved.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for tag, value in raw.items():
        if tag.startswith("stability/") and tag not in keys:
            continue  # what else the probes of logits measure
        found[keys.get(tag, tag).rpartition("/")[0]].append(value)
    gates = {key.split("/")[2]: sum(values) / len(values) for key, values in found.items() if key.startswith("gates/")}
    if any(value for tag, value in raw.items() if tag.startswith("change/")):
        for probe in updates:
            change, weight = raw.get(f"change/{probe.label}"), raw.get(f"weight/{probe.label}")
            if change is None or weight is None:
                continue
            curve = probe.label.rpartition("/")[0]
            role, _, place = curve.partition("/")
            if weight > 0:
                found[f"update/{curve}"].append(change / weight)
            if not probe.relative:
                gate = gates.get(place, 1.0) if role == "expert_down" else 1.0
                found[f"reach/{curve}"].append(probe.reach * gate * change)
            elif weight > 0:
                found[f"reach/{curve}"].append(probe.reach * change / weight)
    return {key: _merged(key, values) for key, values in found.items() if not key.startswith(_INNER)}


def _merged(key: str, values: Sequence[float]) -> float:
    if key.startswith(_MEANS):
        return sum(values) / len(values)
    return math.sqrt(sum(value * value for value in values) / len(values))
