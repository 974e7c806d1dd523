"""The reading of a model without a base, for observers: what each parameter does, as far as the model alone shows it."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from lightning_mue.parameterizations.planning.match import infer_roles
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.record import describe
from lightning_mue.parameterizations.reading.roles.ffn_roles import ffn_roles, named_roles
from lightning_mue.parameterizations.reading.roles.folding import mark_folds
from lightning_mue.parameterizations.reading.roles.role_names import routers_by_shape


def read_alone(model: nn.Module) -> list[ParameterInfo]:
    """A model's parameters with the roles that a plan would give them, and with folds (`mark_folds`).

    A plan refuses a model in which some role stays unknown; here such parameters have no role.

    Raises:
        ValueError: If the model cannot be read at all, e.g. because a layer is lazy and has no shape yet.
    """
    infos = ffn_roles(list(describe(model).parameters))
    infos = named_roles(routers_by_shape(ffn_roles(infos, guess=True)))
    with suppress(ValueError):
        infos = infer_roles(infos, {info.name: info for info in infos})
    return mark_folds(infos)
