"""Measures how an optimizer updates: on a copy of it that holds small matrices instead of the model's parameters.

A name says little ("AdaBelief", "SGDP", "DAdaptAdam"), and a table is right for an optimizer only if its update depends on the
learning rate, on the gradient's and the weights' scale and on the matrix's size as the table's own does.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.rules.kinds import Family

#: Steps of each of a probe's three parts: the first is the warm-up (RAdam's first steps are those of a momentum), the second and
#: the third are compared. Lookahead's cycle of 5 fits in.
_PART = 10
_LR = 1e-3
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
#: Relative difference below which two sizes of an update are equal.
_TOLERANCE = 0.05
#: How much an update may change by itself from one part to the next: a momentum starts at 0, RAdam's rectification grows.
_GROWTH = (0.85, 3.0)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the updates: the innermost one that a wrapper (SAM, Lookahead, schedule-free) holds.

    Raises:
        ValueError: If a wrapper holds several.
    """
    held: dict[int, Optimizer] = {}
    for value in vars(optimizer).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        held.update({id(one): one for one in inside if isinstance(one, Optimizer) and one is not optimizer})
    if len(held) > 1:
        raise value_error(
            "optimizer",
            found=f"{type(optimizer).__name__}, which holds {len(held)} optimizers",
            expected="an optimizer, or a wrapper of one",
            do="Return those inside from configure_optimizers, as a list, and step each in training_step (manual optimization).",
        )
    return inner_optimizer(next(iter(held.values()))) if held else optimizer


def measured_family(optimizer: Optimizer) -> tuple[Family | None, str]:
    """The family by what the update depends on, and what speaks against both.

    Returns:
        ``"adam"`` if the update of a matrix is linear in the learning rate and depends neither on the scale of the gradient, nor
        on that of the weights, nor (entrywise) on the size of the matrix; ``"sgd"`` if it is linear in the gradient's scale too;
        else None, with the reason. None also where a factor on the rate of a wrapper's inner optimizer is not one on the update.
    """
    return _tried(optimizer, _judge)


def rate_counts(optimizer: Optimizer) -> tuple[bool, str]:
    """Whether a factor on the rate of the (inner) optimizer is one on the update, and what speaks against it."""

    def judge(one: Optimizer) -> tuple[Family | None, str]:
        linear = _is(_moved(one, rate=3.0)[2] / _moved(one)[2], 3.0)
        return ("sgd" if linear else None), _NOT_LINEAR

    right, why = _tried(optimizer, judge)
    return right is not None, why


_NOT_LINEAR = "whose update is not proportional to the learning rate of its groups"


def _tried(optimizer: Optimizer, judge: Callable[[Optimizer], tuple[Family | None, str]]) -> tuple[Family | None, str]:
    groups = inner_optimizer(optimizer).param_groups
    if not all(isinstance(group.get("lr"), (Real, Tensor)) for group in groups):
        return None, "which has no learning rate in its groups that could be scaled"
    gpus = {p.device for group in groups for p in group["params"] if p.is_cuda}
    state = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(gpus), torch.enable_grad():
            warnings.simplefilter("ignore")
            random.seed(0), torch.default_generator.manual_seed(0)  # all ranks judge alike
            with torch.compiler.set_stance("force_eager"):  # eight-bit optimizers compile their update
                return judge(optimizer)
    except Exception as error:  # a foreign optimizer may raise anything; the message quotes it
        return None, f"whose update could not be tried on small matrices ({type(error).__name__}: {error})"
    finally:
        random.setstate(state)


def _judge(optimizer: Optimizer) -> tuple[Family | None, str]:
    stored: list[list[dict[str, Any]]] = []
    start, before, moved = _moved(optimizer, stored=stored)
    if not bool((moved > 0).all() and moved.isfinite().all()):
        return None, "whose update of a small matrix is 0 or not finite"
    growth = moved / before
    if not bool(((growth >= _GROWTH[0]) & (growth <= _GROWTH[1])).all()):
        changes = f"(x {float(growth[0]):.3g} in {_PART} steps)"
        return None, f"whose update changes by itself, at a constant rate and gradient {changes}"
    if not _is(_moved(optimizer, rate=3.0, stored=stored)[2] / moved, 3.0):
        return None, _NOT_LINEAR
    if kept := _noted(*stored):
        return None, f"which keeps {kept!r}, which follows from the learning rate, in its parameter groups"
    first, _, heavy = _moved(optimizer, weights=32.0)
    if not (_is(heavy / moved, 1.0) and _is((first + moved) / (start + moved), 1.0)):
        return None, (
            "whose update depends on the size of the weights (a trust ratio, a rate relative to them, or a decay that is not in "
            "its groups)"
        )
    if not _is(_moved(optimizer, eps=0.1)[2] / moved, 1.0):
        return None, "whose update depends on its eps, which is more than a guard against a division by 0"
    if not _is(_moved(optimizer, others=256.0)[2] / moved, 1.0):
        return None, "whose update of a matrix depends on the gradients of the others"
    linear, size = _moved(optimizer, gradients=256.0)[2] / moved, _moved(optimizer, side=32)[2] / moved
    if not (_is(linear, 256.0) or _is(linear, 1.0)):
        return None, "whose update is neither linear in the gradient (SGD) nor independent of its scale (Adam)"
    if not _is(size, 1.0):
        return (
            None,
            "whose update depends on the size of the matrix (it is orthogonalized, preconditioned or normalized)",
        )
    return ("sgd" if _is(linear, 256.0) else "adam"), ""


def _is(values: Tensor, expected: float) -> bool:
    return bool(((values / expected - 1).abs() < _TOLERANCE).all())


def _moved(
    optimizer: Optimizer,
    *,
    rate: float = 1.0,
    gradients: float = 1.0,
    others: float = 1.0,
    weights: float = 1.0,
    side: int = 8,
    eps: float = 1.0,
    stored: list[list[dict[str, Any]]] | None = None,
) -> tuple[Tensor, ...]:
    """RMS of the way that each group's first matrix [side, side] goes in each of the three parts of the steps.

    The gradient is of rank one, always in the same direction: a preconditioner or an orthogonalization then changes its size.
    That of the second matrix of each group is ``others`` times as large. The groups at the end are added to ``stored``.
    """
    clone, probes = _with_probes(optimizer, weights, side, eps)
    if callable(train := getattr(clone, "train", None)):
        train()  # a schedule-free one
    sign = torch.where(torch.arange(side, device="cpu") % 3 == 0, -1.0, 1.0)
    direction = gradients * torch.outer(sign, sign.flip(0))
    sizes = 0.75 + 0.5 * torch.rand(3 * _PART, generator=torch.Generator().manual_seed(1), device="cpu")
    places = [[first.detach().cpu().float().clone() for first, *_ in probes]]
    with _scaled(inner_optimizer(clone), rate):
        for step, size in enumerate(sizes.tolist(), 1):
            sized = size * direction
            _step(clone, [(p, others * sized if place else sized) for pair in probes for place, p in enumerate(pair)])
            if step % _PART == 0:
                places.append([first.detach().cpu().float().clone() for first, *_ in probes])
    if stored is not None:
        stored.append(inner_optimizer(clone).param_groups)
    return tuple(
        torch.stack([(b - a).square().mean().sqrt() for a, b in zip(*ends, strict=True)]) for ends in pairwise(places)
    )


def _with_probes(optimizer: Optimizer, weights: float, side: int, eps: float) -> tuple[Optimizer, list[Any]]:
    """(a copy of an optimizer that holds small matrices, those of each group that holds any parameters: one or two)."""
    groups = inner_optimizer(optimizer).param_groups
    start = weights * torch.randn(side, side, generator=torch.Generator().manual_seed(0), device="cpu")
    replaced, probes = {}, []
    for group in (group for group in groups if group["params"]):
        first = next((p for p in group["params"] if not p.is_meta), start)
        pair = [torch.nn.Parameter(start.clone().to(first.device)) for _ in group["params"][:2]]
        replaced.update({id(p): pair[min(place, 1)] for place, p in enumerate(group["params"])})
        probes.append(pair)
    clone = _clone(optimizer, replaced, {})
    for group in inner_optimizer(clone).param_groups:
        if isinstance(group.get("eps"), float):
            group["eps"] *= eps
    return clone, probes


def _noted(groups: list[dict[str, Any]], at_other_rate: list[dict[str, Any]]) -> str | None:
    """The name of a number that an optimizer stores in a group and that another rate changes; ScaledStep cannot keep it."""
    for one, other in zip(groups, at_other_rate, strict=True):
        for key, value in one.items():
            if key not in ("lr", "initial_lr") and isinstance(value, (Real, Tensor)) and bool(value != other[key]):
                return key
    return None


def _step(optimizer: Optimizer, gradients: list[tuple[torch.nn.Parameter, Tensor]]) -> None:
    def closure() -> Tensor:
        for probe, gradient in gradients:
            probe.grad = gradient.to(probe.device, copy=True)
        return torch.ones((), requires_grad=True)

    closure()
    try:
        optimizer.step()
    except Exception:  # one that looks at two points asks for a closure, in its own words
        optimizer.step(closure)  # type: ignore[arg-type]


@contextlib.contextmanager
def _scaled(target: Optimizer, factor: float) -> Iterator[None]:
    """Swaps groups with a factor on their rate into an optimizer while it updates, as `ScaledStep` does."""
    own: list[Any] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if own:
            return  # a step that calls super().step(): the hooks of both run
        own[:] = [optimizer.param_groups]
        optimizer.param_groups = [{**group, "lr": group["lr"] * factor} for group in own[0]]

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not own:
            return
        for group, scaled in zip(own[0], optimizer.param_groups, strict=True):
            group.update({key: value for key, value in scaled.items() if key != "lr"})
        optimizer.param_groups = own.pop()

    handles = [target.register_step_pre_hook(before), target.register_step_post_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def _clone(optimizer: Optimizer, replaced: Mapping[int, Any], memo: dict[int, Any]) -> Optimizer:
    """A copy of an optimizer, and of those inside, without hooks, that holds other parameters, one a group."""
    clone: Optimizer = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = clone
    own = vars(optimizer)
    for value in own.values():
        if isinstance(value, Optimizer) and id(value) not in memo:
            _clone(value, replaced, memo)  # first, so that what both hold is shared again
    for name, value in own.items():
        if name in _HOOKS:
            vars(clone)[name] = OrderedDict()
        elif name == "param_groups":
            vars(clone)[name] = memo.setdefault(id(value), [_group(group, replaced, memo) for group in value])
        elif name == "state":
            vars(clone)[name] = memo.setdefault(id(value), _state(value, replaced))
        elif name != "step":  # a scheduler has replaced the method by its own
            vars(clone)[name] = _copied(value, replaced, memo)
    if "differentiable" in vars(clone).get("defaults", {}):
        clone.defaults["differentiable"] = False
    return clone


def _copied(value: Any, replaced: Mapping[int, Any], memo: Mapping[int, Any]) -> Any:
    """A copy of tensors and containers; other objects (a model, a logger) are shared."""
    if id(value) in replaced or id(value) in memo:
        return replaced.get(id(value), memo.get(id(value)))
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple, set):
        return type(value)(_copied(one, replaced, memo) for one in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.clear()
        copied.update({_copied(key, replaced, memo): _copied(one, replaced, memo) for key, one in value.items()})
        return copied
    return value


def _group(group: dict[str, Any], replaced: Mapping[int, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """A group with one or two small matrices, at a fixed rate (a warm-up starts at 0) and without decay."""
    if id(group) not in memo:
        copied = {key: _copied(value, replaced, memo) for key, value in group.items() if key != "params"}
        copied.update({key: 0.0 for key in copied if "weight_decay" in key and isinstance(copied[key], float)})
        lr, names = group.get("lr"), copied.get("param_names")
        copied["lr"] = torch.full_like(lr, _LR, device="cpu" if lr.is_meta else None) if isinstance(lr, Tensor) else _LR
        copied["params"] = [replaced[id(p)] for p in list(group["params"])[:2]]
        if names:
            copied["param_names"] = names[:2]
        # The matrices are leaves, and on the CPU where the parameters are on meta.
        on_cpu = all(p.device.type == "cpu" for p in copied["params"])
        copied.update({key: False for key in ("differentiable", *(["capturable"] if on_cpu else [])) if key in copied})
        memo[id(group)] = copied
    return memo[id(group)]


def _state(state: Mapping[Any, Any], replaced: Mapping[int, Any]) -> Any:
    """The state that a constructor has made: copies of the weights (Lookahead's slow ones) become those of the matrices."""
    fresh: Any = defaultdict(dict)
    for parameter, entries in state.items():
        if (probe := replaced.get(id(parameter))) is None:
            continue
        for key, value in entries.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
                fresh[probe][key] = copy.deepcopy(value)
            elif not parameter.is_meta and torch.equal(value, parameter) and bool(value.any()):
                fresh[probe][key] = probe.detach().clone()
            else:
                fresh[probe][key] = torch.zeros_like(probe)
    return fresh
