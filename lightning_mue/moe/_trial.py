"""Running a module that somebody else wrote, to see what it computes, without leaving a trace in it.

Shape legend: d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mue.moe import _autocast


def random_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights that drive an activation over its whole range, and biases of size 1, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, p in module.named_parameters():
        # A short pattern, repeated: drawing every number of a large network would take seconds.
        pattern = torch.randn(10_007, generator=generator) * (2 / math.sqrt(min(p.shape)) if p.ndim > 1 else 1.0)
        tensors[name] = pattern.repeat(-(-p.numel() // len(pattern)))[: p.numel()].view(p.shape)
    for name, buffer in module.named_buffers():
        tensors[name] = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.cpu()
    return tensors


@contextmanager
def evaluation(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation without gradients and autocast; afterwards every submodule is in the mode that it was in."""
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad(), _autocast.disabled(device.type):
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def run(module: nn.Module, tensors: Mapping[str, Tensor], width: int) -> tuple[Tensor, object]:
    """An input [2, 4, d] and what the module makes of it, or the exception that it raised."""
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    own = next((p.device for p in module.parameters() if not p.is_meta), x.device)
    result: object = None
    for device in dict.fromkeys([x.device, own]):  # a kernel may not run on the CPU
        moved = {name: t.to(device) for name, t in tensors.items()}
        try:
            with evaluation(module, device):
                result = torch.func.functional_call(module, moved, (x.to(device),))
        except Exception as error:  # whatever a foreign module raises is what the message has to say
            result = error
        else:
            return x, result.cpu() if isinstance(result, Tensor) else result
    return x, result
