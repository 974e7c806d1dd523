"""Several rules side by side for one model: where they agree and where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_mue.console import to_text
from lightning_mue.names import split_layer
from lightning_mue.parameterizations.planning.plan import plan
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.rules.table import NotCoveredError, get_rule

#: Column of a plan -> its title here.
_QUANTITIES = {
    "init": "initial std",
    "lr": "lr x",
    "weight_decay": "weight decay x",
    "eps": "eps x",
    "multiplier": "forward multipliers",
}


@dataclass(frozen=True)
class RuleComparison:
    """The plans of several rules for one model and base; prints as one table a quantity.

    Attributes:
        plans: Rule -> its plan.
        failures: Rule -> why it makes no plan for this model.
    """

    plans: Mapping[str, ScalingPlan]
    failures: Mapping[str, str]

    def rows(self, quantity: str) -> dict[str, dict[str, str]]:
        """(role and name of like parameters, or multiplier) -> rule -> value as shown; a rule without one is left out.

        Args:
            quantity: ``init``, ``lr``, ``weight_decay``, ``eps`` or ``multiplier``.
        """
        table: dict[str, dict[str, str]] = {}
        for rule, scaling in self.plans.items():
            if quantity == "multiplier":
                found = [(split_layer(path)[0], f"{value:.4g}") for path, value in scaling.multipliers.items()]
                found += [(f"{kind} (folded into weights)", f"{value:.4g}") for kind, value in scaling.folded.items()]
                found.append(("1 - beta", f"{scaling.betas:.4g}"))
            else:
                found = [(f"{p.role}  {split_layer(p.name)[0]}", _shown(p, quantity)) for p in scaling.parameters]
            for key, value in found:
                table.setdefault(key, {}).setdefault(rule, value)
        return table

    def agreement(self, quantity: str) -> dict[str, bool]:
        """Row -> True if all rules that have a plan agree in it."""
        return {
            key: len(cells) == len(self.plans) and len(set(cells.values())) == 1
            for key, cells in self.rows(quantity).items()
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._table(quantity) for quantity in _QUANTITIES]
        parts += [Text(f"{rule}: {reason}", style="yellow") for rule, reason in self.failures.items()]
        for rule, scaling in self.plans.items():
            parts += [Text(f"note ({rule}): {note}", style="yellow") for note in scaling.notes]
        return Group(*parts)

    def __str__(self) -> str:
        return to_text(self)

    def _table(self, quantity: str) -> Table:
        table = Table(title=_QUANTITIES[quantity], title_justify="left", title_style="bold", header_style="bold")
        table.add_column("", no_wrap=True)
        for rule, scaling in self.plans.items():
            table.add_column(f"{rule}\n{scaling.family}", justify="right", no_wrap=True)
        table.add_column("agree", justify="center")
        agreement = self.agreement(quantity)
        for key, cells in self.rows(quantity).items():
            same = agreement[key]
            values = [cells.get(rule, "-") for rule in self.plans]
            table.add_row(key, *values, "yes" if same else "no", style="dim" if same else "")
        return table


def _shown(p: ParameterPlan, quantity: str) -> str:
    if quantity != "init":
        return f"{getattr(p, quantity):.4g}"
    if p.init.kind == "keep":
        return "as it is"
    # Two digits: stds are measured on the base, so more would be sampling noise; equal layers share a row.
    text = f"= {p.init.value:.2g}" if p.init.kind == "constant" else f"{p.init.value:.2g}"
    return text + (" tied" if p.tied else "")


def compare_rules(
    model: nn.Module, rules: Sequence[str], *, family: Family | None = None, **arguments: Any
) -> RuleComparison:
    """Plans one model by several rules.

    Args:
        model: The target, which may be on ``meta``.
        rules: Names of rules.
        family: Optimizer family; a rule without a table for it is shown for the first family that it has.
        **arguments: As for :func:`lightning_mue.plan`: ``base``, ``alpha``, ``tokens``, ``batch_tokens``, ``roles``, ...

    Returns:
        The comparison. A rule that has no row for one of the model's roles is listed with the reason.

    Raises:
        ValueError: For an unknown rule, or a base that does not fit the model.
    """
    plans: dict[str, ScalingPlan] = {}
    failures: dict[str, str] = {}
    for name in rules:
        rule = get_rule(name)
        chosen = family if family in rule.tables else next(iter(rule.tables))
        try:
            plans[name] = plan(model, rule=rule, family=chosen, **arguments)  # type: ignore[arg-type]
        except NotCoveredError as error:
            failures[name] = str(error)
    return RuleComparison(plans, failures)
