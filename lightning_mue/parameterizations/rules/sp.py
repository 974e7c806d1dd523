"""``sp``: standard parameterization. Nothing scales: the base's values are used as they are (the negative control)."""

from __future__ import annotations

from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, Row, register

_ROWS = {role: Row(source="standard parameterization: no factors", absent_init="d^-1/2") for role in Role}

SP = register(
    Parameterization(
        name="sp", source="plain PyTorch", tables={"adam": _ROWS, "sgd": _ROWS, "sphere": _ROWS}, tied_output="1"
    )
)
