"""The form of a parameterization: role -> row of cells, keyed by optimizer family, as literal data.

One file a paper holds its table (``mup.py``, ``complete_mue.py``, ...); this file only says what a table is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_mue.parameterizations.monomial import parse
from lightning_mue.parameterizations.roles import MATRIX_ROLES, Role

Family = Literal["adam", "sgd", "sphere"]
Kind = Literal["adamw", "sgd", "sphere", "adam_sphere"]
#: ``paper``: a printed cell; ``code``: the authors' code; ``derived``: ours, from the paper's argument; ``measured``.
Status = Literal["paper", "code", "derived", "measured"]


@dataclass(frozen=True)
class Row:
    """How one role scales: every cell multiplies the value tuned at the base size.

    Attributes:
        init: Standard deviation of the initialization.
        lr: Learning rate.
        wd: Weight decay in PyTorch's decoupled form (applied as lr * wd).
        eps: Adam's epsilon.
        source: Where the row stands in the literature.
        status: How far the row is the paper's own word.
        absent_init: Absolute init std at the base size for a role that the base lacks (a dense base has no router);
            the symbols then stand for the base's absolute sizes, not for ratios.
    """

    init: str = "1"
    lr: str = "1"
    wd: str = "1"
    eps: str = "1"
    source: str = ""
    status: Status = "paper"
    absent_init: str | None = None

    def __post_init__(self) -> None:
        for cell in (self.init, self.lr, self.wd, self.eps, self.absent_init or "1"):
            parse(cell)


Table = Mapping[Role, Row]


@dataclass(frozen=True)
class Parameterization:
    """A paper's rule.

    Attributes:
        name: The key users write, e.g. ``"complete-mue"``.
        source: The paper.
        tables: Optimizer family -> role -> row. A family that is missing is not claimed by the rule.
        multipliers: Kind of forward multiplier -> cell. Kinds: ``residual`` (a residual branch), ``attention``
            (the scale of the attention logits), ``ffn`` (the output of an FFN or MoE branch), ``route`` (the MoE's
            route scale). A kind that is missing leaves the module's own value alone.
        betas: Cell that multiplies ``1 - beta`` of Adam's betas.
        moves: The axes along which the rule claims transfer.
        routing: Setting of a router -> values for which the rule claims transfer over experts and top-k.
    """

    name: str
    source: str
    tables: Mapping[Family, Table]
    multipliers: Mapping[str, str] = field(default_factory=dict)
    betas: str = "1"
    moves: frozenset[str] = frozenset()
    routing: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cell in (*self.multipliers.values(), self.betas):
            parse(cell)

    def table(self, family: Family) -> Table:
        """The rows for one optimizer family.

        Raises:
            ValueError: If the rule has no table for the family.
        """
        if family not in self.tables:
            raise ValueError(
                f"rule={self.name!r} has no table for optimizers of the family {family!r}, only for "
                f"{', '.join(self.tables)} ({self.source}). Use an optimizer of one of these families, or another "
                f"rule: {', '.join(rules_for(family))}."
            )
        return self.tables[family]


def default_kind(role: Role, family: Family) -> Kind:
    """The update that a role gets: Muon for hidden matrices of the sphere family, Adam's for vectors."""
    if family == "sgd":
        return "sgd"
    if family == "adam" or role not in MATRIX_ROLES:
        return "adamw"
    return "adam_sphere" if role is Role.UNEMBEDDING else "sphere"


def rows(source: str, status: Status = "paper", **by_role: Mapping[str, str]) -> dict[Role, Row]:
    """Writes several rows of one source: ``rows("theory 4.2", hidden=dict(lr="d^-1"), ...)``."""
    return {Role(name): Row(source=source, status=status, **cells) for name, cells in by_role.items()}  # type: ignore[arg-type]


RULES: dict[str, Parameterization] = {}


def register(rule: Parameterization) -> Parameterization:
    """Adds a rule to the ones that can be named."""
    RULES[rule.name] = rule
    return rule


def rules_for(family: Family) -> list[str]:
    """Names of the rules that have a table for an optimizer family."""
    return [name for name, rule in RULES.items() if family in rule.tables]


def get_rule(name: str | Parameterization) -> Parameterization:
    """Looks a rule up by name.

    Raises:
        ValueError: For an unknown name, listing the known ones.
    """
    if isinstance(name, Parameterization):
        return name
    if name not in RULES:
        raise ValueError(f"rule: found {name!r}, expected one of {', '.join(sorted(RULES))}.")
    return RULES[name]
