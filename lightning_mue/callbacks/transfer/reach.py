"""Reach: how far a change of one weight moves the residual stream or the logits (see `TransferMonitor`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod

from torch import nn

from lightning_mue.callbacks.transfer.layers import OUTSIDE, Layers
from lightning_mue.parameterizations import MATRIX_ROLES, ParameterPlan, Role, ScalingPlan
from lightning_mue.parameterizations.reading.parameters import list_parameters
from lightning_mue.parameterizations.reading.roles.folding import mark_folds
from lightning_mue.parameterizations.reading.roles.queries import read_queries
from lightning_mue.parameterizations.reading.sites import sites
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS

#: Roles that are in no layer.
OUTSIDE_ROLES = frozenset({Role.EMBEDDING, Role.UNEMBEDDING, Role.FINAL_NORM})
#: Roles of the last matrix of an FFN or expert.
_DOWN = frozenset({Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN})


def forward_multipliers(module: nn.Module, patterns: Mapping[str, str] | None) -> dict[str, list[tuple[str, float]]]:
    """Qualified name of a module -> the forward multipliers that it applies now, as (kind, value).

    ``patterns`` are MuECallback's ``multipliers``.
    """
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for site in sites(module, patterns):
        found[site.path.rpartition(".")[0]].append((site.kind, site.value))
    return found


def folded_residuals(module: nn.Module, plan: ScalingPlan, layers: Layers) -> dict[str, float]:
    """Name of a parameter inside a block -> the residual multiplier that the plan folded into later weights.

    Where no module exposes the multiplier m, the last matrix of each branch carries it (docs/theory.md section 2), so the
    weights before that matrix reach the residual stream through m. The change of the matrix itself contains m already, except
    on the sphere, where the change is relative to the weight.
    """
    m, entries = plan.folded.get("residual", 1.0), {entry.name: entry for entry in plan.parameters}
    if m == 1.0:
        return {}
    carriers = _carriers(module, plan, "residual")
    return {
        name: m
        for name, entry in entries.items()
        if Role(entry.role) not in OUTSIDE_ROLES
        and layers.place(name) != OUTSIDE
        and (name not in carriers or entry.kind in SPHERE_KINDS)
    }


def folded_queries(module: nn.Module, plan: ScalingPlan) -> dict[str, float]:
    """Name of a parameter that carries an attention multiplier -> what undoes it in the RMS of its change.

    Queries that are multiplied behind their matrix move the stream no less; the change of one that holds the multiplier contains
    it. A change relative to the weight does not.
    """
    if plan.folded.get("attention", 1.0) == 1.0 and all(entry.rows is None for entry in plan.parameters):
        return {}
    carriers = _carriers(module, plan, "attention")
    entries = [e for e in plan.parameters if e.name in carriers and e.kind not in SPHERE_KINDS]
    return {entry.name: 1 / (entry.carried * row_factor(entry)) for entry in entries}


def row_factor(entry: ParameterPlan) -> float:
    """What the multiplier in some of its rows makes of the RMS of a whole matrix whose other values are alike."""
    if entry.rows is None:
        return 1.0
    part = entry.rows.count / entry.rows.period
    return (1 - part + part * entry.rows.factor**2) ** 0.5


def _carriers(module: nn.Module, plan: ScalingPlan, kind: str) -> set[str]:
    """Names of the parameters into which the plan folds a kind of multiplier, if it folds it."""
    entries = {entry.name: entry for entry in plan.parameters}
    known = [info for info in list_parameters(module, None) if info.name in entries]
    infos = mark_folds(read_queries(module, [replace(info, role=Role(entries[info.name].role)) for info in known]))
    return {info.name for info in infos if kind in info.folds}


def tied_outputs(
    module: nn.Module, plan: ScalingPlan, multipliers: Mapping[str, list[tuple[str, float]]]
) -> dict[str, float]:
    """Name of a tied table -> the multiplier on its logits that lies outside of the table's own modules, or in a norm's gain."""
    found = {}
    for info in (info for info in list_parameters(module) if info.tied):
        own, heads = (set(_ancestors(names)) for names in ((info.name,), info.also))
        kinds = [pair for path in heads - own for pair in multipliers.get(path, ())]
        found[info.name] = prod(value for kind, value in kinds if kind == "output") * plan.folded.get("output", 1.0)
    return found


def _ancestors(names: Iterable[str]) -> Iterator[str]:
    """Every module around the parameters of these names."""
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(len(parts)))


def reach_factor(entry: ParameterPlan, layers: Layers, multipliers: Mapping[str, list[tuple[str, float]]]) -> float:
    """Reach / RMS of a change (see `TransferMonitor`); on the sphere, reach / (RMS of the change / RMS of the weight).

    A matrix has the shape [..., out, in]. The multipliers (`forward_multipliers`) of all modules around the parameter count.
    """
    role, factor = Role(entry.role), 1.0
    if role in MATRIX_ROLES and entry.kind in ("adamw", "sgd"):
        factor *= entry.shape[-1]
    elif role in MATRIX_ROLES and entry.kind == "muon":
        factor *= entry.shape[-1] ** 0.5  # all singular values are equal, so no input aligns with many rows
    if role not in OUTSIDE_ROLES:
        factor *= layers.count(entry.name)  # blocks add up in the residual stream
    parts = entry.name.split(".")
    for end in range(len(parts)):
        for kind, value in multipliers.get(".".join(parts[:end]), ()):
            factor *= value if _applies(kind, role, entry.kind) else 1.0
    return factor


def _applies(multiplier: str, role: Role, kind: str) -> bool:
    """Whether a multiplier acts between a weight and the tensor that its reach is measured on."""
    if multiplier == "residual":
        return role not in OUTSIDE_ROLES
    return kind not in SPHERE_KINDS and (
        (multiplier == "ffn" and role in _DOWN)
        or (multiplier == "route" and role is Role.EXPERT_DOWN)
        or (multiplier == "output" and role is Role.UNEMBEDDING)
    )
