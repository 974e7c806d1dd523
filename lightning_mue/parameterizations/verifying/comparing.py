"""Compares what base and target did with what a sound plan keeps."""

from __future__ import annotations

from math import prod

from lightning_mue.names import all_indices, in_attention
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.rules.kinds import Kind
from lightning_mue.parameterizations.rules.monomial import SYMBOLS, parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization
from lightning_mue.parameterizations.verifying.deviation import Deviation
from lightning_mue.parameterizations.verifying.measuring import Measurements

#: Quantity -> (least, largest) ratio of the target's value to what is expected. Calibrated on the zoo of the tests.
TOLERANCES: dict[str, tuple[float, float]] = {
    "share": (0.62, 1.75),
    "update": (0.4, 2.0),
    "input": (0.6, 1.6),
    "input update": (0.5, 1.75),
    "output update": (0.3, 1.75),
    "attention update": (0.4, 1.45),
    "output": (0.4, 1.6),
    "gradient": (1 / 3, 3.0),
}
#: Largest ratio of the attention logits' updates where the head dimension grows much.
_SHARPER = 1.15
#: Smaller values are rounding: of a branch that starts at zero, or a key's bias, which attention cancels.
_NOTHING = 1e-6
#: Adam's eps counts from this part of a gradient on.
_EPS_COUNTS = 0.02
_EXPERTS = frozenset({Role.EXPERT_UP, Role.EXPERT_DOWN, Role.SHARED_UP, Role.SHARED_DOWN})
#: Rules under which the experts' sum at initialization depends on their number by design; their updates do not.
_SUMS_SHRINK = ("moe-dmft", "mssp")
_FAMILY: dict[Kind, str] = {"sgd": "sgd", "sphere": "sphere", "adam_sphere": "sphere", "muon": "muon", "adamw": "adam"}


def compare(
    rule: Parameterization, plan: ScalingPlan, base: Measurements, target: Measurements, eps: float = 0.0
) -> list[Deviation]:
    """All deviations, the farthest from what is expected first; ``eps`` is the optimizer's, 0 if it has none."""
    comparison = _Comparison(rule, plan, base, target, eps)
    found = comparison.groups() + comparison.whole()
    return sorted(found, key=lambda deviation: -_distance(deviation))


def _distance(deviation: Deviation) -> float:
    return _off(deviation.ratio, deviation.expected)


def _off(ratio: float, expected: float) -> float:
    return max(ratio / expected, expected / max(ratio, _NOTHING))


class _Comparison:
    def __init__(
        self, rule: Parameterization, plan: ScalingPlan, base: Measurements, target: Measurements, eps: float
    ) -> None:
        self.rule, self.plan, self.base, self.target, self.eps = rule, plan, base, target, eps
        self.entries: dict[str, ParameterPlan] = {}
        self.referenced = {all_indices(entry.base) for entry in plan.parameters if entry.base is not None}
        paths = [e.name.removesuffix(".weight").split(".") for e in plan.parameters if e.role == Role.ROUTER]
        # A router in a list of layers is all of the list.
        self.routers = tuple(".".join(path[:-1] if path[-1].isdigit() else path) + "." for path in paths)
        for entry in plan.parameters:
            self.entries.setdefault(all_indices(entry.name), entry)

    def groups(self) -> list[Deviation]:
        """Deviations of groups of parameters."""
        found = []
        for (quantity, group), value in self.target.values.items():
            entry = self.entries.get(group)
            if quantity not in TOLERANCES or entry is None or entry.base is None:
                continue
            old = self._base_value(quantity, entry)
            if self._is_rounding(entry):
                continue
            counts = 0 < old < self.eps / _EPS_COUNTS if quantity == "gradient" else old > _NOTHING
            if counts and not self._leaves_out(quantity, entry):
                expected = self._expected(quantity, entry)
                ratios = [value / old, *self._in_first_layer(quantity, group, entry)]
                found += self._check(quantity, entry, min(ratios, key=lambda r: _off(r, expected)), expected)
        return found

    def _in_first_layer(self, quantity: str, group: str, entry: ParameterPlan) -> list[float]:
        """The ratio in the first layers, whose inputs are alike; the more layers, the more the stream may hold of biases."""
        assert entry.base is not None
        value = self.target.first.get((quantity, group), 0.0)
        old = self.base.first.get((quantity, all_indices(entry.base)), 0.0)
        return [value / old] if min(value, old) > _NOTHING else []

    def _is_rounding(self, entry: ParameterPlan) -> bool:
        """True for a gradient of rounding errors: of a bias that a norm behind it takes away."""
        assert entry.base is not None
        sides = (self.target, all_indices(entry.name)), (self.base, all_indices(entry.base))
        largest = [max(v for (q, _), v in side.values.items() if q == "gradient") for side, _ in sides]
        own = [side.values.get(("gradient", group), 0.0) for side, group in sides]
        return any(value < _NOTHING * most for value, most in zip(own, largest, strict=True))

    def _base_value(self, quantity: str, entry: ParameterPlan) -> float:
        """Of a matrix that fuses several of the base (gate and up), their steps add up."""
        assert entry.base is not None
        group = all_indices(entry.base)
        module = group.removesuffix(".weight").rpartition(".")[0]
        others = []
        if quantity == "update" and Role(entry.role) in (Role.FFN_UP, Role.EXPERT_UP, Role.SHARED_UP):
            beside = [name for name in self.base.groups if name.removesuffix(".weight").rpartition(".")[0] == module]
            others = [name for name in beside if name not in self.referenced and name.endswith("weight")]
        return sum(self.base.values.get((quantity, name), 0.0) for name in [group, *others])

    def whole(self) -> list[Deviation]:
        """Deviations of the attention logits and the output."""
        found = []
        for quantity in ("attention update", "output"):
            old, new = (measured.values.get((quantity, ""), 0.0) for measured in (self.base, self.target))
            scales = quantity != "attention update" or "attention" in self.rule.multipliers
            if min(old, new) > _NOTHING and scales:
                found += self._check(quantity, None, new / old, self._output() if quantity == "output" else 1.0)
        return found

    def _output(self) -> float:
        """The ratio of the output at initialization: of an unembedding with the rule's std, on inputs of equal RMS."""
        row = next(iter(self.rule.tables.values())).get(Role.UNEMBEDDING)
        width = self.target.width / self.base.width
        ones = dict.fromkeys([*SYMBOLS, "S", "kappa", "alpha_ffn", "fan_out"], 1.0)
        cell = parse(row.init if row is not None else "1")
        return cell.evaluate({**ones, "d": width, "fan_in": width}, self.plan.alpha) * width**0.5

    def _check(self, quantity: str, entry: ParameterPlan | None, ratio: float, expected: float) -> list[Deviation]:
        least, largest = TOLERANCES[quantity]
        if (
            quantity == "output"
        ):  # the RMS of n random outputs errs by (2 n)^-1/2; the ratio of two may by three times n^-1/2
            largest = max(largest, 1 + 3 * self.target.output_width**-0.5)
        if quantity == "attention update" and 0 < self.base.head_dim != self.target.head_dim:
            # With the right factor it falls a little with the head dimension k, as long as that is small; without, it is k^1/2
            # times as large.
            growth = max(1.0, self.target.head_dim / self.base.head_dim)
            least, largest = least * growth**-0.25, _SHARPER if growth >= 3 else largest
        if quantity == "update" and entry is not None:
            low, high = self._coherence(Role(entry.role))
            least, largest = least * low, largest * high
        if least <= ratio / expected <= largest:
            return []
        name, role, source = (entry.name, entry.role, entry.source) if entry is not None else ("the model", "", "")
        return [
            Deviation(quantity, name, role, source, ratio, expected, self._cause(quantity, entry, ratio / expected))
        ]

    def _coherence(self, role: Role) -> tuple[float, float]:
        """How far a step's effect may lie (below, above) what the rule expects, in steps that are more coherent than the base's.

        An expert sees a/E of the tokens, and a step made of fewer of them is the more coherent with each, up to the square root. A
        step of an up matrix goes through a down matrix whose std falls as A^-1/2, while its gradient makes the A terms alike: where
        the aspect ratio A/d moves, it grows up to its square root (the drift of ``complete-mue``, whose paper keeps the ratio).
        """
        axes = self.plan.axes, self.plan.base_axes
        rare = [sizes.get("n_experts", 1) / sizes.get("top_k", 1) for sizes in axes]
        aspect = [sizes.get("active_width", 1) / sizes.get("width", 1) for sizes in axes]
        factors = [1.0]
        if role in (Role.EXPERT_UP, Role.EXPERT_DOWN):
            factors.append((rare[0] / rare[1]) ** 0.5)
        if role in (Role.FFN_UP, Role.EXPERT_UP, Role.SHARED_UP):
            factors.append((aspect[0] / aspect[1]) ** 0.5)
        return prod(min(factor, 1.0) for factor in factors), prod(max(factor, 1.0) for factor in factors)

    def _leaves_out(self, quantity: str, entry: ParameterPlan) -> bool:
        role = Role(entry.role)
        if len(entry.shape) == 0 or entry.name.startswith(self.routers):
            return True  # a router's effect comes by jumps, from expert to expert
        if quantity == "output update":  # embeddings are judged at the first layer's input
            reaches = ("input update", all_indices(entry.name)) in self.target.values
            return role is Role.EMBEDDING and reaches and "tied" not in entry.source
        if quantity == "gradient":  # of a final norm the rules' eps does not scale with the width, its gradient does
            plain = role is Role.FINAL_NORM or not entry.kind.startswith("adam")
            return plain or (in_attention(entry.name) and not self._carries_attention(entry))
        if quantity != "share":
            return False
        if entry.init.kind == "keep":
            return True  # such values are set by a formula (A_log); zeros in their place are not nothing
        if role in _EXPERTS and self.rule.name.startswith(_SUMS_SHRINK):
            return True
        return in_attention(entry.name) and not self._carries_attention(entry)

    def _carries_attention(self, entry: ParameterPlan) -> bool:
        """False for queries and keys: at initialization attention is the more even the wider the model is."""
        assert entry.base is not None
        shares = [v for (q, group), v in self.base.values.items() if q == "share" and in_attention(group)]
        return self.base.values["share", all_indices(entry.base)] > 0.7 * max(shares)

    def _expected(self, quantity: str, entry: ParameterPlan) -> float:
        """The ratio by the rule's powers of the depth, at the number of layers that ran; those of other sizes cancel."""
        if quantity == "gradient":
            return entry.eps
        depth = self._depth(entry)
        rate = self._cell(self._lr_cell(entry), depth)
        residual = self._cell(self.rule.multipliers.get("residual", "1"), depth)
        return {"share": residual, "update": residual * rate, "input": 1.0}.get(quantity, rate)

    def _depth(self, entry: ParameterPlan) -> float:
        """Ratio of the numbers of layers that ran, in the stack of a parameter; of the deepest for one outside."""
        assert entry.base is not None
        stacks = self.target.stack_of.get(all_indices(entry.name)), self.base.stack_of.get(all_indices(entry.base))
        counts = [
            measured.layers.get(stack or "", max(measured.layers.values(), default=1))
            for measured, stack in zip((self.target, self.base), stacks, strict=True)
        ]
        return counts[0] / counts[1]

    def _lr_cell(self, entry: ParameterPlan) -> str:
        family = _FAMILY[entry.kind]  # type: ignore[index]
        table = self.rule.tables.get(family) or next(iter(self.rule.tables.values()))  # type: ignore[call-overload]
        row = table.get(Role(entry.role))
        return row.lr if row is not None else "1"

    def _cell(self, cell: str, depth: float) -> float:
        ones = dict.fromkeys([*SYMBOLS, "S", "kappa", "alpha_ffn", "fan_in", "fan_out"], 1.0)
        return parse(cell).evaluate({**ones, "L": depth}, self.plan.alpha)

    def _cause(self, quantity: str, entry: ParameterPlan | None, factor: float) -> str:
        told, ran = (
            self.plan.axes.get("depth", 1.0) / self.plan.base_axes.get("depth", 1.0),
            max(self.target.layers.values(), default=1) / max(self.base.layers.values(), default=1),
        )
        if quantity in ("share", "update") and abs(told / ran - 1) > 0.01:
            return (
                f"The plan takes the depth to grow by {told:g}, while the number of layers that run grows by {ran:g}. Declare "
                "mue_axes() with the right depth on the module."
            )
        if quantity == "attention update":
            return (
                "The logits need the factor k^-1 of the head dimension k where the module has k^-1/2. Keep the head dimension "
                "(more heads), or expose the factor: multipliers={'attention': <attribute>}."
            )
        if entry is None:
            return "The head's initial std or an output multiplier does not fall with the width as it should."
        if quantity == "gradient":
            return "The plan's factor on eps does not follow it; a smaller eps of the optimizer makes it not matter."
        if (special := self._special_cause(quantity, entry, factor)) is not None:
            return special
        what = "initial std or multiplier" if quantity in ("share", "input") else "learning rate or multiplier"
        return (
            f"Its {what} is {'too large' if factor > 1 else 'too small'} by about {max(factor, 1 / factor):.2g}: the role "
            f"{entry.role!r} probably does not fit. Give another by pattern, e.g. roles={{'{entry.name}': ...}}."
        )

    def _special_cause(self, quantity: str, entry: ParameterPlan, factor: float) -> str | None:
        """What a module's own code does against the rules, where no role can help."""
        experts = self.plan.axes.get("n_experts", 1) / self.plan.base_axes.get("n_experts", 1)
        if entry.role == Role.EMBEDDING and quantity.startswith("input"):
            return (
                "The module's code probably multiplies embeddings by a factor of its width (its square root, as in Gemma). Keep "
                "that factor at the base's value."
            )
        if entry.role in (Role.EXPERT_UP, Role.EXPERT_DOWN) and experts > 1 > factor:
            return (
                "The gates of the active experts probably do not sum to 1, and shrink as experts are added. Normalize them (in "
                "transformers: norm_topk_prob=True)."
            )
        if entry.role == Role.NORM and factor > 1 and quantity in ("share", "update") and self._depth(entry) > 1:
            return (
                "If it normalizes the residual stream itself (post-norm layers), the rules do not cover this module in depth. Keep "
                "the depth, or put the norms into the branches."
            )
        return None
