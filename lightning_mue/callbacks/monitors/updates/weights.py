"""The weights of a model by role and layer, and the statistics of a step of each such group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import UnhookedProbe, layer_labels
from lightning_mue.diagnostics import (
    angular_step,
    even_sample,
    small_second_moments,
    update_rms,
    update_summary,
    weight_rms,
)
from lightning_mue.diagnostics.updates import UPDATE_SIZE
from lightning_mue.names import clean_name, metric_name, split_layer
from lightning_mue.sharded import is_sharded, local

#: The role of parameters that no reading gives one.
OTHER = "other"
#: Settings of a parameter group, in the order of the statistics.
SETTINGS = ("lr", "weight_decay", "eps")
#: At least so many elements of each tensor are measured, however many share a probe.
_FEWEST = 64
#: Updates of HyperSphereOptimizer without Adam's eps.
_WITHOUT_EPS = frozenset({"sphere", "muon"})


def sample(tensor: Tensor, limit: int, ranks: int = 1) -> Tensor:
    """Elements of a tensor (this rank's part of a DTensor), scaled so that sums of their squares estimate those of the whole.

    Squares add up over ranks to those of one whole tensor: a replica counts as 1 / number of replicas.

    Args:
        tensor: A weight or gradient, also a sparse one.
        limit: At most so many elements.
        ranks: Processes of the run, each of which holds a plain tensor whole.

    Returns:
        1-D float32.
    """
    x = tensor.detach()
    x = x.coalesce().values() if x.is_sparse else local(x)
    taken = even_sample(x, limit).float()
    square = x.numel() / max(1, taken.numel()) / replicas(tensor, ranks)
    return taken if square == 1 else taken * math.sqrt(square)


def replicas(tensor: Tensor, ranks: int) -> int:
    """How many of the run's processes hold the same elements of a tensor."""
    if not is_sharded(tensor):
        return ranks
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    parts = math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if hasattr(placement, "dim"))
    return max(1, ranks // parts)


def elements(tensor: Tensor, ranks: int) -> float:
    """Elements of this rank's part of a tensor, over its replicas: these add up over ranks to the elements of the whole."""
    return local(tensor).numel() / replicas(tensor, ranks)


class RoleProbe(UnhookedProbe):
    """One role's weights in one layer. All sums are over all their elements, estimated from an even sample.

    Statistics: those of `update_summary`; [elements with a gradient, its squares]; [second moments that eps outweighs, all above
    zero]; [elements, elements x value] of each of `SETTINGS`.

    Attributes:
        label: ``<role>/<layer>``.
        weights: The parameters.
        limit: Elements of one parameter, on one rank, that are measured.
        ranks: Processes of the run.
    """

    GRADIENT = UPDATE_SIZE
    MOMENTS = GRADIENT + 2
    SETTING = MOMENTS + 2
    size = SETTING + 2 * len(SETTINGS)

    def __init__(self, label: str, weights: Iterable[Tensor], max_elements: int, ranks: int) -> None:
        super().__init__(label)
        self.weights, self.ranks = list(weights), ranks
        self.limit = max(_FEWEST, max_elements // len(self.weights))

    @property
    def role(self) -> str:
        """The role of the weights."""
        return self.label.partition("/")[0]

    def values(self, weights: Iterable[Tensor]) -> Tensor:
        """[n] a sample of some of the weights, one after the other."""
        return torch.cat([sample(weight, self.limit, self.ranks) for weight in weights])

    def add_at(self, start: int, found: Tensor) -> None:
        """Adds to the entries of the statistics from ``start`` on."""
        assert self.total is not None
        self.total[start : start + found.numel()] += found.to(self.total.device)

    def add_step(self, weights: Iterable[Tensor], before: Tensor) -> None:
        """Compares some of the weights with their sample before the step."""
        summary = update_summary(before, self.values(weights))
        summary[0] = sum(elements(weight, self.ranks) for weight in weights)
        self.add_at(0, summary)

    def add_gradients(self, weights: Iterable[Tensor]) -> None:
        """Measures the gradients of those weights that have one."""
        found = [weight for weight in weights if weight.grad is not None]
        if found:
            square = self.values(weight.grad for weight in found if weight.grad is not None).square().sum()
            count = sum(elements(weight, self.ranks) for weight in found)
            self.add_at(self.GRADIENT, torch.stack([torch.full_like(square, count), square]))

    def add_moments(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Measures how many of Adam's second moments eps outweighs, where the optimizer has such."""
        moment, step = state.get("max_exp_avg_sq", state.get("exp_avg_sq")), state.get("step")
        eps: Any = group.get("eps")
        betas: Any = group.get("betas")
        if (
            not (isinstance(moment, Tensor) and moment.is_floating_point() and _is_number(eps) and betas)
            or step is None
        ):
            return
        if local(moment).shape != local(weight).shape:
            return
        threshold = eps**2 * (1 - betas[1] ** step)
        if isinstance(threshold, Tensor):
            threshold = threshold.to(moment.device)
        taken = even_sample(local(moment), self.limit)
        self.add_at(
            self.MOMENTS, small_second_moments(taken, threshold) * (elements(weight, self.ranks) / max(1, len(taken)))
        )

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Tag -> value, of what was seen."""
        summary, (seen, square) = total[:UPDATE_SIZE], total[self.GRADIENT : self.MOMENTS]
        outweighed, above = total[self.MOMENTS : self.SETTING]
        found: dict[str, Tensor] = {}
        if summary[0] > 0:
            found["weight_rms"] = weight_rms(summary)
        if summary[0] > 0 and summary[2] != 0:  # from zero (biases, adaLN-zero) there is no ratio; NaN is shown
            found |= {"update_ratio": update_rms(summary) / weight_rms(summary), "angular_step": angular_step(summary)}
        if seen > 0:
            found |= {"gradient_rms": (square / seen).sqrt(), "gradient_norm": square.sqrt()}
        if above > 0:
            found["eps_share"] = outweighed / above
        for name, (count, value) in zip(SETTINGS, total[self.SETTING :].view(-1, 2), strict=True):
            if count > 0:
                found[name] = value / count
        return {f"updates/{name}/{self.label}": float(value) for name, value in found.items()}


def setting(group: Mapping[str, Any], name: str) -> Any:
    """A parameter group's value of one of `SETTINGS`, a number or a scalar tensor; None if it has none that acts."""
    value = group.get(name)
    if name == "eps" and group.get("kind") in _WITHOUT_EPS:
        return None
    if isinstance(value, (tuple, list)) and value:  # Adafactor's two: the first is added to squared gradients
        value = value[0]
    return value if _is_number(value) else None


def _is_number(value: object) -> bool:
    is_tensor = isinstance(value, Tensor) and value.numel() == 1
    return is_tensor or (isinstance(value, (int, float)) and not isinstance(value, bool))


def role_probes(module: nn.Module, roles: Mapping[str, str], max_elements: int, ranks: int) -> list[RoleProbe]:
    """One probe a role and layer, in the order of the parameters.

    Args:
        module: The model.
        roles: Name of a parameter -> its role; `OTHER` for names that it lacks.
        max_elements: Elements of a role's weights in a layer, on one rank, that are measured.
        ranks: Processes of the run.
    """
    groups: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.numel():
            name = clean_name(name)
            groups[roles.get(name, OTHER)][_place(name)].append(weight)
    labels = {role: layer_labels(places) for role, places in groups.items()}
    return [
        RoleProbe(f"{metric_name(role)}/{labels[role][place]}", weights, max_elements, ranks)
        for role, places in groups.items()
        for place, weights in places.items()
    ]


def _place(name: str) -> str:
    """The layer that a parameter lies in, or the module that holds it outside of all layers."""
    template, layer = split_layer(name)
    return name.rpartition(".")[0] if layer < 0 else f"{template.partition('*')[0]}{layer}"
