"""Alarm: distinguishes a sustained deviation from a single bad sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Alarm:
    """Raised for a ratio that stays outside ``[1 / band, band]``, once until it comes back.

    Args:
        band: Above 1.
        patience: Samples in a row outside the band that raise the alarm.
    """

    def __init__(self, band: float, patience: int) -> None:
        self.band, self.patience = band, patience
        self._streaks: Counter[str] = Counter()
        self._raised: set[str] = set()

    def see(self, ratios: Mapping[str, float]) -> tuple[list[str], list[str]]:
        """Takes one sample.

        Args:
            ratios: Key -> ratio; NaN is outside. A key that is absent keeps its state.

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
