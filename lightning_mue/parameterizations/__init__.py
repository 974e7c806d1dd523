"""WHAT to scale: papers' tables as data, the plan that they give for a model, and its application.

This package knows torch, but no Lightning.
"""

from lightning_mue.parameterizations.applying.groups import param_groups
from lightning_mue.parameterizations.applying.initial_weights import initialize
from lightning_mue.parameterizations.applying.scaled_step import ScaledStep
from lightning_mue.parameterizations.planning.compare import RuleComparison, compare_rules
from lightning_mue.parameterizations.planning.plan import plan
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.reading.base import save_base
from lightning_mue.parameterizations.reading.initial.initializer import Init
from lightning_mue.parameterizations.rules import complete_mue, complete_p, hyperp, moe_dmft, mssp, mup, sp
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role
from lightning_mue.parameterizations.rules.table import RULES, Parameterization, Row, get_rule

del complete_mue, complete_p, hyperp, moe_dmft, mssp, mup, sp  # imported for their registration

__all__ = [
    "MATRIX_ROLES",
    "RULES",
    "Axes",
    "Init",
    "ParameterPlan",
    "Parameterization",
    "Role",
    "Row",
    "RuleComparison",
    "ScaledStep",
    "ScalingPlan",
    "compare_rules",
    "get_rule",
    "initialize",
    "param_groups",
    "plan",
    "save_base",
]
