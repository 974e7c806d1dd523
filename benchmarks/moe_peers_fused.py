"""Other people's fused kernels of a layer of experts, where they are installed: Liger's fused MoE and SonicMoE.

Both are called through what they export, on the same weights, inputs and routing as ours. What keeps one from running (it is not
installed, the architecture, another interface than the one known here) is a reason in the table and no failure of the benchmark.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token, S = T K assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moe_peers_gpu import Contender, Routed, Shape, Weights, gate_up
from torch import Tensor


class UnavailableError(ImportError):
    """A library that cannot run here. An ImportError, which the tables show as `missing`."""


def fused_contenders(shape: Shape, weights: Weights) -> dict[str, Callable[[], Contender]]:
    """Both by name, made when called."""
    makers = {"liger": lambda: liger(weights), "sonicmoe": lambda: sonicmoe(shape, weights)}
    return {name: lambda make=make: guarded(make) for name, make in makers.items()}


def guarded(make: Callable[[], Contender]) -> Contender:
    """A contender whose errors, when made and when called, are reasons why it is unavailable."""
    contender: Contender = attempt(make)
    return Guarded(lambda r: attempt(lambda: contender.forward(r)), contender.weights)


class Guarded(Contender):
    """See `guarded`; errors of the backward pass, too."""

    def train(self, routed: Routed) -> list[Tensor | None]:
        """As `Contender.train`."""
        return attempt(lambda: super(Guarded, self).train(routed))


def attempt(call: Callable[[], Any]) -> Any:
    """The result of a call; an error becomes `UnavailableError`, but for lack of memory, which says nothing about it."""
    try:
        return call()
    except (UnavailableError, torch.OutOfMemoryError):
        raise
    except ModuleNotFoundError as error:
        raise UnavailableError(f"not installed ({error})") from error
    except Exception as error:
        raise UnavailableError(f"does not run here: {type(error).__name__}: {error}") from error


def require_capability(name: str, least: tuple[int, int], device: torch.device) -> None:
    """Refuse a device on which a library does not run."""
    if device.type != "cuda":
        raise UnavailableError(f"{name} needs a CUDA device, weights are on {device.type}")
    found = torch.cuda.get_device_capability(device)
    if found < least:
        raise UnavailableError(f"{name} needs sm{least[0]}{least[1]} or newer, this device is sm{found[0]}{found[1]}")


def liger(weights: Weights) -> Contender:
    """`LigerFusedMoEFunction` of liger-kernel 0.8: gate and up stacked as in transformers, int32 ids."""
    from liger_kernel.ops import LigerFusedMoEFunction

    require_capability("Liger's fused MoE", (8, 0), weights.w_up.device)
    both, down = gate_up(weights), weights.w_down

    def forward(r: Routed) -> Tensor:
        return LigerFusedMoEFunction.apply(r.x, both, down, r.expert_ids.int(), r.gates)

    return Contender(forward, [both, down])


def sonicmoe(shape: Shape, weights: Weights) -> Contender:
    """`moe_general_routing_inputs` of sonic-moe: gate and up row by row in turn, experts as the last dimension."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    device = weights.w_up.device
    require_capability("SonicMoE", (9, 0), device)
    interleaved = torch.stack([weights.w_gate.detach(), weights.w_up.detach()], 2).flatten(1, 2).requires_grad_()
    tokens_S = torch.arange(shape.tokens, device=device, dtype=torch.int32).repeat_interleave(shape.top_k)
    stream = torch.cuda.current_stream(device).cuda_stream

    def forward(r: Routed) -> Tensor:
        w1, w2 = interleaved.permute(1, 2, 0), weights.w_down.permute(1, 2, 0)
        ids_S = r.expert_ids.flatten().int()
        arguments = (w1, None, w2, None, shape.experts, stream, ActivationType.SWIGLU, False)
        y, _ = moe_general_routing_inputs(r.x, r.gates.flatten(), tokens_S, ids_S, *arguments)
        return y

    return Contender(forward, [interleaved, weights.w_down])
