"""Muon on the Frobenius sphere for matrices, AdamW for the rest, in one optimizer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_mue.optim.grouping import (
    check_loadable,
    classify,
    describe,
    label,
    named,
    split_group,
    summarize,
    to_groups,
    unique_name,
    warn_of_guesses,
)
from lightning_mue.optim.newton_schulz import math_dtype, peak
from lightning_mue.optim.options import COMPUTE_DTYPES, check_kind, check_number, checked
from lightning_mue.optim.updates import Spherical, adam_direction, as_matrices, project, radius_of, sphere_update

logger = logging.getLogger(__name__)


class HyperSphereOptimizer(Optimizer):
    """Keeps every matrix at its initial Frobenius norm and turns it by a fixed angle a step ("HyperP").

    Each param group has a `kind`:

    - `sphere`: Muon's orthogonalized momentum, a step of `lr` radii, and back onto the sphere. A tensor of three
      dimensions is a stack of matrices, each on its own sphere.
    - `adam_sphere`: the same with Adam's direction in place of the orthogonalized one; for the unembedding.
    - `adamw`: `torch.optim.AdamW`; for embeddings, norms, biases, scalars.

    Groups without a `kind` are split into one group a kind (see `classify` in `grouping.py` for the order of
    decisions), and `describe()` says what went where. Because a step is relative to the matrix, the best `lr` does not
    depend on width, and `weight_decay` on the sphere has no effect to first order.

    Source: arXiv:2603.28743, and theory.md sections 4.7 and 5.1 for the step in full.

    Args:
        params: Parameters, (name, parameter) pairs, or group dicts, which may set `kind`, `name`, and any option below.
            Pairs (`model.named_parameters()`) let embeddings and heads be recognized by name.
        lr: Step in radii on the sphere (0.01 turns a matrix by about 0.01 rad); AdamW's learning rate otherwise.
        adamw_lr: Learning rate of `adamw` groups that do not bring their own; None means `lr`.
        momentum: Muon's momentum, in [0, 1).
        nesterov: Nesterov momentum.
        betas: Adam's decay rates, for `adamw` and `adam_sphere`.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        preset: Newton-Schulz schedule, a name in `PRESETS`.
        compute_dtype: Type of the Newton-Schulz products, a `torch.dtype` or its name. None: bfloat16 on CUDA,
            float32 elsewhere.

    State of a parameter: `momentum` (its dtype) and `radius` (float32, or float64 with float64 parameters; `[]`, or
    `[E]` for a stack) on the sphere; `exp_avg`, `exp_avg_sq`, `step` for Adam's kinds, and `radius` for `adam_sphere`.
    It is created at the first step with a gradient, so weights may be initialized anew until then: the radius is the
    norm at that step. Options and kinds are read from `param_groups` at every step.

    Raises:
        ValueError: If an option is out of range, a `kind` or `preset` is unknown, or a trainable matrix is zero.
        TypeError: If an option has the wrong type, or a parameter is complex.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = HyperSphereOptimizer(layer.named_parameters(), lr=0.02)
        >>> [group["name"] for group in optimizer.param_groups]
        ['sphere', 'adamw']
    """

    #: In which table of a parameterization this optimizer's factors stand.
    mue_family = "sphere"

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        *,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        preset: str = "scheduled",
        compute_dtype: str | torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "preset": preset,
            "compute_dtype": compute_dtype,
        }
        if adamw_lr is not None:
            check_number("adamw_lr", adamw_lr)
        groups = to_groups(params)
        if not any(group["params"] for group in groups):
            raise ValueError("params is empty: there is nothing to optimize. Are the model's layers made yet?")
        # adamw_lr is among the defaults because they are all that a pickle keeps beside groups and state.
        super().__init__(groups, {**checked(defaults), "adamw_lr": adamw_lr})
        warn_of_guesses(groups)
        logger.info("HyperSphereOptimizer: %s", summarize(self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by kind if it does not set `kind` (so more than one group may be added).

        Raises:
            ValueError: As the constructor does.
            TypeError: As the constructor does.
        """
        (param_group,) = to_groups([param_group])
        if "kind" in param_group:
            check_kind(param_group)
        start = sum(len(group["params"]) for group in self.param_groups)
        for index, (name, param) in enumerate(named(param_group), start):
            kind = param_group.get("kind", classify(name, param)[0])
            if kind != "adamw" and param.requires_grad:
                radius_of(param, label(name, param, f"number {index}"))
        options = {key: value for key, value in self.defaults.items() if key != "adamw_lr"}
        for group in split_group(param_group, self.defaults["adamw_lr"]):
            group = checked({**options, **group})
            group["name"] = unique_name(group["name"], (other["name"] for other in self.param_groups))
            super().add_param_group(group)
            self.param_groups[-1].pop("adamw_lr")  # put there by the base class; only the defaults should hold it

    def describe(self) -> str:
        """Return which parameter is in which group, and what decided it."""
        return describe(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the parameters that have a gradient.

        Args:
            closure: Reevaluates the model with gradients and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ValueError: If a group's kind is unknown, or a matrix met for the first time is zero.
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = {"sphere": self._sphere, "adam_sphere": self._adam_sphere, "adamw": self._adamw}
        for group in self.param_groups:
            kind = check_kind(group)
            if params := self._prepare(group):
                updates[kind](group, params)
        return loss

    def _prepare(self, group: Mapping[str, Any]) -> list[Tensor]:
        """Return the group's parameters with a gradient, each with the state that its kind needs."""
        params = []
        for index, (name, param) in enumerate(named(group)):
            if param.grad is None:
                continue
            place = (name, param, f"number {index} of group '{group.get('name', group['kind'])}'")
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{label(*place)} has a sparse gradient, which this optimizer does not take. Build "
                    "its embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )
            state = self.state[param]
            if group["kind"] != "adamw" and "radius" not in state:
                state["radius"] = radius_of(param, label(*place))
            _add_missing(state, param, group["kind"])
            params.append(param)
        return params

    def _sphere(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        buckets: dict[Any, list[Spherical]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            item = Spherical(param, _grad(param), state["momentum"], state["radius"])
            buckets[as_matrices(param).shape[1:], param.dtype, param.device].append(item)
        for items in buckets.values():
            sphere_update(
                items,
                lr=group["lr"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                weight_decay=group["weight_decay"],
                preset=group["preset"],
                dtype=COMPUTE_DTYPES.get(group["compute_dtype"]),
            )

    def _adam_sphere(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        for param in params:
            state, grad = self.state[param], _grad(param)
            moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
            direction = adam_direction(grad, *moments, betas=group["betas"], eps=group["eps"])
            if group["lr"] == 0:
                continue
            items = [Spherical(param, grad, direction, state["radius"])]
            moves_E11 = peak(as_matrices(grad)) != 0
            project(items, as_matrices(direction), moves_E11, lr=group["lr"], weight_decay=group["weight_decay"])

    def _adamw(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        states = [self.state[param] for param in params]
        adamw(
            list(params),
            [_grad(param) for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, exactly.

        Raises:
            ValueError: If the state is another optimizer's, or its groups do not fit this one's.
        """
        pairs = [pair for group in self.param_groups for pair in named(group)]
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        check_loadable(state_dict["param_groups"], saved, pairs)
        super().load_state_dict(state_dict)
        for state, (_, param) in zip(saved, pairs, strict=True):
            if "radius" in state:
                # torch has cast it to the parameter's dtype; a radius in bfloat16 would move the sphere.
                dtype = math_dtype(param.dtype)
                self.state[param]["radius"] = state["radius"].to(device=param.device, dtype=dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict; options that an older version did not save get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key not in ("adamw_lr", "differentiable"):
                    group.setdefault(key, value)


def _add_missing(state: dict[str, Any], param: Tensor, kind: str) -> None:
    """Create the buffers that `kind` needs, where missing; those of another kind stay."""
    if kind == "sphere":
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    elif "step" not in state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
