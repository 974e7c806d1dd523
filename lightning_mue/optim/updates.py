"""The update of a param group, by kind: gathers weights, gradients and state, and steps them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from lightning_mue.optim.distributed.parts import sharded_parts
from lightning_mue.optim.distributed.update import apply_to_parts, muon_update_distributed, rounds
from lightning_mue.optim.matrices import Matrix, Pool, as_matrices
from lightning_mue.optim.options import is_zero, step_options
from lightning_mue.optim.precision import math_dtype, tf32_products
from lightning_mue.optim.split import cut_of, whole_parts
from lightning_mue.optim.state import LayoutOf, States
from lightning_mue.optim.step import muon_update
from lightning_mue.parameterizations.rules.kinds import MUON_KINDS, SPHERE_KINDS
from lightning_mue.sharded import is_sharded, local


def update(group: Mapping[str, Any], params: Sequence[Tensor], states: States, layout: LayoutOf) -> int:
    """Step parameters of a group that have a gradient and state, in place; return the bytes of scratch memory."""
    if group["kind"] == "adamw":
        _adamw(group, params, states)
        return 0
    if group["kind"] == "adam_sphere":
        _adam_sphere(group, params, states, layout)
        return 0
    return _muon(group, params, states, layout)


def _muon(group: Mapping[str, Any], params: Sequence[Tensor], states: States, layout: LayoutOf) -> int:
    """Step by Muon, on or off the sphere: matrices that are whole here by shape, the others in rounds, collectively."""
    step, scratch = step_options(group), 0
    shapes: dict[Any, list[Matrix]] = defaultdict(list)
    distributed: list[Tensor] = []
    for param in params:
        if layout(param).is_distributed:
            distributed.append(param)
        else:
            for item in whole_parts(_matrix(param, group, states), cut_of(group.get("split"), param.shape)):
                shapes[as_matrices(item.weight).shape[1:], param.dtype, param.device].append(item)
    with tf32_products(group["compute_dtype"] == "tf32"):
        for (sides, _, _), items in shapes.items():
            pool = Pool()  # for one shape, so that its memory is free for the next
            muon_update(items, step.for_matrix(tuple(sides)), pool)
            scratch = max(scratch, pool.nbytes)
        for members in rounds(distributed):
            parts = [
                part
                for param in members
                for part in sharded_parts(
                    _matrix(param, group, states), layout(param), cut_of(group.get("split"), param.shape)
                )
            ]
            scratch = max(scratch, muon_update_distributed([i for i, _ in parts], [where for _, where in parts], step))
    return scratch


def _adam_sphere(group: Mapping[str, Any], params: Sequence[Tensor], states: States, layout: LayoutOf) -> None:
    step = step_options(group)
    for param in params:
        item = _matrix(param, group, states)
        wide = _adam_direction(item, local(states[param]["exp_avg_sq"]), states[param]["step"], group)
        if not is_zero(step.lr):
            apply_to_parts([item], [layout(param)], [wide], step)


def _adam_direction(item: Matrix, exp_avg_sq: Tensor, step: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Update Adam's moments and step count in place and return the bias-corrected direction, in the math type."""
    beta1, beta2 = group["betas"]
    step += 1
    grad = -item.grad if group["maximize"] else item.grad
    item.momentum.lerp_(grad.to(item.momentum.dtype), 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # On the CPU the count is read without a wait; on a device (capturable) it stays a tensor.
    t = step.item() if step.device.type == "cpu" else step
    dtype = math_dtype(grad.dtype)
    scale = exp_avg_sq.to(dtype).div(1 - beta2**t).sqrt_().add_(group["eps"])
    return item.momentum.to(dtype).div(1 - beta1**t).div_(scale)


def _adamw(group: Mapping[str, Any], params: Sequence[Tensor], states: States) -> None:
    capturable = group["capturable"] and all(param.device.type != "cpu" for param in params)
    lr = group["lr"]
    if isinstance(lr, Tensor) and not capturable:
        lr = lr.item()  # torch refuses a tensor here
    adamw(
        [local(param) for param in params],
        [_local_grad(param) for param in params],
        [local(states[param]["exp_avg"]) for param in params],
        [local(states[param]["exp_avg_sq"]) for param in params],
        [],
        [states[param]["step"] for param in params],
        foreach=True,
        capturable=capturable,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _matrix(param: Tensor, group: Mapping[str, Any], states: States) -> Matrix:
    state = states[param]
    radius = local(state["radius"]) if group["kind"] in SPHERE_KINDS else None
    momentum = local(state["exp_avg" if group["kind"] == "adam_sphere" else "momentum"])
    rows = local(state["row_square"]) if group["kind"] in MUON_KINDS and group["normalize"] else None
    return Matrix(local(param), _local_grad(param), momentum, radius, rows)


def _local_grad(param: Tensor) -> Tensor:
    """Return this rank's part of a parameter's gradient, with the parameter's placements."""
    grad = param.grad
    assert grad is not None
    if is_sharded(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)
