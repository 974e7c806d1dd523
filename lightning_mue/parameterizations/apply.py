"""Applies a plan: initial weights, parameter groups, and scaled groups for the duration of an optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.parameterizations.modules import clean_name
from lightning_mue.parameterizations.multipliers import set_multipliers
from lightning_mue.parameterizations.scaling import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.table import Family

#: Marks a parameter group whose factors are already in it.
SCALED = "mue_scaled"
_HAS_WEIGHTS = "_mue_has_weights"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Qualified name -> parameter, names as in a plan."""
    return {clean_name(name): p for name, p in model.named_parameters()}


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the seed and the parameter's name, on every rank and layout alike."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize(model: nn.Module, plan: ScalingPlan, *, seed: int = 0) -> None:
    """Draws the initial weights that a plan asks for and sets its forward multipliers.

    At base size nothing is touched, and frozen parameters never are. Each parameter is drawn in float32 from its own
    generator, seeded by its name, so the weights do not depend on the number of processes or on the global generator.

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
    drawn = [entry for entry in plan.parameters if tensors[entry.name].requires_grad and entry.init.kind != "keep"]
    for entry in drawn:
        draw_(tensors[entry.name], entry, seed)
    new = {id(tensors[entry.name]) for entry in drawn}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in new:
            module.weight[module.padding_idx].zero_()


def keep_weights(model: nn.Module) -> None:
    """Marks a module whose weights are worth keeping: drawn by a plan, trained, or loaded from a checkpoint."""
    setattr(model, _HAS_WEIGHTS, True)


def has_weights(model: nn.Module) -> bool:
    """True once :func:`keep_weights` was called: a callback must not draw the weights again."""
    return getattr(model, _HAS_WEIGHTS, False)


def draw_(tensor: Tensor, entry: ParameterPlan, seed: int) -> None:
    """Fills one parameter in place as its plan says (``keep`` leaves it alone)."""
    kind, value = entry.init.kind, entry.init.value
    if kind == "keep":
        return
    if kind == "constant":
        tensor.fill_(value)
        return
    generator = generator_for(entry.name, seed)
    drawn = torch.empty(tensor.shape, dtype=torch.float32)
    if kind == "uniform":
        drawn.uniform_(-(3**0.5) * value, 3**0.5 * value, generator=generator)
    else:
        drawn.normal_(0.0, value, generator=generator)
    tensor.copy_(drawn)


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


def family_of(optimizer: torch.optim.Optimizer) -> Family:
    """The family in whose table an optimizer's factors stand.

    Raises:
        ValueError: For an optimizer that no table covers.
    """
    declared = getattr(optimizer, "mue_family", None)
    if declared is not None:
        return declared
    name = type(optimizer).__name__.lower()
    if "adam" in name:
        return "adam"
    if "sgd" in name:
        return "sgd"
    raise ValueError(
        f"optimizer: found {type(optimizer).__name__}; a parameterization is known for Adam-like optimizers (Adam, AdamW), SGD "
        "and HyperSphereOptimizer. If yours updates like one of them, set its attribute mue_family to 'adam', 'sgd' or "
        "'sphere'."
    )


def scale_groups(
    groups: Iterable[Mapping[str, Any]], plan: ScalingPlan, names: Mapping[Tensor, str]
) -> list[dict[str, Any]]:
    """Splits parameter groups by the plan's factors.

    Args:
        groups: The user's groups, as an optimizer holds them.
        plan: The plan.
        names: Parameter -> qualified name.

    Returns:
        New groups: the user's settings times the factors. Where the plan gives a parameter another ``kind`` than its group
        has, it takes the settings of the first group of that kind, if there is one.

    Raises:
        ValueError: For a parameter that the plan does not know, or groups that are scaled already.
    """
    groups = list(groups)
    entries = {entry.name: entry for entry in plan.parameters}
    by_kind = {group["kind"]: group for group in reversed(groups) if "kind" in group}
    result: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        if group.get(SCALED):
            raise ValueError(
                "optimizer: its groups come from param_groups(model, plan), so they hold the plan's factors already. Use either "
                "param_groups or MuECallback, not both."
            )
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is not None and name not in entries and not parameter.requires_grad:
                result.setdefault((i,), {**group, "params": [], "role": "frozen"})["params"].append(parameter)
                continue
            if name is None or name not in entries:
                raise ValueError(
                    f"optimizer: it holds a parameter of shape {list(parameter.shape)} ({name or 'unnamed'}) that the plan does "
                    "not know. Give the optimizer the parameters of this module only."
                )
            entry = entries[name]
            source = group if group.get("kind") in (None, entry.kind) else by_kind.get(entry.kind, group)
            key = (i, entry.kind, entry.role, entry.lr, entry.weight_decay, entry.eps)
            if key not in result:
                result[key] = {**source, "params": [], **_scaled(source, entry, plan.betas)}
            result[key]["params"].append(parameter)
    return list(result.values())


def _scaled(group: Mapping[str, Any], entry: ParameterPlan, betas: float) -> dict[str, Any]:
    changed: dict[str, Any] = {"lr": group["lr"] * entry.lr, "role": entry.role}
    if "kind" in group:
        changed["kind"] = entry.kind
    if "weight_decay" in group:
        changed["weight_decay"] = group["weight_decay"] * entry.weight_decay
    if "eps" in group:
        changed["eps"] = group["eps"] * entry.eps
    if "betas" in group and betas != 1.0:
        changed["betas"] = tuple(1 - (1 - beta) * betas for beta in group["betas"])
        if not all(0 <= beta < 1 for beta in changed["betas"]):
            raise ValueError(
                f"betas: {tuple(group['betas'])} become {changed['betas']}, because 1 - beta scales with {betas:g} = batch / "
                "tokens ratio. Use a smaller batch, or betas nearer to 1 at the base."
            )
    # torch's `param_names` runs parallel to `params`, so it cannot be taken over to a part of the group.
    if "param_names" in group:
        changed["param_names"] = None
    return changed


def param_groups(model: nn.Module, plan: ScalingPlan, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
    """Parameter groups with the plan's factors, for people who write ``configure_optimizers`` themselves.

    Args:
        model: The module that the plan was made for.
        plan: The plan.
        lr: The learning rate tuned at the base.
        **defaults: Further settings tuned at the base, e.g. ``weight_decay=0.1, eps=1e-8``. Give them here: what is given to
            the optimizer's constructor instead is the same for all groups, unscaled. ``eps`` is 1e-8 unless given.

    Returns:
        Groups with unique ``name`` and, for HyperSphereOptimizer, ``kind``.

    Example:
        ``torch.optim.AdamW(param_groups(model, plan(model, base={"width": 64}), lr=1e-3, weight_decay=0.1, eps=1e-8))``
    """
    check_covers(model, plan)
    tensors = named_tensors(model)
    # The optimizer's own default would not be scaled.
    settings = defaults if plan.family == "sgd" else {"eps": 1e-8, **defaults}
    if plan.family == "sphere":
        settings = {"kind": None, **settings}  # filled in from the plan
    trainable = [p for p in tensors.values() if p.requires_grad]
    groups = scale_groups([{"params": trainable, "lr": lr, **settings}], plan, {p: n for n, p in tensors.items()})
    for i, scaled in enumerate(groups):
        scaled["name"] = f"{scaled['role']}/{i}"
        scaled[SCALED] = True
    return groups


class ScaledStep:
    """Swaps scaled groups into an optimizer while it steps, and the user's own groups back after.

    Splitting the groups for good breaks LR schedulers, checkpoints and LearningRateMonitor; during the step only nobody
    else looks at them. The post hook is not reached if the step raises or a GradScaler skips it: call :meth:`restore`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: ScalingPlan, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.plan = plan
        self.names = {p: name for name, p in named_tensors(model).items()}
        self.own_groups: list[dict[str, Any]] | None = None
        self.effective_lr: dict[str, float] = {}
        # Finds unknown parameters and groups that are scaled already now, not in the middle of the first step.
        scale_groups(optimizer.param_groups, plan, self.names)
        self._handles = [
            optimizer.register_step_pre_hook(self._swap_in),
            optimizer.register_step_post_hook(self._swap_out),
        ]

    def _swap_in(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
        scaled = scale_groups(optimizer.param_groups, self.plan, self.names)
        self.own_groups, optimizer.param_groups = optimizer.param_groups, scaled
        self.effective_lr = {group["role"]: float(group["lr"]) for group in scaled}

    def _swap_out(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the optimizer its own groups back; does nothing if it has them."""
        if self.own_groups is not None:
            self.optimizer.param_groups, self.own_groups = self.own_groups, None

    def remove(self) -> None:
        """Detaches from the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()
