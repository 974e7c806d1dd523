"""The two models of a verification: base and target on the CPU, the target at sizes near the base's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, build_base, changes

#: How far a size lies from the base's in a verification: far enough that a wrong power of it shows, and cheap.
_RATIOS = (4, 3, 2)
#: Largest model of a verification, in parameters.
_LARGEST = 64_000_000
#: Samples of the batch, and tokens of each: with more tokens than the width, updates add up incoherently.
_SAMPLES, _TOKENS = 2, 16


def two_models(model: nn.Module, base: Base) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any]]:
    """(makes the base, makes the target, the target's overrides); both are made anew, with real weights.

    Where the base is given as overrides, each size that differs becomes up to four times the base's. Numbers of experts keep the
    target's values.

    Raises:
        ValueError: If the models cannot be made, or the target is too large and cannot be shrunk.
    """
    if isinstance(base, Mapping):
        small = {key: value for key, value in base.items() if key not in RUN_KEYS}
        sizes = _near(model, small)
        return lambda: build_base(model, small), lambda: build_base(model, sizes), sizes
    if isinstance(base, nn.Module):
        _require_real(base, "base")
    _require_real(model, "model")
    if (count := sum(p.numel() for p in model.parameters())) > _LARGEST:
        raise value_error(
            "verify",
            found=f"a target of {count:,} parameters, whose base is given as a {type(base).__name__}",
            expected="a target that can be built at a smaller size",
            do="Give the base as overrides of the module's hyperparameters, e.g. base: {width: 64}.",
        )
    return (
        lambda: _copy(base) if isinstance(base, nn.Module) else build_base(model, base),
        lambda: _copy(model),
        {},
    )


def _copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in at least single precision, without the trainer that LightningModules refer to."""
    holders = [child for child in model.modules() if vars(child).get("_trainer") is not None]
    trainers = [vars(child).pop("_trainer") for child in holders]
    try:
        for child in holders:
            vars(child)["_trainer"] = None
        copied = copy.deepcopy(model).cpu()
    finally:
        for child, trainer in zip(holders, trainers, strict=True):
            vars(child)["_trainer"] = trainer
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in copied.parameters())
    return copied.float() if low else copied


def _require_real(model: nn.Module, key: str) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise value_error(
            "verify", found=f"a {key} on the meta device", expected="weights, or a base given as overrides"
        )


def _near(model: nn.Module, small: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that make the target near the base, the farthest that can be built and is small enough."""
    smallest = sum(p.numel() for p in build_base(model, small, device="meta").parameters())
    error: Exception | None = None
    for sizes in _candidates(changes(model, small)):
        try:
            made = build_base(model, sizes, device="meta")
            if max(smallest, sum(p.numel() for p in made.parameters())) <= _LARGEST:
                return sizes
        except Exception as caught:  # a size that the module refuses, e.g. a width that its heads do not divide
            error = caught
    raise value_error(
        "verify",
        found=f"no target near the base {dict(small)} that can be built with at most {_LARGEST:,} parameters"
        + (f" ({error})" if error else ""),
        expected="base and target that can be built at such sizes",
        do="Verify with a smaller base, or without: verify=False.",
    )


def _candidates(changed: list[tuple[str, Any, Any]]) -> Iterator[dict[str, Any]]:
    for ratio in _RATIOS:
        yield {path: _scaled(path.rpartition(".")[2], own, value, ratio) for path, own, value in changed}
    yield {}


def _scaled(key: str, target: Any, base: Any, ratio: int) -> Any:
    """A size ``ratio`` times the base's, in the target's direction; what is no size that grows keeps the target's value."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in (target, base))
    if not numbers or target == base or base <= 0 or "expert" in key or "top_k" in key or "topk" in key:
        return target
    return base * ratio if target > base else max(1, base // ratio)


def small_batches(batch: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The batch on the CPU, cut to few samples and tokens; then cut less, for models that do not take it.

    Floating-point entries get the weights' dtype: a precision plugin may have cast the batch for the run's.
    """
    for cut in (lambda leaf: _cut(leaf, _TOKENS), lambda leaf: _cut(leaf, None), lambda leaf: leaf):
        yield apply_to_collection(batch, torch.Tensor, lambda leaf, cut=cut: cut(_plain(leaf, dtype)))


def _plain(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return leaf.detach().to("cpu", dtype if leaf.is_floating_point() else None)


def _cut(leaf: torch.Tensor, tokens: int | None) -> torch.Tensor:
    if leaf.ndim == 0:
        return leaf
    leaf = leaf[:_SAMPLES]
    return leaf[:, :tokens] if leaf.ndim == 2 and not leaf.is_floating_point() else leaf
