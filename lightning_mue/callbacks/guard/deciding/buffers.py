"""The buffers that a training pass changes (running statistics of BatchNorm, counters), to undo the passes of a skipped step.

A skipped step leaves the weights alone, but the bad batch went through the forward pass: one NaN in a running mean stays there
for ever. So the changing buffers are copied before the passes of a step and put back if it is not taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.sharded import local


class ChangingBuffers:
    """Copies of the buffers that training changes.

    All are copied before the first step, and compared after its passes: those that changed are copied from then on, and any that
    shows a change later. (A version counter alone does not tell: batch normalization does not advance it.)
    """

    def __init__(self, module: nn.Module) -> None:
        self._all = [(owner, name) for owner in module.modules() for name, b in owner._buffers.items() if b is not None]
        self._changing = set(range(len(self._all)))
        self._first = True
        self._before: dict[int, tuple[Any, int, Tensor | None]] = {}

    def keep(self) -> None:
        """Before the first pass of a step."""
        self._before = {}
        for i, (owner, name) in enumerate(self._all):
            now: Any = owner._buffers.get(name)
            if now is not None:
                copy = local(now).detach().clone() if i in self._changing else None
                self._before[i] = (now, now._version, copy)

    def settle(self) -> None:
        """After the passes of a step: notes what they changed."""
        found = set()
        for i, (before, version, copy) in self._before.items():
            now: Any = self._all[i][0]._buffers.get(self._all[i][1])
            differs = now is not before or now._version != version
            if differs or (self._first and copy is not None and not torch.equal(local(now), copy)):
                found.add(i)
        self._changing = found if self._first else self._changing | found
        self._first = False

    @torch.no_grad()
    def undo(self, where: Tensor | None = None) -> None:
        """Puts the copies back; with a flag on the device only where it is not zero."""
        for i in self._changing & self._before.keys():
            (owner, name), (before, _, copy) = self._all[i], self._before[i]
            now: Any = owner._buffers[name]
            if copy is None or now is None:
                continue
            if now is not before and now.shape != before.shape:
                owner._buffers[name] = now = before
            part = local(now)
            part.copy_(copy if where is None else torch.where(where.to(part.device).bool(), copy, part))
