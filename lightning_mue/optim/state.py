"""State of the optimizer: creation at the first step with a gradient, checks of new parameters, loading."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import listed, mismatch, value_error
from lightning_mue.optim.distributed.layout import Layout, by_expert, layout_of
from lightning_mue.optim.distributed.parts import local_cut, part_layouts
from lightning_mue.optim.distributed.sharding import reduce_sums
from lightning_mue.optim.groups import classify, label, label_in, named
from lightning_mue.optim.matrices import as_matrices, sum_squares
from lightning_mue.optim.neuron import check_rows, row_shape, zero_rows
from lightning_mue.optim.options import STATE_DTYPES
from lightning_mue.optim.precision import math_dtype
from lightning_mue.optim.split import PartBounds, cut_of, pieces
from lightning_mue.parameterizations.rules.kinds import KINDS, MIXED, MUON_KINDS, SPHERE_KINDS, members_of
from lightning_mue.sharded import is_sharded, local

#: Options and state of torch's own optimizers that this one does not have.
_FOREIGN_OPTIONS = {"amsgrad", "fused", "ns_steps", "dampening"}
_STATE = {"momentum", "radius", "row_square", "exp_avg", "exp_avg_sq", "step"}

#: State of each parameter, as `torch.optim.Optimizer.state`.
States = MutableMapping[Tensor, dict[str, Any]]
#: Returns a parameter's layout over the ranks.
LayoutOf = Callable[[Tensor], Layout]


def prepare(group: Mapping[str, Any], states: States, layout: LayoutOf) -> list[Tensor]:
    """Return a group's parameters that have a gradient, and create the state that their kind needs, where missing.

    Raises:
        ValueError: If a matrix that is to be put on the sphere is zero, or new weights are not finite.
        RuntimeError: If a gradient is sparse.
    """
    params, new = [], []
    first = _first_key(group["kind"])
    for index, param in enumerate(group["params"]):
        if param.grad is None or (param.numel() == 0 and not is_sharded(param)):
            continue
        if param.grad.is_sparse:
            do = "Build its embedding with sparse=False, or give it to torch.optim.SparseAdam."
            key = f"gradient of {label_in(group, index)}"
            raise RuntimeError(mismatch(key, found="a sparse tensor", expected="a dense one", do=do))
        if group["kind"] in MUON_KINDS and (group.get("split") is not None or group["normalize"]):
            _check_parts(layout(param), label_in(group, index))
        if first not in states[param]:
            new.append((param, label_in(group, index)))
        params.append(param)
    if group["kind"] == "adamw":
        _refuse_infinite(new)
    else:
        _add_radii(new, group, states, layout)
    for param in params:
        _add_buffers(states[param], param, group)
    return params


def _first_key(kind: str | None) -> str:
    """The state that a parameter of a kind has from its first step on."""
    return "radius" if kind in SPHERE_KINDS else "momentum" if kind in MUON_KINDS else "step"


def _check_parts(layout: Layout, what: str) -> None:
    if layout.gather:
        raise value_error(
            what,
            found=f"it sharded as {list(layout.gather[1])}",
            expected="its matrices sharded over one dimension of the mesh, by rows or columns, to split or normalize them",
            do="Leave `split` and `normalize` out of its group, or shard it by fully_shard alone.",
        )


def _add_buffers(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    if group["kind"] in MUON_KINDS:
        if "momentum" not in state:
            dtype = STATE_DTYPES.get(group["state_dtype"], param.dtype)
            state["momentum"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if group["normalize"] == "neuron" and "row_square" not in state:
            check_rows(group.get("split"))
            state["row_square"] = zero_rows(param)
    elif "step" not in state:
        on_device = group["capturable"] and param.device.type != "cpu"
        state["step"] = torch.tensor(0.0, device=param.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)


def _add_radii(new: Sequence[tuple[Tensor, str]], group: Mapping[str, Any], states: States, layout: LayoutOf) -> None:
    """Set the radii of new parameters, on the sphere, to their norms or to the given radius.

    A collective for sharded matrices, so that all ranks that hold a part of a matrix refuse it together.
    """
    params = [param for param, _ in new]
    cuts = [cut_of(group.get("split"), param.shape, what) for param, what in new]
    if group["kind"] not in MUON_KINDS:
        cuts = [None] * len(new)
    norms = _norms(params, [layout(param) for param in params], cuts)
    _refuse_infinite(new, norms)
    if group["kind"] not in SPHERE_KINDS:
        return
    for (param, what), norm_E in zip(new, norms, strict=True):
        _refuse_zero(param, norm_E, what)
        radius_E = norm_E if group["radius"] is None else torch.full_like(norm_E, group["radius"])
        states[param]["radius"] = _as_state(radius_E, param)


def _norms(
    params: Sequence[Tensor], layouts: Sequence[Layout], cuts: Sequence[PartBounds | None] | None = None
) -> list[Tensor]:
    """Return the norms of the matrices that this rank holds, whole or in part, each `[E]`, `[E, P]` if cut; math type.

    All ranks must ask for the same parameters in the same order.
    """
    cuts = cuts or [None] * len(params)
    parts, where = [], []
    for param, layout, cut in zip(params, layouts, cuts, strict=True):
        parts += [local(param)] if cut is None else pieces(local(param), local_cut(layout, cut))
        where += [layout] if cut is None else part_layouts(layout, cut)
    squares = [sum_squares(as_matrices(part).to(math_dtype(part.dtype))) for part in parts]
    sums = iter(reduce_sums(where, squares))
    norms = []
    for param, cut in zip(params, cuts, strict=True):
        square_E = next(sums) if cut is None else torch.stack([next(sums) for _ in cut.bounds], dim=-1)
        norms.append(square_E.sqrt().to(math_dtype(param.dtype)))
    return norms


def _as_state(radius_E: Tensor, param: Any) -> Tensor:
    """Return norms in the form of the state: `[]` for a matrix, `[E]` for a stack, sharded as its experts are."""
    if param.ndim != 3:
        return radius_E.squeeze(0)
    if not is_sharded(param):
        return radius_E
    from torch.distributed.tensor import DTensor

    placements = by_expert(param.placements)
    shape = torch.Size([param.shape[0], *radius_E.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(radius_E, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def check_new_group(group: Mapping[str, Any], groups: Iterable[Mapping[str, Any]], *, start: int, sphere: bool) -> None:
    """Check the parameters of a new group, with or without a `kind`, before anything is changed.

    Sharded parameters are checked for zeros and for entries that are not finite only at their first step. `start` is the
    number of the group's first parameter.

    Raises:
        ValueError: If a parameter is given twice, a trainable parameter of a matrix kind is a vector or zero, or the
            entries of a trainable parameter are not finite.
    """
    new, seen = [], {param for other in groups for param in other["params"]}
    for index, (name, param) in enumerate(named(group), start):
        what = label(name, param, f"number {index}")
        by_default, _ = classify(name, param, sphere=sphere)  # refuses complex parameters of any kind
        kind = group.get("kind", by_default)
        if kind != "adamw" and param.requires_grad:
            _check_matrix(param, what, kind)
        if param.requires_grad and not is_sharded(param):
            new.append((param, what))
    _refuse_infinite(new)
    for name, param in named(group):
        if param in seen:
            do = "Give each parameter once, in one group."
            raise value_error(label(name, param), found="it given twice", expected="it once", do=do)
        seen.add(param)


def _check_matrix(param: Tensor, what: str, kind: str) -> None:
    if param.ndim < 2:
        do = "Put it in a group of kind 'adamw', or leave `kind` out."
        found, expected = "a vector or scalar", f"a matrix in a group of kind '{kind}'"
        raise value_error(what, found=found, expected=expected, do=do)
    if kind in SPHERE_KINDS and not is_sharded(param) and not param.is_meta and param.numel():
        with torch.no_grad():
            _refuse_zero(param, _norms([param], [layout_of(param)])[0], what)


def _refuse_infinite(new: Sequence[tuple[Tensor, str]], norms: Sequence[Tensor] | None = None) -> None:
    """Refuse parameters with a NaN or an infinite entry, of which `norms`, where given, are the norms.

    Waits once for each GPU, not for each parameter.
    """
    devices: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for index, (param, what) in enumerate(new):
        if not param.is_meta and local(param).numel():
            x = local(param).detach()
            sizes = torch.stack(x.aminmax()) if norms is None else norms[index]
            devices[x.device].append((what, sizes.isfinite().all()))
    for checks in devices.values():
        finite = torch.stack([flag for _, flag in checks]).tolist()
        bad = [what for (what, _), fine in zip(checks, finite, strict=True) if not fine]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            do = "Initialize or load the weights again: they were broken before this optimizer's first step on them."
            raise value_error(bad[0] + more, found="NaN or infinite entries", expected="finite weights", do=do)


def _refuse_zero(param: Tensor, norm_E: Tensor, what: str) -> None:
    if not param.is_meta and bool((norm_E == 0).any()):
        at = (norm_E == 0).nonzero()[0].tolist()
        which = f", matrix {at[0]} of the stack" if param.ndim == 3 else ""
        which += f", part {at[1]} of its split" if len(at) > 1 else ""
        found, expected = "zero (its Frobenius norm is 0)", "a nonzero matrix, with a direction to keep on the sphere"
        do = (
            "Initialize it with random values; or, for one that has to start at zero (adaLN-zero), declare its role "
            "'modulation' (`mue_roles` of its module, then tag_roles(model)), which puts it in a group of kind 'adamw'."
        )
        raise value_error(what + which, found=found, expected=expected, do=do)


def check_loadable(
    groups: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str | None, Tensor]]
) -> None:
    """Check that saved groups are this optimizer's and that the saved state fits the parameters, in order.

    Raises:
        ValueError: If they do not.
    """
    foreign_state = set().union(*states) - _STATE
    for index, group in enumerate(groups):
        # torch.distributed.checkpoint's full state dicts merge what was saved into this optimizer's own groups.
        foreign = sorted((_FOREIGN_OPTIONS & set(group)) | foreign_state)
        if group.get("kind") not in (*KINDS, MIXED) or foreign:
            found = f"param group {index} with {listed(foreign)}" if foreign else f"param group {index} without a kind"
            expected = f"a HyperSphereOptimizer's, with a kind among {', '.join(KINDS)}"
            do = (
                "State of torch.optim.AdamW or Muon holds no radii. Load the model's weights only and start this optimizer "
                "from scratch."
            )
            raise value_error("state_dict", found=found, expected=expected, do=do)
    saved = [name for group in groups for name in group.get("param_names") or [None] * len(group["params"])]
    for before, (name, _) in zip(saved, pairs, strict=False):  # torch compares how many there are
        if before and name and before != name:
            do = "Parameters are matched by order: build the optimizer from the same ones in the same order and groups."
            found, expected = f"the state of {before!r}", f"that of {name!r} in this place"
            raise value_error("state_dict", found=found, expected=expected, do=do)
    members = [(group["kind"] == MIXED, *each) for group in groups for each in members_of(group)]
    for state, (mixed, kind, split), (name, param) in zip(states, members, pairs, strict=False):
        if mixed and state and _first_key(kind) not in state:
            do = "The parameters of the group are in another order than those that were saved: add them in the same order."
            found = f"the kind {kind!r} for {label(name, param)} with {listed(sorted(state))}"
            raise value_error("state_dict", found=found, expected=f"{_first_key(kind)!r} in its state", do=do)
        cut = cut_of(split, param.shape, label(name, param))
        radius = param.shape[: int(param.ndim == 3)] + torch.Size([] if cut is None else [len(cut.bounds)])
        rows = row_shape(param.shape)
        shapes = (("momentum", param.shape), ("exp_avg", param.shape), ("radius", radius), ("row_square", rows))
        for key, shape in shapes:
            if key in state and state[key].shape != shape:
                found = f"{key} of shape {list(state[key].shape)} for {label(name, param)}"
                do = "It was saved from another model, or from parameters grouped in another order."
                raise value_error("state_dict", found=found, expected=f"{list(shape)}", do=do)


def restore_dtypes(state: dict[str, Any], saved: Mapping[str, Any], param: Tensor) -> None:
    """Load `radius` and `momentum` in the type they were saved in; torch casts them to the parameter's.

    A radius rounded to bfloat16 would be another radius.
    """
    for key in ("radius", "momentum", "row_square"):
        if key in saved:
            state[key] = saved[key].to(device=param.device, copy=True)


def state_bytes(states: States) -> dict[str, int]:
    """Return the bytes of this rank's state, by name."""
    found: dict[str, int] = defaultdict(int)
    for state in states.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[key] += local(value).nbytes
    return dict(found)
