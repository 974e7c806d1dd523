"""Experts on a device mesh: what may be shared out, how their parameters are cut and drawn anew, whether tokens agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mue.sharded import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_mue.moe.experts import Experts

#: Tokens that a fingerprint looks at, and signed sums over them.
LOOKED_AT, PROJECTIONS = 16, 8
#: The number of tokens, two norms, the sums.
REMARKS = 3 + PROJECTIONS
#: Between ranks rounding makes under 0.01; other tokens make 2, and still 0.2 where they correlate by 0.96.
DIFFERENCE = 0.1


def shard(experts: Experts, mesh: DeviceMesh) -> None:
    """Replace the parameters by their shards, which keep what was noted on them (their roles)."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in experts.named_parameters(recurse=False):
        # src_data_rank: every rank cuts its part out of what it holds.
        placed = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        parameter = nn.Parameter(placed, requires_grad=weight.requires_grad)
        parameter.__dict__.update(weight.__dict__)
        experts.register_parameter(name, parameter)


@torch.no_grad()
def normal_(parameter: Tensor, std: float) -> None:
    """Draw from N(0, std^2) what one process draws, wherever the parameter lies.

    On CPU, torch draws the same numbers for every rank's shard of a DTensor: the ranks would hold copies of the same experts.
    So each draws the whole parameter there and keeps its part.
    """
    if not is_sharded(parameter) or local(parameter).device.type != "cpu":
        nn.init.normal_(parameter, std=std)
        return
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    whole = nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)
    local(parameter).copy_(local(distribute_tensor(whole, placed.device_mesh, placed.placements, src_data_rank=None)))


def check_mesh(mesh: Any) -> None:
    """Check that experts can be shared out over a mesh.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: It is no DeviceMesh.
        ValueError: It has several dimensions, or leaves this rank out.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "parallelize_experts needs a process group, and torch.distributed is not initialized. Call it in "
            "configure_model under Lightning's ModelParallelStrategy, or after torch.distributed.init_process_group."
        )
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh is {mesh!r}, but it must be a DeviceMesh. Under ModelParallelStrategy take "
            "self.device_mesh['tensor_parallel']; elsewhere make one with init_device_mesh. Under DDP every rank holds all "
            "experts, and averages their gradients with the others': it cannot share them out."
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has the dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}, but experts are shared out over one. Take a "
            "part of it, such as mesh['tensor_parallel']."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh holds the ranks {mesh.mesh.tolist()}, but this is rank {dist.get_rank()}. Take the part with it."
        )


def check_experts(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    """Check that some experts can be shared out over a mesh.

    Raises:
        ValueError: They are sharded already, or the number of ranks does not divide theirs.
    """
    if experts.parallel is not None:
        raise ValueError(
            f"{name} is shared out already, over {experts.parallel.mesh} with tokens={experts.parallel.tokens!r}. Make a new "
            "model to share it out in another way."
        )
    if experts.n_experts % mesh.size():
        divisors = [p for p in range(1, experts.n_experts + 1) if experts.n_experts % p == 0]
        raise ValueError(
            f"{name} has n_experts={experts.n_experts}, but the mesh has {mesh.size()} ranks, and every rank must hold as many "
            f"experts as the others. Change one of them; {experts.n_experts} experts go on {', '.join(map(str, divisors))} ranks."
        )
    if any(is_sharded(weight) for weight in experts.parameters()):
        raise ValueError(
            f"{name} holds parameters that are sharded already. Call parallelize_experts first, and fully_shard after it, over "
            "another mesh dimension."
        )


@torch.no_grad()
def fingerprint(x_Td: Tensor, logits_TE: Tensor) -> Tensor:
    """What ranks with the same tokens agree on, and others do not: float64 [REMARKS].

    Sums of magnitudes would concentrate: at large widths those of all batches agree. Sums with signs, relative to the
    norm, are of order 1 and differ by as much, at any width.
    """
    few = _few(len(x_Td), x_Td.device)
    parts = [t.index_select(0, few).double().flatten() for t in (x_Td, logits_TE)]
    norms = torch.stack([part.norm() for part in parts])
    units = torch.cat([part / norm.clamp(min=1e-300) for part, norm in zip(parts, norms, strict=True)])
    return torch.cat([norms.new_full((1,), len(x_Td)), norms, units @ _signs(len(units), units.device)])


def check_replicas(remarks: list[list[float]]) -> None:
    """Tokens that differ would give wrong outputs without a sign: each rank answers for a slice of its own.

    All compare with the first rank, so that all raise or none.
    """
    for rank, found in enumerate(remarks):
        difference = _difference(remarks[0], found)
        if found[:1] != remarks[0][:1] or difference > DIFFERENCE:  # NaN, in a run that has diverged, is no difference
            raise RuntimeError(
                f"parallelize_experts was called with tokens='replicated', but ranks 0 and {rank} of the mesh hold different "
                f"tokens or routes ({remarks[0][0]:g} and {found[0]:g} tokens; a sample differs by {difference:.0%} of its "
                f"norm, where rounding makes less than {DIFFERENCE:.0%}). If each rank has its own batch, use "
                "tokens='split'; else start all ranks from the same seed and give them the same batches."
            )


def _difference(a: list[float], b: list[float]) -> float:
    """Of two fingerprints, relative to the norms; not a number if one of theirs is not."""
    sizes = [abs(m - n) / max(m, n, 1e-300) for m, n in zip(a[1:3], b[1:3], strict=True)]
    squares = [(m - n) ** 2 for m, n in zip(a[3:], b[3:], strict=True)]
    worst = max(math.sqrt(sum(squares) / len(squares)), *sizes)
    return math.nan if any(map(math.isnan, a + b)) else worst


def _few(tokens: int, device: torch.device) -> Tensor:
    """Some of the tokens, at irregular distances: at regular ones all could be the first of a sequence, and so alike."""
    places = (
        torch.arange(1, LOOKED_AT + 1 if tokens else 1, device=device, dtype=torch.float64) * (math.sqrt(5) - 1) / 2
    )
    return (places.frac() * tokens).long()


def _signs(n: int, device: torch.device) -> Tensor:
    """+-1 by a hash of the index, the same on every rank: float64 [n, PROJECTIONS]."""
    hashed = torch.arange(1, n + 1, device=device) * 0x5851F42D4C957F2D
    hashed = (hashed ^ (hashed >> 32)) * 0x2545F4914F6CDD1D  # wraps around
    bits = (hashed[:, None] >> torch.arange(40, 40 + PROJECTIONS, device=device)) & 1
    return bits.double() * 2 - 1
