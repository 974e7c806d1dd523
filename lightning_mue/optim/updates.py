"""The update of a param group, by kind: gathers weights, gradients and state, and steps them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mue.optim.distributed.layout import Layout
from lightning_mue.optim.distributed.pieces import local_grad
from lightning_mue.optim.distributed.update import apply_to_parts, muon_update_distributed, rounds
from lightning_mue.optim.matrices import Matrix, Pool, as_matrices
from lightning_mue.optim.options import step_options
from lightning_mue.optim.precision import tf32_products
from lightning_mue.optim.state import States
from lightning_mue.optim.step import adam_direction, adamw_update, muon_update
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS
from lightning_mue.sharded import local

#: Returns a parameter's layout over the ranks.
LayoutOf = Callable[[Tensor], Layout]


def update(group: Mapping[str, Any], params: Sequence[Tensor], states: States, layout: LayoutOf) -> int:
    """Step parameters of a group that have a gradient and state.

    Args:
        group: The param group: its kind and options.
        params: Those of its parameters that are to be stepped.
        states: Their state, updated in place.
        layout: Returns a parameter's layout.

    Returns:
        Bytes of the largest scratch memory.
    """
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
    shapes: dict[Any, list[Tensor]] = defaultdict(list)
    distributed: list[Tensor] = []
    for param in params:
        if layout(param).is_distributed:
            distributed.append(param)
        else:
            shapes[as_matrices(local(param)).shape[1:], param.dtype, param.device].append(param)
    with tf32_products(group["compute_dtype"] == "tf32"):
        for members in shapes.values():
            pool = Pool()  # for one shape, so that its memory is free for the next
            items = [_matrix(param, group, states) for param in members]
            muon_update(items, step.for_matrix(layout(members[0]).matrix), pool)
            scratch = max(scratch, pool.nbytes)
        for members in rounds(distributed):
            items = [_matrix(param, group, states) for param in members]
            scratch = max(scratch, muon_update_distributed(items, [layout(param) for param in members], step))
    return scratch


def _adam_sphere(group: Mapping[str, Any], params: Sequence[Tensor], states: States, layout: LayoutOf) -> None:
    step = step_options(group)
    options = {key: group[key] for key in ("betas", "eps", "maximize")}
    for param in params:
        state, item = states[param], _matrix(param, group, states)
        wide = adam_direction(item.grad, item.momentum, local(state["exp_avg_sq"]), state["step"], **options)
        if not step.is_zero_lr:
            apply_to_parts([item], [layout(param)], [wide], step)


def _adamw(group: Mapping[str, Any], params: Sequence[Tensor], states: States) -> None:
    parts = [{key: local(states[param][key]) for key in ("exp_avg", "exp_avg_sq", "step")} for param in params]
    adamw_update([local(param) for param in params], [local_grad(param) for param in params], parts, group)


def _matrix(param: Tensor, group: Mapping[str, Any], states: States) -> Matrix:
    state = states[param]
    radius = local(state["radius"]) if group["kind"] in SPHERE_KINDS else None
    momentum = local(state["exp_avg" if group["kind"] == "adam_sphere" else "momentum"])
    return Matrix(local(param), local_grad(param), momentum, radius)
