"""The role of every parameter of any model, for those who only watch it: a plan must refuse what it cannot place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.record import describe
from lightning_mue.parameterizations.reading.roles.ffn_roles import ffn_roles, named_roles
from lightning_mue.parameterizations.reading.roles.folding import mark_folds
from lightning_mue.parameterizations.reading.roles.role_names import routers_by_shape
from lightning_mue.parameterizations.rules.roles import Role


def read_parameters(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[ParameterInfo]:
    """The parameters as a plan for the model alone reads them, each with its role if that can be told.

    Where a plan would refuse the model (a parameter without a role, parts of a weight, experts of an unknown form), roles come
    from names and shapes as far as these tell; the others are None.

    Args:
        model: Any module, also on ``meta`` or sharded.
        roles: Regular expression on names -> role.

    Raises:
        ValueError: For a pattern that cannot be read, or an unknown role in one.
    """
    record = describe(model, roles)
    try:
        return list(Pair(record, record, {}).infos)
    except ValueError:
        infos = named_roles(routers_by_shape(ffn_roles(ffn_roles(list(record.parameters)), guess=True)))
        return [replace(info, role=info.role or _by_form(info)) for info in infos]


def _by_form(info: ParameterInfo) -> Role | None:
    """What a plan without a larger model to compare with takes a parameter for whose name and place say nothing."""
    if len(info.shape) >= 2:
        return Role.HIDDEN if info.form in ("linear", "conv") else None
    return Role.BIAS if info.shape else Role.SCALAR


def read_alone(model: nn.Module) -> list[ParameterInfo]:
    """`read_parameters`, with folds (`mark_folds`).

    Raises:
        ValueError: If the model cannot be read at all, e.g. because a layer is lazy and has no shape yet.
    """
    return mark_folds(read_parameters(model))
