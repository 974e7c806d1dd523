"""Sizes of a run that are given relative to the model: ``tokens: 50 per parameter``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.rules.roles import Role

_PER_PARAMETER = re.compile(r"\s*([0-9.eE+]+)\s+(?:tokens\s+)?per\s+parameter\s*")
_EXPERTS = (Role.EXPERT_UP, Role.EXPERT_DOWN)


def active_parameters(infos: Iterable[ParameterInfo]) -> float:
    """Parameters that one token passes through: all of them, of routed experts the active share top_k / n_experts.

    Embedding and unembedding count (once where they are tied), so that a dense model's number is that of its parameters.
    """
    return sum(math.prod(info.shape) * _share(info) for info in infos)


def _share(info: ParameterInfo) -> float:
    routed = info.role in _EXPERTS or (info.role is Role.BIAS and "expert" in info.name and "shared" not in info.name)
    return info.branch["a"] / info.branch["E"] if routed and info.branch else 1.0


def resolve_run(run: Mapping[str, Any], infos: Iterable[ParameterInfo], where: str = "") -> dict[str, Any]:
    """The run's sizes as numbers: ``"N per parameter"`` is N times `active_parameters`; None stays.

    Args:
        run: ``tokens`` and ``batch_tokens``, as given.
        infos: The parameters of the model whose run it is, with their roles.
        where: What stands before the key in messages, e.g. ``base.``.

    Raises:
        ValueError: For another text, or text for ``batch_tokens``.
    """
    return {key: _resolve(key, value, infos, where) for key, value in run.items()}


def _resolve(key: str, value: Any, infos: Iterable[ParameterInfo], where: str) -> Any:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\s*[0-9.]+[eE][+-]?[0-9]+\s*", value):  # YAML reads 4e9 as text
        return float(value)
    match = _PER_PARAMETER.fullmatch(value) if key == "tokens" else None
    try:
        each = float(match[1]) if match else math.nan
    except ValueError:
        each = math.nan
    if not 0 < each < math.inf:
        expected = "a number" + (" or 'N per parameter' with a positive number N" if key == "tokens" else "")
        do = "For example 4e9 or '50 per parameter'." if key == "tokens" else "For example 65536."
        raise value_error(f"{where}{key}", found=repr(value), expected=expected, do=do)
    return each * active_parameters(infos)
