"""Running a module that somebody else wrote, to see what it computes, without leaving a trace in it.

Shape legend: d width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.moe import autocast


def require_module(name: str, value: object, expected: str = "a torch.nn.Module") -> None:
    """Raise unless a value is a module.

    Raises:
        TypeError: It is not; the message names the argument and its type.
    """
    if not isinstance(value, nn.Module):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise TypeError(f"{name} is {found}, but it must be {expected}. Pass the module itself.")


def places(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer at every place that holds it, a module with two paths once."""
    found = {}
    for path, child in module.named_modules():
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """What the module returns in evaluation with the tensors in some of its `places`.

    All places of a tied tensor have to be given: functional_call's own tying leaves a module that has two paths changed.
    """
    with evaluation(module, x.device):
        return torch.func.functional_call(module, dict(tensors), (x,), tie_weights=False)


def random_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights that drive an activation over its whole range, and biases of size 1, in float32 on the CPU.

    Tied parameters have one tensor under all their names. Buffers are copies: a module may change its own.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    drawn: dict[nn.Parameter, Tensor] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if p in drawn:
            tensors[name] = drawn[p]
            continue
        # A short pattern, repeated: drawing every number of a large network would take seconds.
        pattern = torch.randn(10_007, generator=generator) * (2 / math.sqrt(min(p.shape)) if p.ndim > 1 else 1.0)
        tensors[name] = drawn[p] = pattern.repeat(-(-p.numel() // len(pattern)))[: p.numel()].view(p.shape)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        tensors[name] = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.cpu().clone()
    return tensors


@contextmanager
def evaluation(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation without gradients, autocast and forward hooks; afterwards every submodule is as it was."""
    before = [(m, m.training, m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    try:
        module.eval()
        for child, *_ in before:  # what a hook counts or records is not to see the trial
            child._forward_pre_hooks, child._forward_hooks = OrderedDict(), OrderedDict()
        with torch.no_grad(), autocast.disabled(device.type):
            yield
    finally:
        for child, mode, pre_hooks, hooks in before:
            child.training, child._forward_pre_hooks, child._forward_hooks = mode, pre_hooks, hooks


def run(module: nn.Module, tensors: Mapping[str, Tensor], width: int) -> tuple[Tensor, object]:
    """An input [2, 4, d] and what the module makes of it, or the exception that it raised."""
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    own = next((p.device for p in module.parameters() if not p.is_meta), x.device)
    result: object = None
    for device in dict.fromkeys([x.device, own]):  # a kernel may not run on the CPU
        moved = {name: tensors[name].to(device) for name in places(module)}
        try:
            result = call(module, moved, x.to(device))
        except Exception as error:  # whatever a foreign module raises is what the message has to say
            result = error
        else:
            return x, result.cpu() if isinstance(result, Tensor) else result
    return x, result
