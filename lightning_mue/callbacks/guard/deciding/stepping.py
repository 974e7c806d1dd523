"""An optimizer whose steps a guard may keep from being taken, or take with a lower learning rate.

The guard stands in `optimizer.step` itself, on the instance. Lightning computes loss and gradients in a closure that `step`
calls: where the step is not to be taken, the closure ends by an exception that does not leave `step`, so that nothing of the
optimizer runs after it: no update, no decay, no count of steps, no hooks. Where Lightning calls `step` without a closure (with
a GradScaler, in manual optimization the user), it returns before it begins.

Both need the decision on the host. torch's fused optimizers take it on the device (`found_inf`, made for GradScaler), and
then nothing waits for it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_mue.checks import mismatch
from lightning_mue.parameterizations import ScaledStep
from lightning_mue.sharded import is_sharded


class _NotTaken(Exception):
    """Leaves an optimizer's step after its closure; never leaves `GuardedStep`."""

    def __init__(self, result: Any) -> None:
        super().__init__("the step is not taken")
        self.result = result


class GuardedStep:
    """Stands in an optimizer's `step`, from construction to `remove`.

    Args:
        optimizer: Any with `step` and `param_groups`.
        index: Its place among the trainer's optimizers.
        judge: Called with this once a step, as soon as the gradients exist, if `judged` is still False; sets `skip` or `found`.
        active: Whether a training batch runs: what steps outside of it (restoring a checkpoint does) is left alone.
    """

    def __init__(
        self, optimizer: Any, index: int, judge: Callable[[GuardedStep], None], active: Callable[[], bool]
    ) -> None:
        self.optimizer, self.index = optimizer, index
        self._judge, self._active = judge, active
        #: Of the current step: whether it was judged; whether it is not to be taken, and the same on the device; what
        #: else to do when it is not.
        self.judged = self.skip = False
        self.found: Tensor | None = None
        self.on_skip: Callable[[], None] | None = None
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._scalers: dict[str, Any] | None = None
        #: Factor on the learning rate of every group, during the step only: no scheduler sees it, or undoes it.
        self.lr_factor = 1.0
        self._own = optimizer.__dict__.get("step")
        self._inner = optimizer.step
        self._here = types.MethodType(lambda _, *args, **kwargs: self._step(*args, **kwargs), optimizer)
        optimizer.step = self._here

    @property
    def takes_device_flag(self) -> bool:
        """Whether a step can be skipped on the device: torch's fused optimizers, on plain parameters, without hooks after it.

        A hook (LossFreeBalance, QKClip) would run though the step was not taken.
        """
        groups = self.optimizer.param_groups
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in groups)
        hooks = getattr(self.optimizer, "_optimizer_step_post_hooks", {}).values()
        ours = all(isinstance(getattr(hook, "__self__", None), ScaledStep) for hook in hooks)
        return bool(fused) and ours and not any(is_sharded(p) for group in groups for p in group["params"])

    def reset(self) -> None:
        """Before a step is judged, and after it."""
        self.judged = self.skip = False
        self.found, self.on_skip = None, None

    def clear_gradients(self) -> None:
        """Drops the gradients of the optimizer's parameters."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = None

    def judge(self) -> None:
        """Has the step judged, unless it is already."""
        if not self.judged:
            self.judged = True
            self._judge(self)

    def remove(self) -> None:
        """Gives the optimizer its own `step` back, unless another has been put over this one, which then passes through."""
        self._active = lambda: False
        if self.optimizer.__dict__.get("step") is self._here:
            if self._own is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._own

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active():
            return self._inner(*args, **kwargs)
        closure = kwargs.pop("closure", None)
        if closure is None and args and callable(args[0]):
            closure, args = args[0], args[1:]
        try:
            if closure is not None:
                return self._inner(*args, closure=self._guarded(closure), **kwargs)
            self.judge()
            if self.skip:
                self.optimizer._opt_called = True  # or a scheduler warns that it steps first
                self.clear_gradients()
                if self.on_skip is not None:
                    self.on_skip()
                return None
            self._begin()
            return self._inner(*args, **kwargs)
        except _NotTaken as end:
            return end.result
        finally:
            self._end()

    def _guarded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        calls = 0

        def once() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    mismatch(
                        "optimizer",
                        found=f"{type(self.optimizer).__name__}, whose step evaluates the closure more than once",
                        expected="one that evaluates it once; between two evaluations no step can be skipped without a trace",
                        do="Leave StabilityGuard out, or take its steps in manual optimization, without a closure.",
                    )
                )
            result = closure()
            self.judge()
            if self.skip:
                raise _NotTaken(result)
            self._begin()
            return result

        return once

    def _begin(self) -> None:
        """Right before the update: the lowered learning rate, and the flag where the optimizer takes it."""
        if self.lr_factor != 1:
            self._rates = [(group, group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
            for group, rate in self._rates:
                group["lr"] = rate * self.lr_factor
        if self.found is not None:
            names = ("found_inf", "grad_scale")  # a GradScaler's, which it takes away itself
            self._scalers = {name: getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)}
            scalers = self._scalers.get("found_inf")
            self.optimizer.found_inf = self.found if scalers is None else scalers + self.found.to(scalers.device)
            self.optimizer.grad_scale = self._scalers.get("grad_scale")

    def _end(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        if self._scalers is not None:
            for name in ("found_inf", "grad_scale"):
                if name in self._scalers:
                    setattr(self.optimizer, name, self._scalers[name])
                else:
                    delattr(self.optimizer, name)
        self._rates, self._scalers = [], None
        self.reset()
