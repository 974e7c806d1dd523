"""The factors that a plan predicts between a base's curves and its target's, and the cell to suspect when they do not hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.callbacks.transfer.probes import UpdateProbe
from lightning_mue.callbacks.transfer.reach import row_factor
from lightning_mue.parameterizations import Parameterization, ParameterPlan, Role, Row, ScalingPlan
from lightning_mue.parameterizations.planning.counterparts import RELATED
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS
from lightning_mue.parameterizations.rules.monomial import SYMBOLS, parse

#: Roles that do the same work in a dense FFN, an expert and a shared expert: role -> counterparts, the nearest first.
COUNTERPARTS = {role.value: tuple(other.value for other in others) for role, others in RELATED.items()}
#: Initializations with a known RMS.
_DRAWN = ("normal", "uniform", "truncated", "scaled", "constant")


@dataclass(frozen=True)
class _Factors:
    """The plan's factors for the weights of one role in one place, averaged."""

    lr: float
    init: float | None
    reach: float
    kind: str


class Expectation:
    """Factors between the base's curves and what the target should measure.

    Args:
        base: The base run.
        plan: The plan in force; one that changes nothing has factors of 1.
        rule: Its rule, if known.
        probes: The target's weights.
        drawn: Whether these were drawn by the plan.
    """

    def __init__(
        self,
        base: Fingerprint,
        plan: ScalingPlan,
        rule: Parameterization | None,
        probes: Iterable[UpdateProbe],
        drawn: bool = True,
    ) -> None:
        self.base, self.rule = base, rule
        self.plan = None if plan.same_size else plan
        entries = {entry.name: entry for entry in plan.parameters}
        self._entries: dict[str, list[ParameterPlan]] = defaultdict(list)
        weights: dict[str, list[tuple[ParameterPlan, float]]] = defaultdict(list)
        for probe in probes:
            role, place, name = probe.label.split("/", 2)
            self._entries[role].append(entries[name])
            weights[f"{role}/{place}"].append((entries[name], probe.reach))
        self._factors = {key: _averaged(found, drawn) for key, found in weights.items()}
        self.classes = classes_of(entries.values())

    def factor(self, key: str, source: str, progress: float, weight: float | None) -> float:
        """Measured value / base's value of a curve at a fraction of the run, if the transfer holds.

        ``source`` is the base's curve, ``weight`` the measured RMS of the target's weights of that role and place.
        """
        quantity, role, place = key.split("/")
        if quantity == "z":
            return self._z_factor(role, self.base.at(source, progress))
        if quantity == "rms" and role != "residual" and self.plan is not None:
            # Folded into the branch's last weights, the residual multiplier acts before the branch is measured.
            return self.plan.folded.get("residual", 1.0)
        if quantity == "reach":
            return self.duration(role)
        factors = self._factors.get(f"{role}/{place}")
        if quantity != "update" or self.plan is None or factors is None:
            return 1.0
        return self._update_factor(factors, source, role, progress, weight)

    def _update_factor(self, factors: _Factors, source: str, role: str, progress: float, weight: float | None) -> float:
        if factors.kind in SPHERE_KINDS:
            return factors.lr
        curve = source.partition("/")[2]
        start, now = self.base.first(f"weight/{curve}"), self.base.at(f"weight/{curve}", progress)
        if start is None or now is None:
            return 1.0
        lr = factors.lr
        if factors.kind == "sgd":  # the plan has no cell for the scale of its gradients: take what keeps the reach
            update, reach = self.base.at(source, progress), self.base.at(f"reach/{curve}", progress)
            lr = reach * self.duration(role) / factors.reach / (update * now) if update and reach else lr
        expected = _grown(factors.init, lr, start, now) if factors.init is not None else weight
        return lr * now / expected if expected else 1.0

    def _z_factor(self, kind: str, base: float | None) -> float:
        """E times as many logits of the same size raise their logsumexp by ln E."""
        here, there = self.classes.get(kind), self.base.classes.get(kind)
        if not base or not here or not there:
            return 1.0
        return (math.sqrt(base) + math.log(here / there)) ** 2 / base

    def duration(self, role: str) -> float:
        """What the rule's LR cell says about batch size and training length; 1 where the plan knows neither."""
        if self.plan is None or self.rule is None:
            return 1.0
        ratio = {
            symbol: self.plan.axes.get(axis, 1.0) / self.plan.base_axes.get(axis, 1.0)
            for symbol, axis in (("B", "batch_tokens"), ("T", "tokens"))
            if axis in self.plan.axes and axis in self.plan.base_axes
        }
        run = {"B": 1.0, "T": 1.0, **ratio}
        run["S"] = math.sqrt(run["B"] / run["T"])
        row = _table(self.rule, self.plan.family).get(Role(role))
        return 1.0 if row is None else parse(row.lr).evaluate({**dict.fromkeys(SYMBOLS, 1.0), **run}, self.plan.alpha)

    def suspect(self, key: str) -> str:
        """The cells of the table that a curve outside the band points to."""
        quantity, role, _ = key.split("/")
        if quantity == "update":
            return f"lr or eps cell of {self._cells(role)}; the optimizer does not do what the plan says"
        if quantity == "reach":
            return f"lr cell of {self._cells(role)}, or a forward multiplier on its way"
        if quantity == "rms" and role == "ffn":
            downs = [r for r in ("ffn_down", "expert_down", "shared_down") if r in self._entries]
            return f"init or lr cell of {', '.join(map(self._cells, downs))}, or the ffn or route multiplier"
        if quantity == "rms":
            what = "init or lr cell of hidden" if role == "attention" else "init of the embedding, or of a branch"
            return f"{what}, or the residual multiplier"
        if role == "router":
            return f"init or lr cell of {self._cells('router')}"
        if role == "attention":
            return f"the attention multiplier, or lr cell of {self._cells('hidden')} or qk_norm"
        return f"init or lr cell of {self._cells('unembedding')}, or the output multiplier"

    def _cells(self, role: str) -> str:
        entries = self._entries.get(role, [])
        if self.plan is None or not entries:
            return role
        entry = entries[0]
        return (
            f"{role} (plan: lr x {entry.lr:.3g}, eps x {entry.eps:.3g}, init {entry.init.kind} {entry.init.value:.3g}; "
            f"row {self.plan.rule}, {entry.source})"
        )


def _table(rule: Parameterization, family: str) -> Mapping[Role, Row]:
    """The rows for a family; for a plan of several, the first of them, whose rows say the same on batch and duration."""
    return next((table for name, table in rule.tables.items() if name in family), {})


def classes_of(entries: Iterable[ParameterPlan]) -> dict[str, int]:
    """Kind of logits -> their number: rows of the router and of the unembedding."""
    kinds = {"router": "router", "unembedding": "lm_logits"}
    return {kinds[entry.role]: entry.shape[0] for entry in entries if entry.role in kinds and len(entry.shape) > 1}


def _averaged(found: list[tuple[ParameterPlan, float]], drawn: bool) -> _Factors:
    entries = [entry for entry, _ in found]
    known = drawn and all(entry.init.kind in _DRAWN for entry in entries)
    rows = [1.0 if entry.kind in SPHERE_KINDS else row_factor(entry) for entry in entries]
    stds = [entry.init.value * r for entry, r in zip(entries, rows, strict=True)]
    return _Factors(
        lr=math.exp(sum(math.log(entry.lr * r) for entry, r in zip(entries, rows, strict=True)) / len(entries)),
        init=math.sqrt(sum(std**2 for std in stds) / len(stds)) if known else None,
        reach=math.sqrt(sum(reach**2 for _, reach in found) / len(found)),
        kind=entries[0].kind,
    )


def _grown(init: float, lr: float, start: float, now: float) -> float:
    """The RMS expected of the target's weights at this point of training.

    The base's weights were drawn with RMS ``start`` and have RMS ``now``. What training added is taken to be orthogonal to the
    initial weights and to scale with the LR cell; weight decay is taken to remove the same fraction.
    """
    if now < start:
        return init * now / start
    return math.sqrt(init**2 + lr**2 * (now**2 - start**2))
