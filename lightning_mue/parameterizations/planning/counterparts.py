"""Finds the base's counterpart of a parameter or multiplier of the target: by path at the same relative depth, else by role."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from lightning_mue.names import all_indices, split_layer
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.rules.roles import Role

#: Roles from which a role takes its base values if the base has no parameter of that role, best first.
RELATED: Mapping[Role, Sequence[Role]] = {
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
    """Maps target names to base parameters: by path, else by path without any index, else by role.

    By role, an expert's up matrix is matched with the FFN's. A bias whose path the base lacks is matched with the bias of its
    layer's matrix. A parameter without a counterpart (the router of an MoE whose base is dense) is left out.
    """
    by_name, by_path = {info.name: info for info in base}, _PathIndex(base)
    by_role = _RoleIndex(base)
    index = BaseIndex(by_name, [info.name for info in target])
    ends = _match_ends(target, base)
    matched: dict[str, ParameterInfo] = {}
    for info in target:
        name = ends.get(info.name) or index.match(info.name)
        old = by_name[name] if name is not None else by_path.match(info)
        if old is None or (info.role is not None and old.role is not None and old.role is not info.role):
            old = by_role.match(info, index.layer(info.name)) or (old if old and old.role is None else None)
        if old is not None:
            matched[info.name] = old
    for info in target:
        if info.name not in matched and info.role is Role.BIAS:
            weight = matched.get(f"{info.path}.weight")
            old = by_name.get(f"{weight.path}.bias") if weight is not None else None
            if old is not None:
                matched[info.name] = old
    return matched


def _match_ends(target: list[ParameterInfo], base: list[ParameterInfo]) -> dict[str, str]:
    """Matches stacks of unequal layers (the linear layers of an MLP in a Sequential): first with first, last with last.

    Layers in between are matched by relative position; stacks of equal length are left out, to be matched by index.
    """
    matched: dict[str, str] = {}
    theirs = _stacks(base)
    for stack, layers in _stacks(target).items():
        names, old = [info.name for info in layers.values()], list(theirs.get(stack, {}).values())
        n, m = len(names), len(old)
        if n == m or len({info.shape for info in old}) < 2:
            continue
        matched[names[-1]] = old[-1].name
        matched[names[0]] = old[0].name  # also where it is the only one
        if m > 2:
            matched |= {names[i]: old[1 + (i - 1) * (m - 2) // (n - 2)].name for i in range(1, n - 1)}
    return matched


def _stacks(infos: Iterable[ParameterInfo]) -> dict[tuple[str, str, int], dict[int, ParameterInfo]]:
    """Parameters directly under a layer index, by (name, form, number of dimensions), in order."""
    found: dict[tuple[str, str, int], dict[int, ParameterInfo]] = {}
    for info in infos:
        template, layer = info.position
        if layer >= 0 and template.rpartition(".")[0].endswith("*"):
            found.setdefault((template, info.form, len(info.shape)), {})[layer] = info
    return {key: dict(sorted(layers.items())) for key, layers in found.items()}


class _PathIndex:
    """Parameters of the base by path without any index: for inner stacks and lists of experts that are longer than the base's."""

    def __init__(self, base: Iterable[ParameterInfo]) -> None:
        self._found: dict[str, list[ParameterInfo]] = {}
        for info in base:
            self._found.setdefault(all_indices(info.name), []).append(info)

    def match(self, info: ParameterInfo) -> ParameterInfo | None:
        """The one of the nearest indices."""
        found = self._found.get(all_indices(info.name), [])
        numbers = _numbers(info.name)
        return min(
            found, key=lambda old: [abs(a - b) for a, b in zip(numbers, _numbers(old.name), strict=True)], default=None
        )


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


class _RoleIndex:
    """Matrices of the base by role, and by role and last part of the name, layer by layer."""

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
        if info.role is None or info.role is Role.BIAS:
            return None
        for role in (info.role, *RELATED.get(info.role, ())):
            found = self._found.get((role, self._leaf(info))) or self._found.get((role, None))
            if found:
                return found[_nearest(list(found), layer)]  # sorted by layer
        return None
