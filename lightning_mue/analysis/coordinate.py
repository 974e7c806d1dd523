"""Coordinate check: does every layer's update keep its size when the model grows?

A few steps are trained at each size; a parameterization is sound if what each layer's update does to the layer's output does
not grow or shrink with the size (theory.md section 7; Yang et al., arXiv:2203.03466, appendix D.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mue.analysis.check import CoordinateCheck
from lightning_mue.analysis.probe import is_numbered_layer
from lightning_mue.analysis.training import Loss, OptimizerFactory, ShortTraining
from lightning_mue.contract import declared_axes
from lightning_mue.names import clean_name
from lightning_mue.parameterizations import Parameterization, get_rule
from lightning_mue.parameterizations.reading.base import build_base


def coordinate_check(
    make_model: Callable[..., nn.Module],
    sizes: Sequence[Mapping[str, Any]],
    batches: Iterable[Any],
    *,
    rule: str | Parameterization = "complete-mue",
    base: Mapping[str, Any] | nn.Module | str | Path | None = None,
    axis: str | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    lr: float | None = None,
    lr_factor: float = 1.0,
    steps: int = 5,
    seeds: int | Sequence[int] = 3,
    tolerance: float = 0.15,
    trainer_options: Mapping[str, Any] | None = None,
    on_run: Callable[[str], None] | None = None,
    **plan_arguments: Any,
) -> CoordinateCheck:
    """Trains a few steps at each size and seed under a rule, and fits how each layer's change scales with the size.

    All sizes see the same batches, one after the other; the first is also the probe batch on which the changes are measured.
    The learning rate is constant. The caller's random state is left alone.

    Args:
        make_model: From a size's overrides, ``make_model(**sizes[i])``, to a fresh module. A LightningModule is trained by its
            own ``training_step``; any other module needs ``loss``.
        sizes: At least two sets of overrides, e.g. ``[{"width": 64}, {"width": 128}]``. Along the x axis the first key counts:
            as the module's ``mue_axes()`` declares it, else by its value (0 experts count as 1).
        batches: Where training batches come from: a dataloader, a list or a generator. ``steps`` of them are used for each
            seed; if they run out, they start over.
        rule: The rule to check, by name or as a table.
        base: The tuned model, from which the rule scales: overrides as in ``sizes``, a module, or the file of a saved base.
            ``None``: the first size.
        axis: The key of ``sizes`` for the x axis; by default the first.
        loss: ``loss(model, batch) -> 0-dim tensor``, instead of ``training_step``.
        optimizer: From the list of (name, parameter) to an optimizer. ``None``: what the LightningModule configures, without
            its schedulers; for other modules AdamW without weight decay.
        lr: Learning rate tuned at the base; scales all groups so that the first gets it. ``None``: the optimizer's own.
        lr_factor: Multiplies the learning rate. The check has no warm-up, so a rate that was tuned with one may be too high
            for its first steps: the changes then saturate, and slopes say little. Try 0.1.
        steps: Optimizer steps.
        seeds: How many seeds, or which; a seed sets the initial weights and picks the batches.
        tolerance: Largest absolute slope that passes.
        trainer_options: Further arguments of the Trainer, e.g. ``{"gradient_clip_val": 1.0, "accelerator": "gpu"}``.
        on_run: Called with a line of text before each training.
        **plan_arguments: Further arguments of :func:`lightning_mue.plan`: ``alpha``, ``roles``, ``multipliers``, ``preset``.

    Returns:
        The measurements, slopes and verdict.

    Raises:
        ValueError: For fewer than two sizes, sizes that coincide on the x axis, no batches, or what a plan refuses.
        TypeError: For a module that is not a LightningModule if ``loss`` is missing.

    Example:
        >>> import torch
        >>> from lightning_mue.analysis import coordinate_check
        >>> def mlp(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        >>> batch = (torch.randn(32, 8), torch.randn(32, 1))
        >>> mse = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> check = coordinate_check(mlp, [{"width": 16}, {"width": 64}], [batch], rule="mup", loss=mse, steps=2, seeds=1)
        >>> check.measured, sorted({slope.quantity for slope in check.slopes()})
        ((1, 2), ['change', 'output', 'propagated', 'update'])
    """
    rule = get_rule(rule)
    axis, seeds = _checked(sizes, axis, steps, seeds)
    data = _take(batches, steps * len(seeds))
    overrides = sizes[0] if base is None else base
    if isinstance(overrides, Mapping):
        base = build_base(nn.Module(), partial(make_model, **overrides))
    xs, depths = _positions(make_model, sizes, axis)
    training = ShortTraining(
        {"base": base, "rule": rule, **plan_arguments},
        loss,
        optimizer,
        lr,
        lr_factor,
        _measured_steps(steps),
        trainer_options or {},
    )
    for (x, size), (i, seed) in itertools.product(zip(xs, sizes, strict=True), enumerate(seeds)):
        if on_run is not None:
            on_run(f"{axis}={x:g}, seed {seed}")
        own = [data[j % len(data)] for j in range(i * steps, (i + 1) * steps)]
        training.run(partial(make_model, **size), own, x=x, seed=seed)
    return CoordinateCheck(
        rule=rule.name,
        family=training.family,
        axis=axis,
        sizes={x: dict(size) for x, size in zip(xs, sizes, strict=True)},
        seeds=seeds,
        measured=training.measured,
        tolerance=tolerance,
        depth_moves=len(set(depths)) > 1,
        records=tuple(training.records),
        unseen=tuple(training.unseen),
        notes=tuple(training.notes),
    )


def _positions(
    make_model: Callable[..., nn.Module], sizes: Sequence[Mapping[str, Any]], axis: str
) -> tuple[list[float], list[float]]:
    """(x of each size, depth of each size): as the module declares them, else the value and the number of layers."""
    xs, depths = [], []
    for size in sizes:
        model: Any = build_base(nn.Module(), partial(make_model, **size))
        declared = declared_axes(model)
        value = declared.get(axis, 1 if axis == "n_experts" and size[axis] == 0 else size[axis])
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"sizes: the x axis {axis}={value!r} is no positive number, so it has no logarithm.")
        xs.append(float(value))
        layers = sum(is_numbered_layer(clean_name(name)) for name, _ in model.named_modules())
        depths.append(float(declared.get("depth", layers)))
    if len(set(xs)) < len(xs):
        raise ValueError(
            f"sizes: the models lie at {axis} = {', '.join(f'{x:g}' for x in xs)}; every size needs an x of its own."
        )
    return xs, depths


def _checked(
    sizes: Sequence[Mapping[str, Any]], axis: str | None, steps: int, seeds: int | Sequence[int]
) -> tuple[str, tuple[int, ...]]:
    if len(sizes) < 2:
        raise ValueError(f"sizes: found {len(sizes)}, expected at least 2: a slope needs two points. Better are four.")
    axis = next(iter(sizes[0]), None) if axis is None else axis
    lacking = [dict(size) for size in sizes if axis not in size]
    if axis is None or lacking:
        raise ValueError(f"sizes: the axis {axis!r} is missing in {lacking[0]}; every size must give it.")
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if steps < 1 or not seeds:
        raise ValueError(f"steps and seeds: found {steps} and {len(seeds)}, expected at least 1 of each.")
    return axis, seeds


def _take(batches: Iterable[Any], count: int) -> list[Any]:
    taken = list(itertools.islice(batches, count))
    if not taken:
        raise ValueError("batches: there are none. Give a dataloader, a list or a generator of training batches.")
    return taken


def _measured_steps(steps: int) -> tuple[int, ...]:
    """Powers of two up to the last step, and the last."""
    return tuple(sorted({2**i for i in range(steps.bit_length()) if 2**i <= steps} | {steps}))
