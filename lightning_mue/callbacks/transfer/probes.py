"""What TransferMonitor watches: every trainable weight, the branches, the residual stream and the logits, each with its place.

Shape legend: T tokens, K experts per token.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.probes import Probe, find_modules, first_tensor
from lightning_mue.contract import branch_kind, is_router
from lightning_mue.diagnostics import even_sample, update_rms, update_summary, weight_rms
from lightning_mue.diagnostics.updates import UPDATE_SIZE
from lightning_mue.names import clean_name, split_layer
from lightning_mue.parameterizations import MATRIX_ROLES, ParameterPlan, Role, ScalingPlan
from lightning_mue.parameterizations.reading.folding import mark_folds
from lightning_mue.parameterizations.reading.parameters import list_parameters
from lightning_mue.parameterizations.reading.sites import sites
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS

OUTSIDE = "outside"
#: Kinds whose step is relative to the weight, which a forward multiplier acts on just as much.
_OUTSIDE_ROLES = frozenset({Role.EMBEDDING, Role.UNEMBEDDING, Role.FINAL_NORM})
_DOWN = frozenset({Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN})


class Layers:
    """Finds the layer of a qualified name: its first layer index, among as many as stand at that place in the model.

    Attributes:
        depths: Place ("q1" to "q4") -> mean relative depth of the layers in it, in (0, 1).
        numbers: Place -> the layers in it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        found = [split for name in names if (split := _split(name)) is not None]
        for stack, index in found:
            self._counts[stack] = max(self._counts[stack], index + 1)
        by_place: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for stack, index in found:
            by_place[self._quartile(stack, index)].add((stack, index))
        self.numbers = {place: sorted({i for _, i in layers}) for place, layers in by_place.items()}
        self.depths = {
            place: sum((i + 0.5) / self._counts[stack] for stack, i in layers) / len(layers)
            for place, layers in by_place.items()
        }

    def place(self, name: str) -> str:
        """The place of a name: one of the quartiles, or "outside"."""
        split = _split(name)
        return OUTSIDE if split is None or split[0] not in self._counts else self._quartile(*split)

    def count(self, name: str) -> int:
        """Layers of the stack that a name is in; 1 outside of any."""
        split = _split(name)
        return 1 if split is None else max(1, self._counts.get(split[0], 1))

    def _quartile(self, stack: str, index: int) -> str:
        return f"q{1 + int(4 * (index + 0.5) / self._counts[stack])}"


class UpdateProbe(Probe):
    """How far one weight moves in a step. Statistics: those of `update_summary`, on a sample of the elements.

    Shards of a DTensor add up over ranks; copies on several ranks count alike above and below the line.

    Attributes:
        label: ``<role>/<place>/<name>``.
        reach: Factor from the RMS of its change (``relative``: to its own RMS) to its reach (see `TransferMonitor`).
    """

    size = UPDATE_SIZE

    def __init__(self, label: str, weight: Tensor, reach: float, relative: bool, max_elements: int) -> None:
        super().__init__(nn.Module(), label)
        self.weight, self.reach, self.relative, self.max_elements = weight, reach, relative, max_elements
        self._before: Tensor | None = None

    def attach(self, device: torch.device) -> RemovableHandle:
        """Forgets the step before; there is no module to hook."""
        self._before, self.total = None, torch.zeros(self.size, device=device)
        return RemovableHandle(OrderedDict())

    def before_step(self) -> None:
        """Keeps the weights as they are before the step, the first time in a sampled batch."""
        if self._before is None and self.weight.requires_grad:
            self._before = even_sample(_local(self.weight), self.max_elements)

    def after_step(self) -> None:
        """Compares."""
        if self._before is not None:
            self.total = update_summary(self._before, even_sample(_local(self.weight), self.max_elements))
            self._before = None

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Nothing: it watches no forward pass."""
        return None

    def metrics(self, total: Tensor) -> dict[str, float]:
        """RMS of the change, and of the weight before it."""
        if total[0] == 0:
            return {}
        return {f"change/{self.label}": float(update_rms(total)), f"weight/{self.label}": float(weight_rms(total))}


class RmsProbe(Probe):
    """RMS of a module's output. Statistics: [sum of squares, elements]."""

    size = 2

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Sum of squares and count of one output."""
        x = first_tensor(output)
        if x is None or x.numel() == 0:
            return None
        square = x.float().square().sum()
        return torch.stack([square, torch.full_like(square, x.numel())])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """The RMS over all calls and ranks."""
        return {self.label: float((total[0] / total[1]).sqrt())} if total[1] > 0 else {}


class GateProbe(RmsProbe):
    """Sum of a token's gates [T, K] in one router. Statistics: [sum, tokens]."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Sum of all gates and number of tokens of one routing."""
        gates_TK = getattr(output, "gates", None)
        if not isinstance(gates_TK, Tensor) or gates_TK.ndim != 2:
            return torch.zeros(self.size, device=next(self.module.parameters()).device)  # a foreign router
        return torch.stack([gates_TK.detach().float().sum(), gates_TK.new_tensor(float(gates_TK.shape[0])).float()])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """The mean over tokens."""
        return {self.label: float(total[0] / total[1])} if total[1] > 0 else {}


class LossProbe(Probe):
    """The loss that the training step returned. Statistics: [sum, calls]."""

    size = 2

    def __init__(self) -> None:
        super().__init__(nn.Module(), "loss/train/outside/")

    def attach(self, device: torch.device) -> RemovableHandle:
        """Forgets the step before."""
        self.total = torch.zeros(self.size, device=device)
        return RemovableHandle(OrderedDict())

    def see(self, outputs: Any) -> None:
        """Takes the loss from what the training step returned, if it is there."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and self.total is not None:
            self.total = torch.stack([loss.detach().float().reshape(()), loss.new_ones(()).float()]).to(
                self.total.device
            )

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Nothing: it watches no forward pass."""
        return None

    def metrics(self, total: Tensor) -> dict[str, float]:
        """The mean over ranks."""
        return {self.label: float(total[0] / total[1])} if total[1] > 0 else {}


def forward_multipliers(module: nn.Module, patterns: Mapping[str, str] | None) -> dict[str, list[tuple[str, float]]]:
    """Qualified name of a module -> the forward multipliers that it applies now, as (kind, value).

    Args:
        module: The whole model.
        patterns: Kind -> regular expression on paths of attributes, for modules that declare none (as for MuECallback).
    """
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for site in sites(module, patterns):
        found[site.path.rpartition(".")[0]].append((site.kind, site.value))
    return found


def update_probes(
    module: nn.Module,
    plan: ScalingPlan,
    layers: Layers,
    multipliers: Mapping[str, list[tuple[str, float]]],
    max_elements: int,
) -> list[UpdateProbe]:
    """One probe a parameter of the plan, in the plan's order."""
    weights = {clean_name(name): p for name, p in module.named_parameters()}
    passed = folded_residuals(module, plan, layers)
    probes = []
    for entry in plan.parameters:
        if entry.name in weights:
            place = OUTSIDE if Role(entry.role) in _OUTSIDE_ROLES else layers.place(entry.name)
            reach = reach_factor(entry, layers, multipliers) * passed.get(entry.name, 1.0)
            label, relative = f"{entry.role}/{place}/{entry.name}", entry.kind in SPHERE_KINDS
            probes.append(UpdateProbe(label, weights[entry.name], reach, relative, max_elements))
    return probes


def folded_residuals(module: nn.Module, plan: ScalingPlan, layers: Layers) -> dict[str, float]:
    """Name of a parameter inside a block -> the residual multiplier that the plan folded into weights behind it.

    Where no module exposes the multiplier m, the last matrix of each branch carries it (theory.md section 2), so that whatever
    stands before that matrix reaches the residual stream through m. The matrix's own change has m in it already; on the
    sphere, where a change is relative to the weight, it has not.

    Args:
        module: The whole model.
        plan: The plan in force.
        layers: The model's layers.
    """
    m, entries = plan.folded.get("residual", 1.0), {entry.name: entry for entry in plan.parameters}
    if m == 1.0:
        return {}
    known = [info for info in list_parameters(module, None) if info.name in entries]
    infos = mark_folds([replace(info, role=Role(entries[info.name].role)) for info in known])
    carriers = {info.name for info in infos if "residual" in info.folds}
    return {
        name: m
        for name, entry in entries.items()
        if Role(entry.role) not in _OUTSIDE_ROLES
        and layers.place(name) != OUTSIDE
        and (name not in carriers or entry.kind in SPHERE_KINDS)
    }


def reach_factor(entry: ParameterPlan, layers: Layers, multipliers: Mapping[str, list[tuple[str, float]]]) -> float:
    """From the RMS of a change to its reach (see `TransferMonitor`); on the sphere, from the RMS over the weight's own.

    Args:
        entry: The parameter: name, role, kind of update, and shape, [..., out, in] for a matrix.
        layers: The model's layers.
        multipliers: From `forward_multipliers`; those of all modules that the parameter is in count.
    """
    role, factor = Role(entry.role), 1.0
    if role in MATRIX_ROLES and entry.kind in ("adamw", "sgd"):
        factor *= entry.shape[-1]
    elif role in MATRIX_ROLES and entry.kind == "muon":
        factor *= entry.shape[-1] ** 0.5  # all singular values are equal, so no input aligns with many rows
    if role not in _OUTSIDE_ROLES:
        factor *= layers.count(entry.name)  # blocks add up in the residual stream
    parts = entry.name.split(".")
    for end in range(len(parts)):
        for kind, value in multipliers.get(".".join(parts[:end]), ()):
            factor *= value if _applies(kind, role, entry.kind) else 1.0
    return factor


def _applies(multiplier: str, role: Role, kind: str) -> bool:
    """Whether a multiplier of an owner stands between a weight and what its reach is measured on."""
    if multiplier == "residual":
        return role not in _OUTSIDE_ROLES
    return kind not in SPHERE_KINDS and (
        (multiplier == "ffn" and role in _DOWN)
        or (multiplier == "route" and role is Role.EXPERT_DOWN)
        or (multiplier == "output" and role is Role.UNEMBEDDING)
    )


def activation_probes(
    module: LightningModule, layers: Layers, *, attention: bool
) -> tuple[list[Probe], dict[str, str]]:
    """Probes of branches, residual stream, routers and logits.

    Returns:
        The probes, and the keys ``<quantity>/<role>/<place>/<module>`` of those whose metrics have names of their own.
    """
    modules = find_modules(module, lambda _: True)
    branches = {name: m for name, m in modules.items() if branch_kind(m) is not None}
    probes: list[Probe] = [RmsProbe(m, f"rms/{branch_kind(m)}/{layers.place(n)}/{n}") for n, m in branches.items()]
    blocks = [n for n in modules if n in {b.rpartition(".")[0] for b in branches} and layers.place(n) != OUTSIDE]
    if blocks:  # the residual stream: only at its end is a depth comparable with another
        probes.append(RmsProbe(modules[blocks[-1]], f"rms/residual/{OUTSIDE}/{blocks[-1]}"))
    for name, router in modules.items():
        if is_router(router):
            probes.append(GateProbe(router, f"gates/expert_down/{layers.place(name)}/{name}"))
    names, keys = {id(m): name for name, m in modules.items()}, {}
    logits = LogitsZMonitor(attention=attention).find_probes(module)
    for probe in logits:
        kind, name = probe.label.partition("/")[0], names[id(probe.module)]
        place = OUTSIDE if kind == "lm_logits" else layers.place(name)
        keys[f"stability/z/{probe.label}"] = f"z/{kind}/{place}/{name}"
    return probes + logits, keys


def _split(name: str) -> tuple[str, int] | None:
    template, layer = split_layer(name)
    return None if layer < 0 else (template.partition("*")[0], layer)


def _local(weight: Tensor) -> Tensor:
    """This rank's part of a weight, without a collective."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[operator]
    return local.detach()
