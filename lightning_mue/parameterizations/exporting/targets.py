"""Settings as lines for the names of one code base: which parameters, and what they get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_mue.checks import listed, value_error
from lightning_mue.parameterizations.exporting.layouts import LAYOUTS
from lightning_mue.parameterizations.exporting.settings import NOISE, Setting


@dataclass(frozen=True)
class Line:
    """Parameters of one place, by their names in the target.

    Attributes:
        names: Names, ``*`` for the number of a layer or expert; a layout may have several for one place.
        setting: What they get.
    """

    names: tuple[str, ...]
    setting: Setting


def lines_for(settings: Sequence[Setting], target: str) -> list[Line]:
    """The lines for a target's layout, in the order of its table.

    Raises:
        ValueError: For a place that the layout lacks, or one weight of the target that would need several settings.
    """
    by_place: dict[str, list[Setting]] = {}
    for setting in settings:
        by_place.setdefault(setting.place, []).append(setting)
    layout = LAYOUTS[target]
    reached = {part for places in layout for part in places.split("+")}
    if lost := [place for place in by_place if place not in reached]:
        raise value_error(
            "--to",
            found=f"weights that the models of {target} lack: {listed(lost)}",
            expected="a model that it can build",
            do="Leave them out of the model (e.g. ffn_bias, gated_attention), or export to param-groups.",
        )
    lines: list[Line] = []
    for places, names in layout.items():
        members = [by_place[part] for part in places.split("+") if part in by_place]
        if members:
            lines += [Line(_named(names, setting.layers), setting) for setting in _fused(places, members, target)]
    return lines


def _named(names: Iterable[str], layers: Sequence[int]) -> tuple[str, ...]:
    numbers = [str(layer) for layer in layers] or ["*"]
    found = [name.replace("{l}", number).replace("{e}", "*") for name in names for number in numbers]
    return tuple(dict.fromkeys(found))


def _fused(places: str, members: Sequence[Sequence[Setting]], target: str) -> Sequence[Setting]:
    """The settings of a weight that holds several places, which must be those of each."""
    for others in members[1:]:
        same = len(others) == len(members[0]) and all(map(_equal, members[0], others))
        if not same:
            raise value_error(
                "--to",
                found=f"different settings for {places.replace('+', ', ')}, which are one weight in {target}",
                expected="equal ones",
                do="Export to a code base that keeps them apart.",
            )
    return members[0]


def _equal(a: Setting, b: Setting) -> bool:
    low, high = sorted((a.init.value, b.init.value))
    return high <= NOISE * low and replace(a, place="", init=b.init) == replace(b, place="")
