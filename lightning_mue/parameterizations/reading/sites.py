"""Forward multipliers of a module tree: plain floats that modules declare (``mue_multipliers``) or that patterns name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_mue.checks import listed, value_error
from lightning_mue.contract import branch_sizes, declared_multipliers
from lightning_mue.names import clean_name


@dataclass(frozen=True)
class Site:
    """One forward multiplier: an attribute of a module that is a plain number.

    Attributes:
        path: Dotted path of the attribute.
        kind: ``residual``, ``attention``, ``ffn``, ``route`` or ``output``.
        value: Its value.
        kinds: All kinds that the same module exposes: a dense FFN and an MoE differ in them.
        branch: Sizes of the module, where it is an FFN or MoE branch.
    """

    path: str
    kind: str
    value: float
    kinds: tuple[str, ...]
    branch: Mapping[str, float] | None = None


def sites(module: nn.Module, patterns: Mapping[str, str] | None = None) -> Iterator[Site]:
    """Yields the forward multipliers of a module tree: those declared by ``mue_multipliers``, then those that patterns name.

    Raises:
        ValueError: For a pattern (kind -> regular expression on dotted attribute paths) that matches no number.
    """
    for name, child in module.named_modules():
        if hasattr(child, "_orig_mod"):
            continue  # torch.compile's wrapper shows the attributes of the module inside it, which comes next
        declared = declared_multipliers(child)
        sizes = branch_sizes(child) if declared else None
        for kind, attribute in declared.items():
            path = f"{clean_name(name)}.{attribute}".lstrip(".")
            yield Site(path, kind, float(getattr(child, attribute)), tuple(sorted(declared)), sizes)
    numbers = float_attributes(module) if patterns else {}
    for kind, pattern in (patterns or {}).items():
        found = [path for path in numbers if re.search(pattern, path)]
        if not found:
            raise value_error(
                f"multipliers.{kind}",
                found=f"the pattern {pattern!r}, which matches no attribute that is a float",
                expected=f"a pattern on one of {listed(numbers)}",
            )
        yield from (Site(path, kind, numbers[path], (kind,)) for path in found)


def float_attributes(module: nn.Module) -> dict[str, float]:
    """Dotted path -> value of every public attribute that is a float."""
    return {
        f"{clean_name(name)}.{attribute}".lstrip("."): value
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, float) and not attribute.startswith("_")
    }


def read_multipliers(module: nn.Module) -> dict[str, float]:
    """The values of all declared multipliers by dotted path, e.g. to go into a checkpoint."""
    return {site.path: site.value for site in sites(module)}
