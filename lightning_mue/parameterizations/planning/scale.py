"""Evaluates a rule's cells for single parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_mue.parameterizations.planning.multipliers import fold
from lightning_mue.parameterizations.planning.scaling_plan import Init, ParameterPlan
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, branch_ratios
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.kinds import Family, default_kind
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import RULES, Parameterization, Row

#: Roles whose own shape tells the active width of an undeclared dense FFN.
_DENSE = (Role.FFN_UP, Role.FFN_DOWN)


class Scale:
    """Evaluates a rule's cells for single parameters."""

    def __init__(
        self,
        rule: Parameterization,
        family: Family | Mapping[str, Family],
        alpha: float,
        axes: Axes,
        base_axes: Axes,
        factors: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.rule, self.family, self.alpha, self.factors = rule, family, alpha, factors
        self.families = sorted({family} if isinstance(family, str) else set(family.values()))
        for name in self.families:
            rule.table(name)
        self.base_sizes = base_axes.sizes()
        self.ratios = axes.ratios(base_axes)
        self.sparse = (axes.top_k or 1) < (axes.n_experts or 1)

    def parameter(
        self,
        info: ParameterInfo,
        old: ParameterInfo | None,
        inits: Mapping[str, Init],
        folded: Mapping[str, tuple[float, str]],
    ) -> ParameterPlan:
        """The plan of one parameter; ``folded`` holds the multipliers that no module applies (see multipliers.py)."""
        role = info.role
        assert role is not None
        family = self._family(info)
        row = self._row(role, info, family)
        tied = row.tied or (role is Role.BIAS and "expert" in info.name and self._ties(family))
        init = self._measured(inits, old, tied) if old is not None else self._absent_init(info, row)
        self._refuse_ties(info, init)
        ratios = self._local_ratios(info, old)
        cells = {name: parse(getattr(row, name)).evaluate(ratios, self.alpha) for name in ("init", "lr", "wd", "eps")}
        kind = default_kind(Role.EMBEDDING if info.tied else role, family)
        for name in sorted(info.folds & set(folded)):
            start, cell = folded[name]
            multiplier = start * parse(cell).evaluate(ratios, self.alpha)
            gain = info.form == "norm" and not info.name.endswith("bias")
            if multiplier != 1.0 and gain and init == Init("constant", 0.0):  # it multiplies by 1 + gain
                raise ValueError(
                    f"rule={self.rule.name!r} needs the {name} multiplier {cell} = {multiplier:g}, which cannot be folded into "
                    f"{info.name}: it starts at zero. Name the attribute that holds the multiplier: multipliers: {{{name}: ...}}."
                )
            cells = fold(cells, multiplier, kind)
        for pattern, columns in self.factors.items():
            if re.search(pattern, info.name):
                cells |= {column: cells[column] * value for column, value in columns.items()}
        return ParameterPlan(
            name=info.name,
            role=role.value,
            shape=info.shape,
            base=old.name if old is not None else None,
            init=init if init.kind == "keep" else Init(init.kind, init.value * cells["init"]),
            lr=cells["lr"],
            weight_decay=cells["wd"],
            eps=cells["eps"],
            kind=kind,
            source=row.source + (" (derived)" if row.status == "derived" else "") + (", tied" if info.tied else ""),
            base_shape=old.shape if old is not None else self._hidden_shape(info),
            tied=tied,
        )

    def _hidden_shape(self, info: ParameterInfo) -> tuple[int, ...] | None:
        """What a router that the base lacks is compared with."""
        return None if _is_vector(info) else (int(self.base_sizes["d"]),) * 2

    def _refuse_ties(self, info: ParameterInfo, init: Init) -> None:
        """Sparse routing from a zero router: every expert ties, and the same ones always win (theory.md section 4.4)."""
        # A single output is the gate of a shared expert, which chooses nothing.
        chooses = info.role is Role.ROUTER and info.fans[1] > 1 and self.sparse
        if chooses and init == Init("constant", 0.0):
            raise ValueError(
                f"base: the router {info.name} starts at exactly zero while not every expert is active: all experts then tie "
                "for every token, and the same ones always win. Initialize the base's router with a positive std."
            )

    def folded_values(self, folded: Mapping[str, tuple[float, str]]) -> dict[str, float]:
        """Kind -> the multiplier over the base's that goes into weights, at the whole model's ratios."""
        return {
            kind: parse(cell).evaluate(self.ratios, self.alpha) * (start if kind == "attention" else 1.0)
            for kind, (start, cell) in folded.items()
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
            raise ValueError(
                f"rule={self.rule.name!r} ({self.rule.source}) has no row for the role {role.value!r} of {info.name} under an "
                f"optimizer of the family {family!r}. Rules that have one: {', '.join(others) or 'none'}."
            )
        if info.tied:
            # Theory section 3: tied embeddings are drawn as the unembedding and learn by the rule of vectors.
            vector = table[Role.EMBEDDING]
            return Row(row.init, vector.lr, vector.wd, vector.eps, row.source, row.status)
        return row

    def _local_ratios(self, info: ParameterInfo, old: ParameterInfo | None) -> dict[str, float]:
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
            local = {"A": hidden, "H": hidden, "h": hidden, "E": 1.0, "a": 1.0, "kappa": 1.0}
        return {**ratios, **local}

    def _ties(self, family: Family) -> bool:
        row = self.rule.table(family).get(Role.EXPERT_UP)
        return row is not None and row.tied

    @staticmethod
    def _measured(inits: Mapping[str, Init], old: ParameterInfo, tied: bool) -> Init:
        """How the base's parameter was drawn; experts of a list that start alike take the first one's."""
        name = re.sub(r"(experts?\.)\d+", r"\g<1>0", old.name) if tied else old.name
        return inits.get(name, inits.get(old.name, Init("keep", 0.0)))

    def _absent_init(self, info: ParameterInfo, row: Row) -> Init:
        if _is_vector(info):
            return Init("keep", 0.0)  # a vector's initial value does not scale
        if row.absent_init is None or self.base_sizes.get("d", 1.0) == 1.0:  # only the ratio of widths is known
            raise ValueError(
                f"base: the target has {info.name} {list(info.shape)} (role {info.role}), the base has nothing like it, and the "
                "rule gives no initialization for that. Use a base that has one, or name another role by pattern (roles: ...)."
            )
        return Init("normal", parse(row.absent_init).evaluate(self.base_sizes, self.alpha))


def _is_vector(info: ParameterInfo) -> bool:
    """True for biases, gains and scalars."""
    return len(info.shape) <= 1
