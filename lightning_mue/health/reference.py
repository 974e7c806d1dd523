"""Healthy runs that another run is compared with.

Shape legend: n samples of one tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lightning_mue.checks import value_error
from lightning_mue.health.departures import Healthy, healthy_of, range_of, unscaled
from lightning_mue.health.indicators import Indicator, indicator_of
from lightning_mue.health.series import Run, Series, find_runs, read_run


class Reference:
    """Healthy runs, such as that of a tuned base, that another run is compared with at the same part of its length.

    Args:
        runs: At least one.
        steps: Optimizer steps of the run that is compared; None: those of the reference itself.
    """

    def __init__(self, runs: Sequence[Run], steps: int | None = None) -> None:
        self._runs = [_stretched(run, steps) for run in runs]
        self._known: dict[str, Healthy | None] = {}

    @classmethod
    def read(cls, folders: Iterable[str | Path], steps: int | None = None, but: Iterable[str | Path] = ()) -> Reference:
        """The runs in some folders, but for those in the folders ``but``, such as that of the run which is compared.

        Raises:
            ValueError: If a folder holds no run, or no run is left.
        """
        left_out = {Path(path).resolve() for path in but}
        found = dict.fromkeys(path.resolve() for folder in folders for path in find_runs(folder, "reference"))
        paths = [path for path in found if path not in left_out]
        if not paths:
            expected, do = "at least one other run", "Give the folders of healthy runs that have ended."
            raise value_error("reference", found="only the run itself", expected=expected, do=do)
        return cls([read_run(path, "reference") for path in paths], steps)

    def of(self, tag: str, indicator: Indicator) -> Healthy | None:
        """The tag in the runs that have it; None if none has."""
        if tag not in self._known:
            series = tuple(run[tag] for run in self._runs if tag in run)
            self._known[tag] = healthy_of(indicator, series) if series else None
        return self._known[tag]

    def band(self, tag: str) -> tuple[Series, Series] | None:
        """(lowest, highest) of an indicator's tag in the runs, smoothed, for a picture; None for another tag."""
        found = indicator_of(tag)
        healthy = None if found is None else self.of(tag, found[0])
        if found is None or healthy is None:
            return None
        steps_n = healthy.series[0].steps
        low_n, high_n = (unscaled(found[0], y_n) for y_n in range_of(found[0], steps_n, healthy.series))
        return Series(steps_n, low_n), Series(steps_n, high_n)


def _stretched(run: Run, steps: int | None) -> dict[str, Series]:
    last = max((int(series.steps[-1]) for series in run.values() if len(series.steps)), default=0)
    scale = 1.0 if steps is None or last == 0 else (steps - 1) / last
    return {
        tag: Series(np.rint(series.steps * scale).astype(np.int64), series.values)
        for tag, series in run.items()
        if len(series.steps)
    }
