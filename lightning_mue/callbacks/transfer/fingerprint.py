"""Fingerprint: the curves of a tuned base run against training progress, as a small JSON file.

A curve's key is ``<quantity>/<role>/<place>``, e.g. ``"update/ffn_down/q2"``. Places are quartiles of the relative depth,
``"q1"`` (first layers) to ``"q4"``, or ``"outside"`` for what is in no layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_mue.checks import (
    brief,
    require_choice,
    require_finite,
    require_non_negative,
    require_positive,
    require_types,
    value_error,
)
from lightning_mue.files import whole_file

#: Version of the file format; a change of meaning gets a new number.
SCHEMA = 1
_KIND = "lightning_mue.fingerprint"
_DIGITS = 4


@dataclass(frozen=True)
class Fingerprint:
    """The measured curves of a base run, to compare a larger run with.

    Attributes:
        steps: Optimizer steps of the whole run.
        progress: Fractions of the run, in (0, 1], ascending: (t + 1) / steps for a point taken at the zero-based step t.
        curves: Key -> one value a point; None where there was nothing to measure.
        depths: Place -> mean relative depth of its layers, in (0, 1).
        classes: Kind of logits -> how many there are (experts, vocabulary): Z-values depend on it.
        rule: Rule in force in the base run, with its optimizer family; empty if none was.
        axes: Sizes of the base.
    """

    steps: int
    progress: list[float]
    curves: dict[str, list[float | None]]
    depths: dict[str, float] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    rule: str = ""
    axes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_points(cls, steps: int, points: Mapping[int, Mapping[str, float]], **about: Any) -> Fingerprint:
        """Makes a fingerprint from step -> key -> value; ``about`` holds its further attributes."""
        order = sorted(points)
        keys = sorted({key for point in points.values() for key in point})
        curves = {key: [_rounded(points[step].get(key)) for step in order] for key in keys}
        return cls(steps, [float(f"{(step + 1) / steps:.9g}") for step in order], curves, **about)

    def at(self, key: str, progress: float) -> float | None:
        """A curve's value at a fraction of the run.

        The points are single steps, so each but the first and the last counts as the median of itself and its neighbours.
        Between two points the value is linear in the progress, as most warm-ups and decays of a learning rate are.

        Returns:
            The value; None before the first point, after the last one, and where the base's value is zero or was not
            measured.
        """
        points = self._smooth(key)
        if not points or not points[0][0] * (1 - 1e-9) <= progress <= points[-1][0] * (1 + 1e-9):
            return None
        after = next((i for i, (x, _) in enumerate(points) if x >= progress), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(0, after - 1)], points[after]
        share = 1.0 if x0 == x1 else (progress - x0) / (x1 - x0)
        return y0 * (1 - share) + y1 * share

    def _smooth(self, key: str) -> list[tuple[float, float]]:
        points = [(x, y) for x, y in zip(self.progress, self.curves.get(key, ()), strict=False) if y]
        inner = [
            (x, sorted((a, y, b))[1]) for (_, a), (x, y), (_, b) in zip(points, points[1:], points[2:], strict=False)
        ]
        return [*points[:1], *inner, *points[1:][-1:]]

    def first(self, key: str) -> float | None:
        """The first measured value of a curve."""
        return next((value for value in self.curves.get(key, ()) if value is not None), None)

    def match(self, key: str, depths: Mapping[str, float], roles: tuple[str, ...] = ()) -> str | None:
        """The curve to compare another run's curve with: of the same quantity and role, nearest in relative depth.

        Args:
            key: The other run's key.
            depths: Its place -> relative depth.
            roles: Roles to take instead of the key's own where the base has none of that role, in order.
        """
        quantity, role, place = key.split("/")
        for candidate in (role, *roles):
            own = [k for k in self.curves if k.startswith(f"{quantity}/{candidate}/")]
            here = [k for k in own if (k.rpartition("/")[2] in self.depths) == (place in depths)]
            if here and place in depths:
                return min(here, key=lambda k: abs(self.depths[k.rpartition("/")[2]] - depths[place]))
            if here:
                return here[0]
        return None

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, atomically: a reader sees the old file or the whole new one."""
        text = json.dumps({"kind": _KIND, "schema": SCHEMA, **asdict(self)}, separators=(",", ":"), allow_nan=False)
        with whole_file(path) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is missing, unreadable, no fingerprint or of another schema.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise _unreadable(path, "which does not exist") from None
        except (OSError, ValueError) as error:
            raise _unreadable(path, f"which cannot be read as a fingerprint ({error})") from error
        if not isinstance(plain, dict) or plain.pop("kind", None) != _KIND:
            raise _unreadable(path, "which is JSON, but no fingerprint")
        if (schema := plain.pop("schema", None)) != SCHEMA:
            expected = f"one of schema {SCHEMA}, which this version of lightning_mue reads"
            raise _unreadable(path, f"of schema {schema!r}", expected)
        return _checked(plain, path)


def _unreadable(path: str | Path, what: str, expected: str = "the fingerprint of a base run") -> ValueError:
    again = "Record one with this version's TransferMonitor(record=...) in the base run."
    return value_error("compare", found=f"{str(path)!r}, {what}", expected=expected, do=again)


def _checked(plain: dict[str, Any], path: str | Path) -> Fingerprint:
    missing = {f.name for f in fields(Fingerprint)} ^ set(plain)
    if missing:
        raise _unreadable(path, f"which lacks or has too many of the entries {sorted(missing)}")
    found = Fingerprint(**plain)
    try:
        require_types(Fingerprint.__init__, plain)
        require_positive(steps=found.steps, **found.classes)
        values = [value for curve in found.curves.values() for value in curve if value is not None]
        require_finite(**{f"value {i}": x for i, x in enumerate((*values, *found.progress, *found.depths.values()))})
        require_non_negative(**found.axes)
        lengths = {len(curve) for curve in found.curves.values()}
        for key in found.curves:
            _, _, place = key.split("/")
            require_choice("place", place, {*found.depths, "outside"})
    except (TypeError, ValueError) as error:
        raise _unreadable(path, f"which is damaged ({brief(error)})") from error
    if not found.progress or lengths != {len(found.progress)} or found.progress != sorted(found.progress):
        what = f"whose curves have {sorted(lengths)} points for {len(found.progress)} values of progress"
        raise _unreadable(path, what, "one point for each of the ascending values of progress")
    return found


def sampled_steps(steps: int, points: int) -> set[int]:
    """About ``points`` zero-based steps of a run, with the first and the last: half at equal ratios, half evenly."""
    half = max(1, points // 2)
    ratios = (steps ** (i / max(1, half - 1)) for i in range(half))
    even = (1 + (steps - 1) * i / max(1, half - 1) for i in range(half))
    return {min(steps, max(1, round(x))) - 1 for x in (*ratios, *even, 1, steps)}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")
