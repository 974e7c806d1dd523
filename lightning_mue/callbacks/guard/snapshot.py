"""The last good states of a run, to which a rollback returns: on each rank its own part of weights and optimizer states.

A snapshot holds weights, buffers, optimizer states, GradScaler, the state of those callbacks that describe the weights (averages of
them), and the guard's own series. It does not hold what keeps account of the run: the loops' counters, the place in the data, the
schedules (which follow the counters) and the random generators, which all go on. So the schedule of the learning rate still ends
where the run ends, and a rollback sees other data and other noise than those that went wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_mue.files import whole_file
from lightning_mue.namespaces import is_lightning
from lightning_mue.sharded import is_sharded, local

#: Entries of a parameter group that schedules drive.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum")
#: Callbacks that keep account of the run: their states go on.
_ACCOUNTS = ("Checkpoint", "EarlyStopping", "Timer", "ProgressBar")


def take(trainer: Trainer, pl_module: LightningModule, own: Callback) -> dict[str, Any]:
    """This rank's part of the run's state, in host memory."""
    return {
        "weights": [_on_host(tensor) for _, tensor in _tensors(trainer, pl_module)],
        "names": [name for name, _ in _tensors(trainer, pl_module)],
        "optimizers": [_on_host(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "plateaus": [_on_host(scheduler.state_dict()) for scheduler in _plateaus(trainer)],
        "precision": _on_host(trainer.precision_plugin.state_dict()),
        "callbacks": [_on_host(callback.state_dict()) for callback in _followers(trainer, own)],
    }


def fits(saved: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the run still has the parameters and parameter groups that a snapshot holds."""
    now = [name for name, _ in _tensors(trainer, pl_module)]
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in saved["optimizers"]]
    return saved["names"] == now and sizes == [[len(g["params"]) for g in o.param_groups] for o in trainer.optimizers]


@torch.no_grad()
def restore(saved: dict[str, Any], trainer: Trainer, pl_module: LightningModule, own: Callback) -> None:
    """Puts a snapshot back, in place, and clears the gradients; what schedules drive stays as it is now."""
    for (_, tensor), kept in zip(_tensors(trainer, pl_module), saved["weights"], strict=True):
        local(tensor).copy_(kept)
    for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
        now = optimizer.state_dict()
        state = _sharded_like(copy.deepcopy(state), now)
        for group, current in zip(state["param_groups"], now["param_groups"], strict=True):
            group.update({key: current[key] for key in _SCHEDULED if key in current})
        optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=True)
    for scheduler, state in zip(_plateaus(trainer), saved["plateaus"], strict=True):
        scheduler.load_state_dict({key: v for key, v in copy.deepcopy(state).items() if key != "last_epoch"})
    if saved["precision"]:
        trainer.precision_plugin.load_state_dict(copy.deepcopy(saved["precision"]))
    for callback, state in zip(_followers(trainer, own), saved["callbacks"], strict=True):
        if state:
            callback.load_state_dict(copy.deepcopy(state))


def _tensors(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module and of modules that callbacks hold (averaged copies), by name."""
    held = {
        f"{type(callback).__name__}.{name}.": module
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for name, module in vars(callback).items()
        if isinstance(module, nn.Module) and module is not pl_module
    }
    for prefix, module in {"": pl_module, **held}.items():
        yield from ((prefix + name, p) for name, p in module.named_parameters())
        yield from ((prefix + name, b) for name, b in module.named_buffers())


def _plateaus(trainer: Trainer) -> list[Any]:
    """Schedulers that follow a metric, which the bad stretch may have spoilt."""
    return [config.scheduler for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]


def _followers(trainer: Trainer, own: Callback) -> list[Callback]:
    accounts = lambda callback: any(is_lightning(callback, name) for name in _ACCOUNTS)  # noqa: E731
    return [c for c in trainer.callbacks if c is not own and not accounts(c)]  # type: ignore[attr-defined]


def _on_host(value: Any) -> Any:
    """A deep copy with this rank's part of each tensor, on the CPU."""
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_on_host(each) for each in value)
    return copy.deepcopy(value)


def _sharded_like(saved: Any, now: Any) -> Any:
    """The saved parts of tensors as parts of DTensors, where the optimizer's state of now has one in their place."""
    if isinstance(saved, Tensor):
        if not is_sharded(now):
            return saved.to(now.device) if isinstance(now, Tensor) else saved
        from torch.distributed.tensor import DTensor

        spec = {"shape": now.shape, "stride": now.stride(), "run_check": False}
        return DTensor.from_local(saved.to(local(now).device), now.device_mesh, now.placements, **spec)
    if isinstance(saved, dict):
        return {
            key: _sharded_like(each, now.get(key) if isinstance(now, dict) else None) for key, each in saved.items()
        }
    if isinstance(saved, (list, tuple)):
        others = now if isinstance(now, (list, tuple)) and len(now) == len(saved) else [None] * len(saved)
        return type(saved)(_sharded_like(each, other) for each, other in zip(saved, others, strict=True))
    return saved


class Snapshots:
    """The last two good states, the older first, in host memory or in a folder.

    A rollback goes to the newer one; if another follows before a new one was taken, to the older.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.steps: list[int] = []
        self._states: dict[int, dict[str, Any]] = {}
        #: Whether the newest one was returned to.
        self._used = False

    def add(self, step: int, state: dict[str, Any]) -> None:
        """Keeps a state, and drops the oldest of three."""
        self._used = False
        self._store(step, state)
        self.steps = [other for other in self.steps if other != step] + [step]
        for old in self.steps[:-2]:
            self._drop(old)
        self.steps = self.steps[-2:]

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state to go back to; None if there is none."""
        if self._used and len(self.steps) > 1:
            self._drop(self.steps.pop())
        self._used = True
        if not self.steps:
            return None
        return self.steps[-1], self._load(self.steps[-1])

    def adopt(self, steps: list[int]) -> None:
        """Takes up what an interrupted run left in the folder."""
        if self.folder is not None:
            self.steps = [step for step in steps if self._path(step).exists()]

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"guard-step={step}-rank={self.rank}.pt"

    def _store(self, step: int, state: dict[str, Any]) -> None:
        if self.folder is not None:
            try:
                with whole_file(self._path(step)) as part:
                    torch.save(state, part)
                return
            except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
                rank_zero_warn(f"StabilityGuard: {self._path(step)} was not written ({error}); it is kept in memory.")
        self._states[step] = state

    def _load(self, step: int) -> dict[str, Any]:
        if step in self._states:
            return self._states[step]
        return torch.load(self._path(step), map_location="cpu", weights_only=True)

    def _drop(self, step: int) -> None:
        self._states.pop(step, None)
        if self.folder is not None:
            self._path(step).unlink(missing_ok=True)
