"""Finds weights that are not what their module's constructor drew: loaded, trained, or set by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.reading.base import Base, build_base
from lightning_mue.parameterizations.reading.initial.initializer import DRAWN, Init, is_uneven, measure_init
from lightning_mue.parameterizations.reading.initial.measuring import agrees, record_draws, without_row
from lightning_mue.parameterizations.reading.parameters import named_tensors, padding_rows
from lightning_mue.sharded import is_sharded

#: Entries of a model that is built a second time for comparison.
_MOST_ENTRIES = 1 << 26
#: Rows of a large tensor that are looked at.
_ROWS = 4096


def versions(model: nn.Module) -> dict[str, int]:
    """Parameter name -> how often it has been written to. Training, `load_state_dict` and init functions write in place."""
    return {name: tensor._version for name, tensor in named_tensors(model).items() if not tensor.is_inference()}


@torch.no_grad()
def drawn_over(model: nn.Module, plan: ScalingPlan, written: Mapping[str, int], base: Base | None = None) -> list[str]:
    """Names of parameters that a plan draws although their values are not what the constructor drew.

    A small model that can be rebuilt is compared with a second one of its hyperparameters: how often each tensor was written to,
    whether its values are the same under another seed (so they were loaded), and its std. Else what counts is whether a whole child
    of the module was written to more often than that of a base of its class, and values that are uneven, as those of trained
    layers are.

    Args:
        model: The module.
        plan: Its plan.
        written: `versions` of the module before training.
        base: The base of the plan.
    """
    tensors, padding = named_tensors(model), padding_rows(model)
    entries = [
        entry
        for entry in plan.parameters
        if entry.init.kind in (*DRAWN, "scaled", "constant") and _is_readable(tensors.get(entry.name))
    ]
    if not entries:
        return []
    twin, inits = _twin(model)
    twins, found = named_tensors(twin) if twin is not None else {}, []
    loaded = _loaded_children(model, plan, written, base) if twin is None else set()
    for entry in entries:
        tensor, other = tensors[entry.name], twins.get(entry.name)
        if entry.init.kind == "constant":
            changed = bool((tensor != tensor.flatten()[:1]).any())  # a trained bias or gain
        elif other is not None and other.shape == tensor.shape:
            late = written.get(entry.name, 0) > other._version
            changed = late or _differs(tensor, other, inits.get(entry.name), padding.get(entry.name))
        else:
            child = entry.name.partition(".")[0]
            changed = child in loaded or _looks_trained(tensor, entry, padding.get(entry.name))
        found += [entry.name] if changed else []
    return found


def _is_readable(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and not (tensor.is_meta or is_sharded(tensor))


def _twin(model: nn.Module) -> tuple[nn.Module | None, dict[str, Init | None]]:
    """A second module of the same hyperparameters with other random values, and how they were drawn, if one can be made."""
    small = sum(p.numel() for p in model.parameters()) <= _MOST_ENTRIES
    if not small or not getattr(model, "hparams", None) or getattr(model, "_device_mesh", None) is not None:
        return None, {}
    try:
        return record_draws(lambda seed: build_base(model, {}, seed=seed + 1))
    except Exception:  # another constructor's: it must not stop a run that needs no second module
        return None, {}


def _loaded_children(model: nn.Module, plan: ScalingPlan, written: Mapping[str, int], base: Base | None) -> set[str]:
    """Children of a module, by name, each of whose parameters was written to more often than that of a base of the same class."""
    if base is None or isinstance(base, (str, Path)):
        return set()
    try:
        made = build_base(model, base)
    except Exception:  # as above
        return set()
    if type(made) is not type(model):
        return set()
    theirs, more = versions(made), dict[str, list[bool]]()
    vectors = {entry.name.partition(".")[0] for entry in plan.parameters if len(entry.shape) == 1}
    for entry in plan.parameters:
        known = entry.base in theirs and entry.name in written
        late = known and written[entry.name] > theirs[entry.base]  # type: ignore[index]
        more.setdefault(entry.name.partition(".")[0], []).append(late)
    # Stacks of more experts are written to more often while they are drawn; vectors are not.
    return {child for child, late in more.items() if all(late) and child in vectors}


def _differs(tensor: Tensor, other: Tensor, init: Init | None, row: int | None) -> bool:
    if init is None or init.kind == "keep":  # what another seed leaves as it is was loaded
        return (
            torch.equal(tensor.detach().cpu(), other.detach().to(tensor.dtype))
            and measure_init(tensor).kind != "constant"
        )
    return not agrees(tensor, init, row)


def _looks_trained(tensor: Tensor, entry: ParameterPlan, row: int | None) -> bool:
    if tensor.dim() < 2 or tensor.numel() < 256 or entry.init.kind == "scaled":
        return False
    values = without_row(tensor.detach()[:_ROWS].float().cpu(), row if row is not None and row < _ROWS else None)
    return is_uneven(values) or measure_init(values).kind in ("constant", "scaled", "keep")
