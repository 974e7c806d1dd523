"""The form of a parameterization: role -> row of cells, keyed by optimizer family, as literal data.

One file a paper holds its table (``mup.py``, ``complete_mue.py``, ...); this file only says what a table is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_mue.checks import listed, mismatch, require_choice
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role

#: ``paper``: a printed cell; ``code``: the authors' code; ``derived``: ours, from the paper's argument; ``measured``.
Status = Literal["paper", "code", "derived", "measured"]


class NotCoveredError(ValueError):
    """A rule does not cover a model: no table for the optimizer, no row for a role, or a multiplier that is missing."""


def not_covered(*, found: str, expected: str, do: str = "") -> NotCoveredError:
    """A NotCoveredError with the message of `mismatch`."""
    return NotCoveredError(mismatch("rule", found=found, expected=expected, do=do))


@dataclass(frozen=True)
class Row:
    """How one role scales: every cell multiplies the value tuned at the base size.

    Attributes:
        init: Standard deviation of the initialization.
        lr: Learning rate.
        wd: Weight decay in PyTorch's decoupled form (applied as lr * wd).
        eps: Adam's epsilon.
        source: The paper, with table or section.
        status: How far the row is the paper's own word.
        absent_init: Absolute init std at the base size for a role that the base lacks (a dense base has no router);
            the symbols then stand for the base's absolute sizes, not for ratios.
        tied: Every expert of a layer starts from the same draw.
        page: Page of this project that derives the row; filled in by the rule that first holds it.
    """

    init: str = "1"
    lr: str = "1"
    wd: str = "1"
    eps: str = "1"
    source: str = ""
    status: Status = "paper"
    absent_init: str | None = None
    tied: bool = False
    page: str = ""

    def __post_init__(self) -> None:
        for cell in (self.init, self.lr, self.wd, self.eps, self.absent_init or "1"):
            parse(cell)

    @property
    def citation(self) -> str:
        """Source, status unless it is the paper's own word, and page, as a plan shows them."""
        status = "" if self.status == "paper" else f" ({self.status})"
        return f"{self.source}{status}" + (f"; {self.page}" if self.page else "")


Table = Mapping[Role, Row]

#: Up and down matrices of every kind of FFN, by the names that `rows` takes.
FFN_MATRICES = ("ffn_up", "ffn_down", "expert_up", "expert_down", "shared_up", "shared_down")


@dataclass(frozen=True)
class Preset:
    """Constants that a paper reports for its own base; unlike cells, they do not depend on the ratios.

    Attributes:
        source: The paper, and where in it.
        base: The paper's base, as overrides of a module's hyperparameters; used where the user gives no base.
        hyperparameters: What the paper tuned at that base (``lr``, ...). Shown to the user, who sets them.
        factors: Regular expression on parameter names -> column (``init`` or ``lr``) -> constant that multiplies it, at
            the base and the target alike.
    """

    source: str
    base: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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
        tied_output: Cell of the multiplier on the logits (``output``) where the head is the embedding. The shared weight has the
            embedding's row; ``d`` is its own width. None: the rule makes no claim for such models.
        betas: Cell that multiplies ``1 - beta`` of Adam's betas.
        moves: The axes along which the rule claims transfer.
        routing: Setting of a router -> values for which the rule claims transfer over experts and top-k.
        fixed: Symbols (e.g. ``kappa``) whose ratio must be 1 for the rule to claim transfer.
        alpha: The only depth exponent for which the rule is derived; None: any.
        invariants: Name -> cell in absolute sizes; models that agree in it have the same limit. Shown in the plan.
        presets: Name -> constants that the paper reports.
        resolve: For a rule that is several: picks one by which axes move, (target, base) -> (rule, reason).
        page: Page of this project that derives the rows; those taken over from another rule keep that rule's page.
    """

    name: str
    source: str
    tables: Mapping[Family, Table]
    multipliers: Mapping[str, str] = field(default_factory=dict)
    tied_output: str | None = None
    betas: str = "1"
    moves: frozenset[str] = frozenset()
    routing: Mapping[str, frozenset[str]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    alpha: float | None = None
    invariants: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)
    resolve: Callable[[Axes, Axes], tuple[Parameterization, str]] | None = None
    page: str = ""

    def __post_init__(self) -> None:
        own = {
            family: {role: row if row.page else replace(row, page=self.page) for role, row in table.items()}
            for family, table in self.tables.items()
        }
        object.__setattr__(self, "tables", own)
        for cell in (*self.multipliers.values(), *self.invariants.values(), self.tied_output or "1", self.betas):
            parse(cell)

    def table(self, family: Family) -> Table:
        """The rows for one optimizer family.

        Raises:
            NotCoveredError: If the rule has no table for the family.
        """
        if family not in self.tables:
            raise not_covered(
                found=f"{self.name!r} ({self.source}), which has no table for optimizers of the family {family!r}",
                expected=f"an optimizer of the family {' or '.join(self.tables)}, or another rule",
                do=f"Rules for {family!r}: {listed(rules_for(family))}.",
            )
        return self.tables[family]


def rows(source: str, status: Status = "paper", /, **by_role: Mapping[str, str]) -> dict[Role, Row]:
    """Writes several rows of one source: ``rows("2203.03466 Table 8", hidden={"lr": "d^-1"})``."""
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
    require_choice("rule", name, sorted(RULES))
    return RULES[name]
