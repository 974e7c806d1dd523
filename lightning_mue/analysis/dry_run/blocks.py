"""What FSDP2 gathers: the modules that `fully_shard` wrapped, and the bytes of each, whole and while others are under way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from lightning_mue.analysis.dry_run.recording import Traffic, sent_bytes


class FSDPBlock(NamedTuple):
    """Parameters that FSDP2 gathers together.

    Attributes:
        name: Of the module.
        ranks: How many ranks they are sharded over.
        replicas: How many groups of such ranks there are (HSDP).
        weights: Bytes of the gathered weights, padding included, in the type in which they are gathered.
        gradients: Bytes of their gradients, in the type in which they are reduced.
        stays: Whether the weights stay gathered from the forward pass to the backward pass.
    """

    name: str
    ranks: int
    replicas: int
    weights: int
    gradients: int
    stays: bool


def fsdp_blocks(module: nn.Module) -> list[FSDPBlock]:
    """The FSDP2 blocks of a module, outer ones first; [] if nothing is sharded by `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule

    found: list[FSDPBlock] = []
    outer: list[str] = []
    for name, each in module.named_modules():
        if isinstance(each, FSDPModule):
            is_root = not any(name.startswith(f"{other}.") or not other for other in outer)
            outer.append(name)
            state = each._get_fsdp_state()
            found += [_block(name, group, is_root, state) for group in state._fsdp_param_groups if group.fsdp_params]
    return found


def _block(name: str, group: Any, is_root: bool, state: Any) -> FSDPBlock:
    mesh, types, weights, gradients = group.mesh_info, group.mp_policy, 0, 0
    ranks = getattr(mesh, "shard_mesh_size", 1)
    for each in group.fsdp_params:
        numel = each.padded_sharded_param_size.numel() * ranks
        weight = types.param_dtype or each.sharded_param.dtype
        weights += numel * weight.itemsize
        if each.sharded_param.requires_grad:
            gradients += numel * (types.reduce_dtype or weight).itemsize
    # The outermost module is used again at once, so FSDP2 keeps its weights unless it is told not to.
    stays = group.post_forward_mesh_info is None or (is_root and bool(state._auto_reshard_after_forward))
    return FSDPBlock(name, ranks, getattr(mesh, "replicate_mesh_size", None) or 1, weights, gradients, stays)


def block_traffic(blocks: Sequence[FSDPBlock], micro_batches: int) -> list[Traffic]:
    """The collectives of the blocks in an optimizer step of so many micro-batches, each of which reduces its gradients."""
    shared = [block for block in blocks if block.ranks > 1]
    again, trained = [b for b in shared if not b.stays], [b for b in shared if b.gradients]
    copied = [block for block in blocks if block.replicas > 1 and block.gradients]
    rows = [
        ("FSDP weights, forward", "all-gather", [(b.ranks, b.weights // b.ranks) for b in shared]),
        ("FSDP weights, backward", "all-gather", [(b.ranks, b.weights // b.ranks) for b in again]),
        ("FSDP gradients", "reduce-scatter", [(b.ranks, b.gradients) for b in trained]),
        ("HSDP gradients", "all-reduce", [(b.replicas, b.gradients // b.ranks) for b in copied]),
    ]
    return [
        Traffic(what, kind, micro_batches * len(each), micro_batches * sum(sent_bytes(kind, *one) for one in each))
        for what, kind, each in rows
        if each
    ]


def in_flight_bytes(blocks: Sequence[FSDPBlock]) -> int:
    """Most bytes of gathered weights and whole gradients at a time, in the backward pass.

    These are the weights of blocks that stay gathered, and their gradients, which wait for the end of the pass; of the
    others the weights of two neighbors, one of which is prefetched, and twice the gradients of one: they are copied into the
    input of the reduce-scatter.
    """
    kept = sum(block.weights + block.gradients for block in blocks if block.stays and block.ranks > 1)
    moving = [block for block in blocks if not block.stays and block.ranks > 1]
    weights = max((a.weights + b.weights for a, b in pairwise(moving)), default=sum(b.weights for b in moving))
    return kept + weights + 2 * max((block.gradients for block in moving), default=0)
