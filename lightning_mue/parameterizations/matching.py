"""Finds, for what the target has, its counterpart in the base: by path, at the same relative depth, else by role."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from lightning_mue.parameterizations.modules import ParameterInfo, split_layer
from lightning_mue.parameterizations.roles import Role

#: Where a role may take its base values from if the base has none of its own, best first.
_RELATED: Mapping[Role, Sequence[Role]] = {
    Role.EXPERT_UP: (Role.FFN_UP, Role.SHARED_UP),
    Role.EXPERT_DOWN: (Role.FFN_DOWN, Role.SHARED_DOWN),
    Role.SHARED_UP: (Role.FFN_UP, Role.EXPERT_UP),
    Role.SHARED_DOWN: (Role.FFN_DOWN, Role.EXPERT_DOWN),
    Role.FFN_UP: (Role.EXPERT_UP, Role.SHARED_UP),
    Role.FFN_DOWN: (Role.EXPERT_DOWN, Role.SHARED_DOWN),
}


def _nearest(layers: Sequence[int], wanted: int) -> int:
    """The nearest of some sorted layers; of two, the lower."""
    i = bisect_left(layers, wanted)
    return min(layers[max(0, i - 1) : i + 1], key=lambda layer: (abs(layer - wanted), layer))


class BaseIndex:
    """Finds, for a parameter or module name of the target, its counterpart in the base.

    Layers are matched by relative position: layer i of L is matched with layer ``i * L_base // L``.
    """

    def __init__(
        self, names: Iterable[str], target_names: Iterable[str], base_names: Iterable[str] | None = None
    ) -> None:
        """Indexes ``names``; ``base_names`` are all of the base's, by which its depth is counted (default: the same)."""
        names = set(names)
        self.by_template: dict[str, list[int]] = {}
        for name in names:
            template, layer = split_layer(name)
            self.by_template.setdefault(template, []).append(layer)
        for layers in self.by_template.values():
            layers.sort()
        self.base_depth = self._depths(names if base_names is None else base_names)
        self.depth = self._depths(target_names)

    @staticmethod
    def _depths(names: Iterable[str]) -> dict[str, int]:
        depths: dict[str, int] = {}
        for name in names:
            template, layer = split_layer(name)
            prefix = template.split("*")[0]
            depths[prefix] = max(depths.get(prefix, 0), layer + 1)
        return depths

    def layer(self, name: str) -> int:
        """The base layer at the relative position of a target name (-1 outside the layers)."""
        template, layer = split_layer(name)
        prefix = template.split("*")[0]
        if layer < 0 or prefix not in self.base_depth:
            return layer
        return layer * self.base_depth[prefix] // self.depth[prefix]

    def match(self, name: str) -> str | None:
        """The base's name for a target name: same path, at the nearest layer that has it."""
        template, _ = split_layer(name)
        layers = self.by_template.get(template)
        if not layers:
            return None
        nearest = _nearest(layers, self.layer(name))
        return template.replace("*", str(nearest), 1) if nearest >= 0 else template


def match_parameters(target: list[ParameterInfo], base: list[ParameterInfo]) -> dict[str, ParameterInfo]:
    """Maps target names to base parameters, by path, else by role (an expert's up matrix comes from the FFN's).

    A parameter without a counterpart (the router of an MoE whose base is dense) is left out.
    """
    by_name = {info.name: info for info in base}
    by_role = _RoleIndex(base)
    index = BaseIndex(by_name, [info.name for info in target])
    matched: dict[str, ParameterInfo] = {}
    for info in target:
        name = index.match(info.name)
        old = by_name[name] if name is not None else None
        if old is None or (info.role is not None and old.role is not None and old.role is not info.role):
            old = by_role.match(info, index.layer(info.name)) or (old if old and old.role is None else None)
        if old is not None:
            matched[info.name] = old
    return matched


class _RoleIndex:
    """Parameters of the base by role, and by role and last part of the name, layer by layer."""

    def __init__(self, base: Iterable[ParameterInfo]) -> None:
        self._found: dict[tuple[Role | None, str | None], dict[int, ParameterInfo]] = {}
        for info in sorted(base, key=lambda info: (info.position[1], info.name)):
            for leaf in (self._leaf(info), None):
                self._found.setdefault((info.role, leaf), {}).setdefault(info.position[1], info)

    @staticmethod
    def _leaf(info: ParameterInfo) -> str:
        return info.name.rpartition(".")[2]

    def match(self, info: ParameterInfo, layer: int) -> ParameterInfo | None:
        """The parameter of the same role, else of a related one, that is nearest to a layer."""
        if info.role is None:
            return None
        for role in (info.role, *_RELATED.get(info.role, ())):
            found = self._found.get((role, self._leaf(info))) or self._found.get((role, None))
            if found:
                return found[_nearest(list(found), layer)]  # in order of layers, as they were put in
        return None
