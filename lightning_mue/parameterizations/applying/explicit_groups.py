"""Parameter groups with a plan's factors, for an optimizer that is built by hand."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_mue.parameterizations.applying.groups import SCALED, scale_groups
from lightning_mue.parameterizations.applying.initial_weights import check_covers
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.reading.parameters import named_tensors


def param_groups(
    model: nn.Module, plan: ScalingPlan, *, lr: float, kinds: Collection[str] | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    """Parameter groups with the plan's factors, for people who write ``configure_optimizers`` themselves.

    Args:
        model: The module that the plan was made for.
        plan: The plan.
        lr: The learning rate tuned at the base.
        kinds: Updates whose parameters to take, where a plan is for several optimizers: ``{"muon"}`` for torch.optim.Muon,
            ``{"adamw"}`` for the AdamW beside it. None: all.
        **defaults: Further settings tuned at the base, e.g. ``weight_decay=0.1, eps=1e-8``. Give them here: what is given to
            the optimizer's constructor instead is the same for all groups, unscaled. ``eps`` is 1e-8 unless given. What a Muon
            multiplies its ``lr`` with belongs here too, because the factors allow for it: ``adjust_lr_fn`` for
            torch.optim.Muon, ``lr_convention`` ("spectral" unless given) for HyperSphereOptimizer with ``sphere=False``.

    Returns:
        Groups with unique ``name`` and, for HyperSphereOptimizer, ``kind``. A plan of the family ``muon`` alone is for
        HyperSphereOptimizer, unless ``adjust_lr_fn`` or ``kinds={"muon"}`` ask for torch.optim.Muon.

    Example:
        ``torch.optim.AdamW(param_groups(model, plan(model, base={"width": 64}), lr=1e-3, weight_decay=0.1, eps=1e-8))``
    """
    check_covers(model, plan)
    tensors = named_tensors(model)
    kind_of = {entry.name: entry.kind for entry in plan.parameters}
    taken = {name: p for name, p in tensors.items() if p.requires_grad and (kinds is None or kind_of[name] in kinds)}
    # The optimizer's own default would not be scaled.
    settings = {"eps": 1e-8, **defaults} if {kind_of[name] for name in taken} - {"sgd", "muon"} else defaults
    for_torch = "adjust_lr_fn" in settings or (set(kinds or ()) == {"muon"} and "lr_convention" not in settings)
    if for_torch:
        settings = {"adjust_lr_fn": None, **settings}  # its own dependence on the shape is allowed for
    elif plan.family in ("sphere", "muon"):
        settings = {"kind": None, **settings}  # filled in from the plan
        if plan.family == "muon":
            settings = {"lr_convention": "spectral", **settings}
    groups = scale_groups(
        [{"params": list(taken.values()), "lr": lr, **settings}], plan, {p: n for n, p in tensors.items()}
    )
    for i, scaled in enumerate(groups):
        scaled["name"] = f"{scaled['role']}/{i}"
        scaled[SCALED] = True
    return groups
