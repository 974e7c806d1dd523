"""Compares what base and target did with what a sound plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mue.names import all_indices, in_attention
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.rules.kinds import Kind
from lightning_mue.parameterizations.rules.monomial import SYMBOLS, parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization
from lightning_mue.parameterizations.verifying.measuring import Measurements

#: Quantity -> (least, largest) ratio of the target's value to what is expected. Calibrated on the zoo of the tests.
TOLERANCES: dict[str, tuple[float, float]] = {
    "share": (0.62, 1.6),
    "update": (0.4, 1.75),
    "input": (0.6, 1.6),
    "input update": (0.5, 1.75),
    "output update": (0.3, 1.75),
    "attention update": (0.4, 1.45),
    "output": (0.0, 1.6),
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
_WHAT = {
    "share": "what it adds to the residual stream at initialization, relative to the stream and summed over the layers as the rule "
    "does",
    "update": "what one optimizer step of it changes in the residual stream",
    "input": "what it adds to the input of the first layer",
    "input update": "what one optimizer step of it changes in the input of the first layer",
    "output update": "what one optimizer step of it changes in the model's output",
    "attention update": "what one optimizer step changes in the attention logits",
    "output": "the model's output at initialization",
    "gradient": "its gradient, against which Adam's eps counts here,",
}


@dataclass(frozen=True)
class Deviation:
    """A measured value that a sound plan would have kept.

    Attributes:
        quantity: ``share``, ``update``, ``input``, ``input update``, ``output update``, ``attention update`` or ``output``.
        parameter: Name of one parameter, or of the model.
        role: Its role, empty for a quantity of the whole model.
        source: The row of the table that was applied.
        ratio: Target's value over the base's.
        expected: What the rule makes of it.
        cause: The likely cause, and what to do.
    """

    quantity: str
    parameter: str
    role: str
    source: str
    ratio: float
    expected: float
    cause: str

    def __str__(self) -> str:
        of = f"{self.parameter} ({self.role}; {self.source})" if self.role else self.parameter
        return (
            f"{of}: {_WHAT[self.quantity]} is {self.ratio:.3g} times the base's, expected about {self.expected:.3g} times. "
            f"{self.cause}"
        )


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
        for entry in plan.parameters:
            self.entries.setdefault(all_indices(entry.name), entry)

    def groups(self) -> list[Deviation]:
        """Deviations of groups of parameters."""
        found = []
        for (quantity, group), value in self.target.values.items():
            entry = self.entries.get(group)
            if quantity not in TOLERANCES or entry is None or entry.base is None:
                continue
            old = self.base.values.get((quantity, all_indices(entry.base)), 0.0)
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
        if quantity == "attention update" and self.base.head_dim:
            # With the right factor it falls a little with the head dimension k, as long as that is small; without, it is k^1/2
            # times as large.
            growth = max(1.0, self.target.head_dim / self.base.head_dim)
            least, largest = least * growth**-0.25, _SHARPER if growth >= 3 else largest
        if least <= ratio / expected <= largest:
            return []
        name, role, source = (entry.name, entry.role, entry.source) if entry is not None else ("the model", "", "")
        return [
            Deviation(quantity, name, role, source, ratio, expected, self._cause(quantity, entry, ratio / expected))
        ]

    def _leaves_out(self, quantity: str, entry: ParameterPlan) -> bool:
        role = Role(entry.role)
        if role is Role.ROUTER or len(entry.shape) == 0:
            return True  # its effect comes by jumps, from expert to expert
        if quantity == "output update":  # embeddings are judged at the first layer's input
            return role is Role.EMBEDDING and "tied" not in entry.source
        if quantity == "gradient":  # of a final norm the rules' eps does not scale with the width, its gradient does
            return role is Role.FINAL_NORM or not entry.kind.startswith("adam")
        if quantity != "share":
            return False
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
        what = "initial std or multiplier" if quantity in ("share", "input") else "learning rate or multiplier"
        return (
            f"Its {what} is {'too large' if factor > 1 else 'too small'} by about {max(factor, 1 / factor):.2g}: the role "
            f"{entry.role!r} probably does not fit. Give another by pattern, e.g. roles={{'{entry.name}': ...}}."
        )
