"""The padding mask that a model is called with, for probes of routers in the middle of it, which see tokens and no mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.callbacks.monitors.seeing.watching import Handles
from lightning_mue.moe.masks import mask_readers


class PaddingMask:
    """The mask of the innermost call that runs now; its hooks exist while a probe is attached. It waits for no device."""

    def __init__(self, model: nn.Module) -> None:
        self._readers = mask_readers(model)
        self._masks: list[Tensor | None] = []
        self._users = 0
        self._hooks: list[Any] = []

    def attach(self) -> PaddingMask:
        """One more probe wants to know; `remove` takes that back."""
        self._users += 1
        if self._users == 1:
            self._masks = []
            self._hooks = [self._follow(module, read) for module, read in self._readers]
        return self

    def remove(self) -> None:
        """One probe less."""
        self._users -= 1
        if self._users == 0:
            for hook in self._hooks:
                hook.remove()

    @property
    def mask(self) -> Tensor | None:
        """The mask of the innermost call that runs now."""
        return self._masks[-1] if self._masks else None

    def real(self, tokens: int, shape: tuple[int, ...] = (), mask: Tensor | None = None) -> Tensor | None:
        """Which of the tokens are no padding, flat: bool [tokens]; None if there is no mask, or one of another size.

        A shape of two or more dimensions must be the mask's: tokens in another order cannot be told apart. ``mask``: that of a
        call that is over; None: that of the call that runs.
        """
        mask = self.mask if mask is None else mask
        if mask is None or mask.numel() != tokens or (len(shape) > 1 and tuple(mask.shape) != tuple(shape)):
            return None
        return mask.reshape(-1)

    def _follow(self, module: nn.Module, read: Any) -> Handles:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._masks.append(read(args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            del self._masks[-1:]

        first = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        return Handles(first, module.register_forward_hook(after, always_call=True))
