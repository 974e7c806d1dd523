"""Runs a module of another library to see what it computes, and leaves the module unchanged.

Shape legend: d width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lightning_mue.checks import type_error
from lightning_mue.moe import autocast

_P = ParamSpec("_P")
_R = TypeVar("_R")


def require_module(name: str, value: object, expected: str = "a torch.nn.Module") -> None:
    """Raises a TypeError unless a value is a module."""
    if not isinstance(value, nn.Module):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"a value of type {type(value).__name__}"
        raise type_error(name, found=found, expected=expected, do="Pass the module itself.")


def places(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has; a module with two paths is listed once."""
    found = {}
    for path, child in module.named_modules():
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """What the module returns with other tensors at some of its `places`; afterwards every submodule is as it was.

    It runs in evaluation, without gradients, autocast and forward hooks. Give all places of a tied tensor: functional_call's
    own tying leaves a module that has two paths changed.
    """
    before = [(m, m.training, m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    try:
        module.eval()
        for child, *_ in before:  # hooks that count or record must not see the trial
            child._forward_pre_hooks, child._forward_hooks = OrderedDict(), OrderedDict()
        with torch.no_grad(), autocast.disabled(x.device.type):
            return torch.func.functional_call(module, dict(tensors), (x,), tie_weights=False)
    finally:
        for child, mode, pre_hooks, hooks in before:
            child.training, child._forward_pre_hooks, child._forward_hooks = mode, pre_hooks, hooks


def _on_cpu(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes tensors on the CPU, also where a plan builds models under ``torch.device("meta")``."""

    @wraps(function)
    def there(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return there


@_on_cpu
def random_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Random weights large enough to use an activation's whole range, and biases of size 1, in float32 on the CPU.

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


@_on_cpu
def run(module: nn.Module, tensors: Mapping[str, Tensor], width: int) -> tuple[Tensor, object]:
    """An input [2, 4, d] and the module's output for it, or the exception that it raised."""
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    own = next((p.device for p in module.parameters() if not p.is_meta), x.device)
    result: object = None
    for device in dict.fromkeys([x.device, own]):  # a kernel may not run on the CPU
        moved = {name: tensors[name].to(device) for name in places(module)}
        try:
            result = call(module, moved, x.to(device))
        except Exception as error:  # a foreign module may raise anything; the caller's message quotes it
            result = error
        else:
            return x, result.cpu() if isinstance(result, Tensor) else result
    return x, result
