"""Names under which the learning rates of a scaled optimizer are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mue.parameterizations.applying.groups import Part


def rate_tags(parts: Sequence[Part], groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Names for the learning rates of `split`'s parts: the role, with the differences between its parts where it has several.

    Returns:
        (tag, index of a part): ``hidden``; ``hidden/sgd`` where kinds differ; ``hidden/group1`` (or the group's ``name``) where
        the user's groups do; ``hidden/x0.25`` where the plan's factors do. They depend on the structure, not on the rates.
    """
    by_role: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for role in part.roles:
            by_role.setdefault(role, []).append(index)
    tags: dict[str, int] = {}
    for role, indexes in by_role.items():
        qualities = [_qualities(parts[index], groups) for index in indexes]
        differ = [len({quality[i] for quality in qualities}) > 1 for i in range(3)]
        for index, quality in zip(indexes, qualities, strict=True):
            tags["/".join([role, *(q for q, shown in zip(quality, differ, strict=True) if shown)])] = index
    return list(tags.items())


def _qualities(part: Part, groups: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    assert part.entry is not None
    name = groups[part.group].get("name")
    return part.entry.kind, str(name) if name else f"group{part.group}", f"x{part.lr:.4g}"
