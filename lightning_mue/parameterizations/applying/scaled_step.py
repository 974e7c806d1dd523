"""Scaled parameter groups for the duration of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.applying.folded_rows import RowFolds
from lightning_mue.parameterizations.applying.groups import Part, scaled_group, split
from lightning_mue.parameterizations.applying.rate_tags import rate_tags
from lightning_mue.parameterizations.applying.update_probe import inner_optimizer
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.reading.parameters import named_tensors
from lightning_mue.parameterizations.rules.kinds import parts_of

_MISSING = object()
#: Settings that this class sets while the groups are swapped in.
_OURS = frozenset({"params", "lr", "weight_decay", "eps", "betas", "kind", "param_names", "roles"})


class ScaledStep:
    """Swaps scaled groups into an optimizer while it updates, and the user's own groups back after.

    Splitting the groups permanently would break LR schedulers, checkpoints and LearningRateMonitor; during the update nothing else
    reads them. A closure (in Lightning forward, backward and clipping run in it) sees the user's groups, and what it changes in
    them counts for this step. The post hook is not reached if the update raises: call :meth:`restore`.

    Rows of weights that carry a forward multiplier (`FoldedRows`) are without it while the optimizer updates.

    Args:
        optimizer: Any optimizer that `family_of` knows. Of a wrapper (SAM, Lookahead) the one inside is scaled, which updates.
        plan: The plan.
        model: The module that the plan was made for.

    Raises:
        ValueError: For a parameter that the plan does not know, or groups that are scaled already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: ScalingPlan, model: nn.Module) -> None:
        self.optimizer = optimizer = inner_optimizer(optimizer)
        self.plan = plan
        self.names: dict[Tensor, str] = {p: name for name, p in named_tensors(model).items()}
        #: The user's groups, while the scaled ones are in the optimizer.
        self.own_groups: list[dict[str, Any]] | None = None
        self._scaled: list[dict[str, Any]] = []
        self._parts: list[Part] = []
        self._shape: list[tuple[Any, list[Tensor]]] = []
        self._folds = RowFolds(())
        # Splits now, so that unknown parameters and scaled groups are found before the first step.
        self._scale(optimizer.param_groups)
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @property
    def effective_lr(self) -> dict[str, Any]:
        """Role (see `rate_tags`) -> learning rate of the last step; a number, or a tensor where the user's is one."""
        return {tag: self._scaled[index]["lr"] for tag, index in self._tags}

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.restore()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._swap_in()
            return None
        if getattr(closure, "_mue_swaps", None) is self:
            return None  # a step that calls super().step(closure): the hooks of both run
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._wrap(closure)}
        return (args[0], self._wrap(closure), *args[2:]), kwargs

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def with_own_groups(*args: Any, **kwargs: Any) -> Any:
            self.restore()  # an optimizer may call its closure several times
            result = closure(*args, **kwargs)
            self._swap_in()
            return result

        with_own_groups._mue_swaps = self  # type: ignore[attr-defined]
        return with_own_groups

    def _swap_in(self) -> None:
        scaled = self._scale(self.optimizer.param_groups)
        self.own_groups, self.optimizer.param_groups = self.optimizer.param_groups, scaled
        self._folds.unfold()
        self._given = [dict(group) for group in self._scaled]

    def _scale(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Scaled groups for the user's; the split is kept between steps and only the numbers are computed again."""
        settings = [piece for group in groups for piece in parts_of(group)]
        if not self._is_split(settings):
            self._parts = split(groups, self.plan, self.names, by_role=False)
            self._shape = [(piece.get("kind"), list(piece["params"])) for piece in settings]
            self._tags = rate_tags(self._parts, groups)
            entries = {entry.name: entry for entry in self.plan.parameters if entry.rows is not None}
            held = [p for part in self._parts for p in part.params if self.names.get(p) in entries]
            self._folds = RowFolds((p, entries[self.names[p]]) for p in held)
        self._scaled = []
        for part in self._parts:
            scaled = scaled_group(settings[part.source], part, self.plan.betas)
            scaled["params"], scaled["roles"] = part.params, tuple(part.roles)
            self._scaled.append(scaled)
        return self._scaled

    def _is_split(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """True if the groups hold what they held when they were split."""
        if len(groups) != len(self._shape) or any(part.entry is None for part in self._parts):
            return False  # a frozen parameter may have been unfrozen
        return all(
            group.get("kind") == kind and len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, (kind, params) in zip(groups, self._shape, strict=True)
        )

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = self.own_groups
        self.restore()
        if own is not None:
            self._keep_changes(own)

    def _keep_changes(self, own: list[dict[str, Any]]) -> None:
        """Copies what the optimizer stored in the scaled groups (a step count, say) to the user's groups."""
        noted: dict[tuple[int, str], Any] = {}
        for part, group, given in zip(self._parts, self._scaled, self._given, strict=True):
            if len(group) == len(given) and all(map(is_, group.values(), given.values())):
                continue
            for key, value in group.items():
                if value is given.get(key, _MISSING):
                    continue
                before = noted.setdefault((part.group, key), value)
                if key in _OURS or not _same(before, value):
                    raise value_error(
                        "optimizer",
                        found=f"{type(self.optimizer).__name__} keeps {key!r} in its parameter groups, with different values "
                        "for parameters of one group",
                        expected="one value a group",
                        do="Build the optimizer from param_groups(model, plan) instead of using MuECallback's swap.",
                    )
        for (index, key), value in noted.items():
            own[index][key] = value

    def restore(self) -> None:
        """Restores the optimizer's own groups, and the multipliers in the weights; does nothing if it has them."""
        self._folds.fold()
        if self.own_groups is not None:
            self.optimizer.param_groups, self.own_groups = self.own_groups, None

    def remove(self) -> None:
        """Detaches from the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
