"""Bytes by rank and kind, from the shapes of tensors on ``meta``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.analysis.dry_run.world import Place, local_bytes
from lightning_mue.sharded import is_sharded

#: Kind of memory -> bytes.
Bytes = dict[str, int]


def held_by_rank(module: nn.Module, optimizers: Iterable[Optimizer], ranks: Sequence[Place]) -> list[Bytes]:
    """What each rank holds all the time: weights, gradients, the optimizers' state, buffers."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kinds = {
        "weights": _count(module.parameters()),
        "gradients": _count(p for p in module.parameters() if p.requires_grad),
        "optimizer state": _count(v for state in states for v in state.values() if isinstance(v, Tensor)),
        "buffers": _count(module.buffers()),
    }
    return [{kind: _sum(tensors, place) for kind, tensors in kinds.items()} for place in ranks]


def _count(tensors: Iterable[Tensor]) -> Mapping[Any, tuple[Tensor, int]]:
    """One tensor of each shape, type and placement, and how many there are: few, however deep the model is."""
    numbers: Counter[Any] = Counter()
    examples = {}
    for tensor in tensors:
        where: Any = (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else ()  # type: ignore[attr-defined]
        key = (tuple(tensor.shape), tensor.dtype, where)
        numbers[key] += 1
        examples[key] = tensor
    return {key: (examples[key], number) for key, number in numbers.items()}


def _sum(tensors: Mapping[Any, tuple[Tensor, int]], place: Place) -> int:
    return sum(number * local_bytes(tensor, place) for tensor, number in tensors.values())


def activation_bytes(module: nn.Module, sequences: int, dtype: torch.dtype) -> Bytes:
    """The part of the activations that is known from sizes: what enters each block, and the logits of a micro-batch.

    The logits are kept in the type of the products, and in float32 with their gradient for the loss. {} for a module that
    does not have the sizes.
    """
    names = ("context_length", "depth", "width", "vocab_size")
    if not all(isinstance(getattr(module, name, None), int) for name in names):
        return {}
    length, depth, width, vocabulary = (getattr(module, name) for name in names)
    tokens = sequences * length
    return {
        "residual stream": tokens * depth * width * dtype.itemsize,
        "logits": tokens * vocabulary * (dtype.itemsize + 2 * torch.float32.itemsize),
    }
