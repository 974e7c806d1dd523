"""Evaluates a rule's cells for the parameters of a matched target."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_mue.checks import listed, value_error
from lightning_mue.names import is_time_scale
from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.planning.multipliers import fold, logit_multiplier
from lightning_mue.parameterizations.planning.parameter_plan import FoldedRows, ParameterPlan
from lightning_mue.parameterizations.planning.tied import HEAD_REMEDY
from lightning_mue.parameterizations.reading.initial.initializer import Init
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, branch_ratios
from lightning_mue.parameterizations.rules.kinds import Family, default_kind
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import RULES, Parameterization, Row, not_covered

#: Roles whose own shape shows the active width of an undeclared dense FFN.
_DENSE = (Role.FFN_UP, Role.FFN_DOWN)


class Scale:
    """Evaluates a rule's cells for single parameters; for the arguments see `plan`.

    ``inits`` holds how the base's parameters were drawn; empty: the weights stay as they are. ``factors`` are a preset's.
    ``table_factor`` goes into a tied table, for what the model multiplies its rows by (`TiedHead`).
    """

    def __init__(
        self,
        rule: Parameterization,
        family: Family | Mapping[str, Family],
        alpha: float,
        pair: Pair,
        inits: Mapping[str, Init],
        factors: Mapping[str, Mapping[str, float]],
        table_factor: float = 1.0,
    ) -> None:
        self.rule, self.family, self.alpha, self.table_factor = rule, family, alpha, table_factor
        self.matched, self.inits, self.factors = pair.matched, inits, factors
        self.families = sorted({family} if isinstance(family, str) else set(family.values()))
        for name in self.families:
            rule.table(name)
        self._carried: dict[str, float] = {}  # kind -> a multiplier that went into a weight
        self.base_sizes = pair.base_axes.sizes()
        self.ratios = pair.axes.ratios(pair.base_axes)
        self.sparse = (pair.axes.top_k or 1) < (pair.axes.n_experts or 1)

    def parameter(self, info: ParameterInfo, folded: Mapping[str, tuple[float, str]]) -> ParameterPlan:
        """The plan of one parameter; ``folded`` holds the multipliers that no module applies (`folded_cells`)."""
        assert info.role is not None
        old, family, vector = self.matched.get(info.name), self._family(info), _is_vector(info)
        row = self._row(info.role, info, family)
        tied = row.tied or (info.role is Role.BIAS and "expert" in info.name and self._ties(family))
        init = self._measured(old, tied) if old is not None else self._absent_init(info, row)
        if is_time_scale(info.name):
            init = Init("keep", 0.0)  # few values that follow a formula may look like a random draw
        self._refuse_zero_router(info, init)
        kind = default_kind(Role.EMBEDDING if info.tied else info.role, family)
        ratios = self._local_ratios(info, old)
        cells = {name: parse(getattr(row, name)).evaluate(ratios, self.alpha) for name in ("init", "lr", "wd", "eps")}
        rows, carried = None, 1.0
        for name in sorted(info.folds & set(folded)):
            multiplier = self._multiplier(name, folded[name], ratios, info, old)
            self._refuse_fixed_values(info, init, name, folded[name][1], multiplier)
            if name == "attention" and info.query is not None and info.query.rows is not None:
                rows = FoldedRows(*info.query.rows, multiplier) if multiplier != 1.0 else None
            else:
                cells, carried = fold(cells, multiplier, kind), carried * multiplier
        if info.tied and old is not None:
            cells = fold(cells, self.table_factor, kind)
        cells = self._with_constants(info.name, cells)
        return ParameterPlan(
            name=info.name,
            role=info.role.value,
            shape=info.shape,
            base=old.name if old is not None else None,
            init=init if init.kind == "keep" else Init(init.kind, init.value * cells["init"]),
            lr=cells["lr"],
            weight_decay=cells["wd"],
            eps=cells["eps"],
            kind=kind,
            source=row.citation + (", tied" if info.tied else ""),
            # A router that the base lacks is compared with the base's hidden matrices.
            base_shape=old.shape if old is not None else None if vector else (int(self.base_sizes["d"]),) * 2,
            tied=tied,
            init_factor=cells["init"],
            rows=rows,
            carried=carried,
            trainable=info.trainable,
        )

    def _with_constants(self, name: str, cells: dict[str, float]) -> dict[str, float]:
        """The cells of a parameter times the constants of a preset."""
        for pattern, columns in self.factors.items():
            if re.search(pattern, name):
                cells = cells | {column: cells[column] * value for column, value in columns.items()}
        return cells

    def _multiplier(
        self,
        kind: str,
        cell: tuple[float, str],
        ratios: Mapping[str, float],
        info: ParameterInfo,
        old: ParameterInfo | None,
    ) -> float:
        """The forward multiplier of a kind that one parameter carries, over the base's."""
        value = None
        if kind == "attention":
            value = logit_multiplier(self.rule, info.query, old.query if old is not None else None, ratios, self.alpha)
        if value is None:
            value = cell[0] * parse(cell[1]).evaluate(ratios, self.alpha)
        if info.trainable and value != 1.0:
            self._carried.setdefault(kind, value)
        return value

    def _refuse_zero_router(self, info: ParameterInfo, init: Init) -> None:
        """Refuses sparse routing from a zero router: every expert ties, and the same ones always win."""
        # A single output is the gate of a shared expert, which chooses nothing.
        chooses = info.role is Role.ROUTER and info.fans[1] > 1 and self.sparse
        if chooses and init == Init("constant", 0.0):
            raise value_error(
                "base",
                found=f"the router {info.name}, which starts at exactly zero while not every expert is active",
                expected="a router with a positive std: from zero all experts tie for every token, and the same ones always win",
            )

    def _refuse_fixed_values(self, info: ParameterInfo, init: Init, kind: str, cell: str, multiplier: float) -> None:
        """Refuses to fold into a gain that starts at zero (its norm multiplies by 1 + gain) and into values that are kept."""
        gain = info.form == "norm" and not info.name.endswith("bias")
        kept = bool(self.inits) and init.kind == "keep" and (gain or not _is_vector(info))
        if multiplier != 1.0 and (kept or (gain and init == Init("constant", 0.0))):
            why = "whose initial values are kept, or lacking in the base" if kept else "which starts at zero"
            what = "output multiplier" if kind == "output" else f"{kind} multiplier {cell} ="
            remedy = f"Name the attribute that holds the multiplier: multipliers: {{{kind}: ...}}."
            raise not_covered(
                found=f"{self.rule.name!r}, which needs the {what} {multiplier:g}",
                expected=f"a module that exposes one: it cannot be folded into {info.name}, {why}",
                do=HEAD_REMEDY if kind == "output" else remedy,
            )

    def folded_values(self, folded: Mapping[str, tuple[float, str]]) -> dict[str, float]:
        """Kind -> the multiplier over the base's that went into weights, at the whole model's ratios; only those that did."""
        values = {kind: parse(cell).evaluate(self.ratios, self.alpha) for kind, (_, cell) in folded.items()}
        return {
            kind: self._carried[kind] if kind in ("attention", "output") else value
            for kind, value in values.items()
            if kind in self._carried and (kind in ("attention", "output") or value != 1.0)
        }

    def _family(self, info: ParameterInfo) -> Family:
        if isinstance(self.family, str):
            return self.family
        # Frozen parameters are in no optimizer.
        return self.family.get(info.name, next(iter(self.family.values())))

    def _row(self, role: Role, info: ParameterInfo, family: Family) -> Row:
        table = self.rule.table(family)
        row = table.get(role)
        if row is None:
            others = [r.name for r in RULES.values() if family in r.tables and role in r.tables[family]]
            raise not_covered(
                found=f"{self.rule.name!r} ({self.rule.source}), which has no row for the role {role.value!r} of {info.name} "
                f"under an optimizer of the family {family!r}",
                expected=f"a rule that has one: {listed(others)}",
            )
        if info.tied:
            return table[Role.EMBEDDING]  # docs/theory.md section 3
        return row

    def _local_ratios(self, info: ParameterInfo, old: ParameterInfo | None) -> dict[str, float]:
        """Symbol -> ratio target/base for one parameter: the model's, with its own fans and the sizes of its branch."""
        ratios = dict(self.ratios, fan_in=1.0, fan_out=1.0)
        if old is None and _is_vector(info):
            return ratios
        if old is None:
            # A router whose base is dense: it is compared with the base's hidden matrices, d x d.
            ratios.update(zip(("fan_in", "fan_out"), (fan / self.base_sizes["d"] for fan in info.fans), strict=True))
            return ratios
        for key, new, was in zip(("fan_in", "fan_out"), info.fans, old.fans, strict=True):
            ratios[key] = new / was
        local = branch_ratios(info.branch, old.branch)
        if not local and info.role in _DENSE and old.role is info.role:
            # A dense FFN that declares nothing: its active width is the hidden side of this very matrix.
            hidden = ratios["fan_in" if info.role is Role.FFN_DOWN else "fan_out"]
            if hidden in (2 * ratios["A"], ratios["A"] / 2):  # gate and up as one matrix, on one side alone
                hidden = ratios["A"]
            local = {"A": hidden, "H": hidden, "h": hidden, "E": 1.0, "a": 1.0, "kappa": 1.0}
        return {**ratios, **local}

    def _ties(self, family: Family) -> bool:
        return self.rule.table(family).get(Role.EXPERT_UP, Row()).tied

    def _measured(self, old: ParameterInfo, tied: bool) -> Init:
        """How the base's parameter was drawn; experts of a list that start alike take the first one's."""
        name = re.sub(r"(experts?\.)\d+", r"\g<1>0", old.name) if tied else old.name
        init = self.inits.get(name, self.inits.get(old.name, Init("keep", 0.0)))
        if tied and init.kind == "scaled":
            raise not_covered(
                found=f"{self.rule.name!r}, under which the experts of a layer start alike, and {old.name}, which is "
                "orthogonal or has another form that entries drawn one by one lack",
                expected="experts whose entries are drawn alike (normal or uniform), or a rule that ties none",
            )
        return init

    def _absent_init(self, info: ParameterInfo, row: Row) -> Init:
        """How a parameter is drawn that the base lacks."""
        if _is_vector(info):
            return Init("keep", 0.0)  # a vector's initial value does not scale
        if row.absent_init is None or self.base_sizes.get("d", 1.0) == 1.0:  # only the ratio of widths is known
            raise value_error(
                "base",
                found=f"nothing like the target's {info.name} {list(info.shape)} (role {info.role})",
                expected="a counterpart, since the rule gives no initialization without one",
                do="Use a base that has one, or name another role by pattern (roles: ...).",
            )
        return Init("normal", parse(row.absent_init).evaluate(self.base_sizes, self.alpha))


def _is_vector(info: ParameterInfo) -> bool:
    """True for biases (those of stacked experts, too), gains and scalars."""
    return len(info.shape) <= 1 or info.role in (Role.BIAS, Role.NORM, Role.QK_NORM, Role.FINAL_NORM, Role.SCALAR)
