"""Coordinate check: tests whether every layer's update keeps its size when the model grows.

A few steps are trained at each size. A parameterization is sound if the change that each layer's update makes to the layer's
output neither grows nor shrinks with the size (docs/theory.md section 7; Yang et al., arXiv:2203.03466, appendix D.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mue.analysis.check import CoordinateCheck
from lightning_mue.analysis.training import Loss, OptimizerFactory, ShortTraining
from lightning_mue.checks import require_integer, require_number, require_positive, require_types, value_error
from lightning_mue.contract import declared_axes
from lightning_mue.names import clean_name, is_numbered_layer
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

    All sizes see the same batches in the same order; the changes are measured on the first one, the probe batch. The
    learning rate is constant. The caller's random state is not changed.

    Args:
        make_model: Makes a new module from a size's overrides: ``make_model(**sizes[i])``. A LightningModule is trained by
            its own ``training_step``; any other module needs ``loss``.
        sizes: At least two sets of overrides, e.g. ``[{"width": 64}, {"width": 128}]``. A model's position on the x axis is
            what its ``mue_axes()`` declares for `axis`, else the override's value (0 experts count as 1).
        batches: Training batches: a dataloader, a list or a generator. ``steps`` of them are used for each seed; if there are
            too few, they are repeated.
        rule: The rule to check, by name or as a table.
        base: The tuned model from which the rule scales: overrides as in ``sizes``, a module, or the file of a saved base.
            ``None``: the first size.
        axis: The key of ``sizes`` that is the x axis; by default the first.
        loss: ``loss(model, batch) -> 0-dim tensor``, instead of ``training_step``.
        optimizer: Makes an optimizer from a list of (name, parameter). ``None``: the one that the LightningModule configures,
            without its schedulers; for other modules AdamW without weight decay.
        lr: Learning rate tuned at the base; all groups are scaled so that the first has it. ``None``: the optimizer's own.
        lr_factor: Multiplies the learning rate. The check has no warm-up, so a rate that was tuned with one may be too high
            for its first steps: the changes then saturate, and the slopes say little. Try 0.1.
        steps: Optimizer steps.
        seeds: Number of seeds, or the seeds; a seed sets the initial weights and selects the batches.
        tolerance: Largest absolute slope that passes.
        trainer_options: Further arguments of the Trainer, e.g. ``{"gradient_clip_val": 1.0, "accelerator": "gpu"}``.
        on_run: Called with a line of text before each training.
        **plan_arguments: Further arguments of :func:`lightning_mue.plan`: ``alpha``, ``roles``, ``multipliers``, ``preset``.

    Returns:
        The measurements, slopes and verdict.

    Raises:
        ValueError: For fewer than two sizes, sizes with the same x, no batches, or an error of the plan.
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
    require_types(coordinate_check, {**locals(), "rule": ""})
    axis, seeds = _checked(sizes, axis, steps, seeds)
    require_number("tolerance", tolerance, above=0)
    require_number("lr_factor", lr_factor, above=0)
    if lr is not None:
        require_number("lr", lr, above=0)
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
    """Returns (x of each size, depth of each size): as the module declares them, else the value and the number of layers."""
    xs, depths = [], []
    for size in sizes:
        model: Any = build_base(nn.Module(), partial(make_model, **size))
        declared = declared_axes(model)
        value = declared.get(axis, 1 if axis == "n_experts" and size[axis] == 0 else size[axis])
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise value_error("sizes", found=f"{axis}={value!r}", expected=f"a positive number for the x axis {axis}")
        xs.append(float(value))
        layers = sum(is_numbered_layer(clean_name(name)) for name, _ in model.named_modules())
        depths.append(float(declared.get("depth", layers)))
    if len(set(xs)) < len(xs):
        raise value_error(
            "sizes",
            found=f"models at {axis} = {', '.join(f'{x:g}' for x in xs)}",
            expected=f"a different {axis} for every size",
            do="Remove the duplicates, or give another axis.",
        )
    return xs, depths


def _checked(
    sizes: Sequence[Mapping[str, Any]], axis: str | None, steps: int, seeds: int | Sequence[int]
) -> tuple[str, tuple[int, ...]]:
    if len(sizes) < 2:
        raise value_error(
            "sizes", found=len(sizes), expected="at least 2, because a slope needs two points", do="Better give 4."
        )
    axis = next(iter(sizes[0]), None) if axis is None else axis
    lacking = [dict(size) for size in sizes if axis not in size]
    if axis is None or lacking:
        raise value_error("sizes", found=lacking[0], expected=f"the axis {axis!r} in every size")
    require_positive(steps=steps)
    if isinstance(seeds, int):
        require_positive(seeds=seeds)
        return axis, tuple(range(seeds))
    if not seeds:
        raise value_error("seeds", found="none", expected="at least one seed")
    for seed in seeds:
        require_integer("seeds", seed, 0)
    return axis, tuple(seeds)


def _take(batches: Iterable[Any], count: int) -> list[Any]:
    taken = list(itertools.islice(batches, count))
    if not taken:
        raise value_error("batches", found="none", expected="a dataloader, a list or a generator of training batches")
    return taken


def _measured_steps(steps: int) -> tuple[int, ...]:
    """Powers of two up to the last step, and the last."""
    return tuple(sorted({2**i for i in range(steps.bit_length()) if 2**i <= steps} | {steps}))
