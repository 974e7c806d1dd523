"""Applies a plan: initial weights, parameter groups, and scaled groups for the duration of an optimizer step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mue.names import clean_name
from lightning_mue.parameterizations.applying.drawing import draw_all
from lightning_mue.parameterizations.applying.groups import SCALED, family_of, scale_groups
from lightning_mue.parameterizations.applying.scaled_step import ScaledStep
from lightning_mue.parameterizations.planning.multipliers import read_multipliers, set_multipliers
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan

_HAS_WEIGHTS = "_mue_has_weights"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Qualified name -> parameter, names as in a plan."""
    return {clean_name(name): p for name, p in model.named_parameters()}


@torch.no_grad()
def initialize(model: nn.Module, plan: ScalingPlan, *, seed: int = 0) -> None:
    """Draws the initial weights that a plan asks for and sets its forward multipliers.

    At base size nothing is touched, and frozen parameters never are. Each parameter is drawn in float32 from generators of its
    own, seeded by its name, so the weights depend neither on the number of processes (plain, DDP, or DTensor shards of any
    placement; no communication takes place), nor on the number of threads, nor on the global generator.

    Args:
        model: The module that the plan was made for, with real parameters.
        plan: The plan.
        seed: Seed of all draws.

    Raises:
        ValueError: If the model's parameters are not those of the plan.
    """
    check_covers(model, plan)
    set_multipliers(model, plan.multipliers)
    if plan.same_size:
        return
    tensors = named_tensors(model)
    pairs = [(tensors[entry.name], entry) for entry in plan.parameters if tensors[entry.name].requires_grad]
    names = {id(tensor): entry.name for tensor, entry in pairs}
    padding = {
        names[id(module.weight)]: module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.padding_idx is not None
        and id(module.weight) in names
    }
    draw_all(pairs, seed, padding=padding)


def keep_weights(model: nn.Module) -> None:
    """Marks a module whose weights are worth keeping: drawn by a plan, trained, or loaded from a checkpoint."""
    setattr(model, _HAS_WEIGHTS, True)


def has_weights(model: nn.Module) -> bool:
    """True once :func:`keep_weights` was called: a callback must not draw the weights again."""
    return getattr(model, _HAS_WEIGHTS, False)


class KeepsMultipliers:
    """For a LightningModule to inherit from: its checkpoints then hold the forward multipliers, which are not weights.

    Without them the weights are another function. Stands before other bases, whose hooks it calls, too.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the forward multipliers with the weights."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["mue_multipliers"] = read_multipliers(cast("nn.Module", self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the forward multipliers back, and keeps a later fit from drawing the weights anew."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        module = cast("nn.Module", self)
        keep_weights(module)
        set_multipliers(module, checkpoint.get("mue_multipliers", {}))


def check_covers(model: nn.Module, plan: ScalingPlan) -> None:
    """Refuses a plan that was made for other parameters.

    Raises:
        ValueError: Naming the first differences.
    """
    planned = {entry.name: entry.shape for entry in plan.parameters}
    # A frozen parameter may stand outside the plan: nobody need know its role.
    shapes = {n: tuple(p.shape) for n, p in named_tensors(model).items() if p.requires_grad or n in planned}
    if shapes == planned:
        return
    wrong = [
        f"{name}: model {shapes.get(name, 'absent')}, plan {planned.get(name, 'absent')}"
        for name in dict.fromkeys([*shapes, *planned])
        if shapes.get(name) != planned.get(name)
    ]
    raise ValueError(
        f"plan: it was made for another model; {len(wrong)} parameter(s) differ, first {'; '.join(wrong[:4])}. Make a new "
        "plan from this model."
    )


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


__all__ = [
    "ScaledStep",
    "check_covers",
    "family_of",
    "has_weights",
    "initialize",
    "keep_weights",
    "named_tensors",
    "param_groups",
]
