"""Records the first step of every optimizer in a sampled batch: gradients, settings, and the weights before and after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.probes import UnhookedProbe
from lightning_mue.callbacks.monitors.updates.weights import SETTINGS, RoleProbe, elements, setting
from lightning_mue.parameterizations.applying.update_probe import inner_optimizer


class StepRecorder(UnhookedProbe):
    """Gives probes of weights what they measure.

    It is a probe itself, without statistics, to be told when a sample begins and ends.

    Args:
        probes: Those of the weights.
    """

    size = 0

    def __init__(self, probes: Sequence[RoleProbe]) -> None:
        super().__init__("steps")
        self._probe_of = {weight: probe for probe in probes for weight in probe.weights}
        self._steps: dict[Optimizer, _Step] = {}

    @property
    def seen(self) -> bool:
        """Whether an optimizer has begun a step in the sampled batch."""
        return bool(self._steps)

    def attach(self, device: torch.device) -> RemovableHandle:
        """Forgets the previous sample."""
        self._steps = {}
        return super().attach(device)

    def begin(self, optimizer: Optimizer) -> dict[RoleProbe, list[Tensor]]:
        """Takes gradients and weights of an optimizer that is about to update; only once a sample, if it steps several times.

        Returns:
            What is measured: probe -> its weights that this optimizer holds.
        """
        if not self.active or optimizer in self._steps:
            return {}
        self._steps[optimizer] = step = _Step(optimizer, self._probe_of)
        return step.weights

    def finish(self) -> None:
        """Compares weights that could not be compared at the end of their optimizer's step."""
        for step in self._steps.values():
            step.finish()

    def metrics(self, total: Tensor) -> dict[str, float]:
        """None of its own."""
        return {}


class _Step:
    """One step of one optimizer.

    An optimizer that does not update (a GradScaler skips it) is not compared. Of a wrapper (SAM, Lookahead) the optimizer inside
    has the settings; what the wrapper itself does to the weights belongs to the step.
    """

    def __init__(self, optimizer: Optimizer, probe_of: dict[Tensor, RoleProbe]) -> None:
        self._probe_of, self._updated = probe_of, False
        try:
            inner = inner_optimizer(optimizer)
        except ValueError:  # a wrapper of several
            inner = optimizer
        self.weights: dict[RoleProbe, list[Tensor]] = defaultdict(list)
        for group in inner.param_groups:
            for weight in group["params"]:
                if weight in probe_of and weight.requires_grad:
                    self.weights[probe_of[weight]].append(weight)
        for probe, weights in self.weights.items():
            probe.add_gradients(weights)
        self._before = {probe: probe.values(weights) for probe, weights in self.weights.items()}
        # MuECallback swaps its scaled groups out in a post hook of its own, so the settings are read before all of them; it
        # folds multipliers back into the weights there, so these are read after all of them.
        self._handles = [_first(inner, self._read_settings)]
        if inner is optimizer:
            self._handles.append(optimizer.register_step_post_hook(self._compare))

    def _read_settings(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._updated:
            return
        self._updated = True
        with torch.no_grad():
            rows = {probe: [0.0] * 2 * len(SETTINGS) for probe in self.weights}
            for group in optimizer.param_groups:
                values = [setting(group, name) for name in SETTINGS]
                for weight in group["params"]:
                    probe = self._probe_of.get(weight)
                    if probe in rows:
                        _add_settings(rows[probe], values, elements(weight, probe.ranks), probe)
                        probe.add_moments(weight, group, optimizer.state.get(weight, {}))
            table = torch.tensor(list(rows.values()), device=next(iter(rows)).total.device) if rows else None  # type: ignore[union-attr]
            for i, probe in enumerate(rows):
                assert table is not None
                probe.add_at(RoleProbe.SETTING, table[i])

    def _compare(self, *_: Any) -> None:
        if self._updated and self._before:
            with torch.no_grad():
                for probe, before in self._before.items():
                    probe.add_step(self.weights[probe], before)
            self._before = {}

    def finish(self) -> None:
        """Removes the hooks; measures what a wrapper's step did, which only ends with the batch."""
        for handle in self._handles:
            handle.remove()
        self._compare()
        self._before = {}


def _first(optimizer: Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Registers a hook for the end of an optimizer's step that runs before those that are there."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks  # ordered; torch has no public way to prepend to it
    hooks.move_to_end(handle.id, last=False)
    return handle


def _add_settings(row: list[float], values: Sequence[Any], count: float, probe: RoleProbe) -> None:
    """Adds [elements, elements x value] of each setting; values on a device are added there, without reading them."""
    for i, value in enumerate(values):
        if value is None:
            continue
        row[2 * i] += count
        if isinstance(value, Tensor) and value.device.type != "cpu":
            probe.add_at(RoleProbe.SETTING + 2 * i + 1, value.detach().float().reshape(1) * count)
        else:
            row[2 * i + 1] += float(value) * count
