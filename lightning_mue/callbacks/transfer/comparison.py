"""Comparison: a run's measurements against its base's fingerprint, as ratios, notes and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mue.callbacks.transfer.expectation import COUNTERPARTS, Expectation
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.callbacks.transfer.layers import Layers
from lightning_mue.parameterizations import ScalingPlan

#: Ratios are clamped to this many octaves, so that a weight that does not move at all can be drawn.
_OCTAVES = 10.0


class Alarm:
    """Raised by ``patience`` samples in a row of a ratio outside ``[1 / band, band]``, once until it comes back.

    It distinguishes a sustained deviation from a single bad sample.
    """

    def __init__(self, band: float, patience: int) -> None:
        self.band, self.patience = band, patience
        self._streaks: Counter[str] = Counter()
        self._raised: set[str] = set()

    def see(self, ratios: Mapping[str, float]) -> tuple[list[str], list[str]]:
        """Takes one sample, where NaN is outside and an absent key keeps its state.

        Returns:
            Keys that have just been raised, the furthest out first; keys that are back in the band.
        """
        outside = {key for key, ratio in ratios.items() if not 1 / self.band <= ratio <= self.band}
        for key in ratios:
            self._streaks[key] = self._streaks[key] + 1 if key in outside else 0
        new = {key for key in outside if self._streaks[key] >= self.patience} - self._raised
        back = (self._raised & set(ratios)) - outside
        self._raised = (self._raised | new) - back
        return sorted(new, key=lambda key: -max(ratios[key], 1 / max(ratios[key], 1e-12))), sorted(back)


class Comparison:
    """Turns samples of the target, which has these layers, into ratios; warns of ratios that stay outside the band."""

    def __init__(self, base: Fingerprint, expected: Expectation, layers: Layers, band: float, patience: int) -> None:
        self.base, self.expected, self.layers = base, expected, layers
        self._alarm, self._still, self._noted = Alarm(band, patience), 0, False
        self._sources: dict[str, str | None] = {}

    def ratios(self, values: Mapping[str, float], progress: float) -> dict[str, float]:
        """Key (as in `Fingerprint`) -> measured / expected at a fraction of the run, for what the base has a value of."""
        found = {}
        for key in values:
            source = self._source(key)
            base = None if source is None else self.base.at(source, progress)
            if source is not None and base is not None:
                weight = values.get(f"weight/{key.partition('/')[2]}")
                ratio = values[key] / (base * self.expected.factor(key, source, progress, weight))
                found[key] = min(2**_OCTAVES, max(2**-_OCTAVES, ratio)) if ratio == ratio else ratio
        if not self._noted and any(key.startswith("update/") for key in values):
            self._note()
        return found

    def watch(self, ratios: Mapping[str, float], *, at: float, moved: bool) -> None:
        """Warns of ratios that have been off for `patience` samples, and of steps that moved no weight; reports a return."""
        self._still = 0 if moved else self._still + 1
        if self._still == self._alarm.patience:
            rank_zero_warn(f"TransferMonitor: no weight has moved in the last {self._still} sampled steps.")
        new, back = self._alarm.see({key: ratio for key, ratio in ratios.items() if not key.startswith("loss/")})
        if back:
            rank_zero_info(f"TransferMonitor: back in the band: {', '.join(map(self.where, back))}.")
        if not new:
            return
        low, high = 1 / self._alarm.band, self._alarm.band
        lines = [
            f"{self.where(key)}: {ratios[key]:.3g} x what was expected from the base. Look first at: "
            f"{self.expected.suspect(key)}."
            for key in new
        ]
        reach = [ratio for key, ratio in ratios.items() if key.startswith("reach/")]
        if len(reach) > 1 and (min(reach) > high or max(reach) < low):
            lines.append(
                "All roles are off to the same side: compare the learning rate, schedule and steps with the base's."
            )
        rank_zero_warn(
            f"TransferMonitor: at {at:.0%} of the run, {self._alarm.patience} samples in a row are outside [{low:.3g}, "
            f"{high:.3g}]:\n  " + "\n  ".join(lines)
        )

    def where(self, key: str) -> str:
        """A key in words: "update of expert_down in layers 3-5 (q2)"."""
        quantity, role, place = key.split("/")
        numbers = self.layers.numbers.get(place)
        if not numbers:
            return f"{quantity} of {role}"
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}"
        return f"{quantity} of {role} in {name} ({place})"

    def _source(self, key: str) -> str | None:
        """The base's curve to compare with."""
        if key.startswith("weight/"):
            return None
        if key not in self._sources:
            roles = COUNTERPARTS.get(key.split("/")[1], ())
            self._sources[key] = self.base.match(key, self.layers.depths, roles)
        return self._sources[key]

    def _note(self) -> None:
        """Reports once which quantities only one of the two runs has."""
        self._noted = True
        used = {_what(source) for source in self._sources.values() if source is not None}
        here = {_what(key) for key in self._sources}
        lacking = sorted({_what(key) for key, source in self._sources.items() if source is None})
        unused = sorted({_what(key) for key in self.base.curves if not key.startswith("weight/")} - used - here)
        if lacking or unused:
            rank_zero_info(
                f"TransferMonitor: not compared, because the base lacks it: {', '.join(lacking) or 'nothing'}; because this "
                f"run lacks it: {', '.join(unused) or 'nothing'}."
            )
        if not used - {"loss train"}:
            rank_zero_warn(
                "TransferMonitor: the base's fingerprint has nothing in common with this run; no ratio is logged."
            )


def octaves(ratio: float) -> float:
    """``|log2 ratio|``; NaN counts as the largest that is logged."""
    return abs(math.log2(ratio)) if ratio == ratio else _OCTAVES


def warn_of_other_base(base: Fingerprint, plan: ScalingPlan) -> None:
    """Warns if the plan's base is not the model that was recorded: the plan's factors are then wrong."""
    if plan.same_size:
        return
    other = [
        f"{axis} {size:g} in the fingerprint, {plan.base_axes[axis]:g} in the plan"
        for axis, size in base.axes.items()
        if plan.base_axes.get(axis, size) != size
    ]
    if other:
        rank_zero_warn(
            f"TransferMonitor: the fingerprint was not recorded at the base that the plan scales from ({', '.join(other)}), "
            "so the ratios mean little. Record the base again, or correct MuECallback's base."
        )


def _what(key: str) -> str:
    quantity, role, _ = key.split("/")
    return f"{quantity} {role}"
