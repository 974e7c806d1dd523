"""What the routing kernels of both passes share: elementary functions, and what the kernels are compiled for.

Library functions of `triton.language` (`tl.sum`, `tl.max`) are avoided, see kernels/symmetric/triton.py; `tl.reduce` with the
library's own combiners is known to the interpreter by name and runs fast there.

Shape legend: T tokens, E experts, K experts per token (top-k), BT tokens of a block; EP and KP are E and K rounded up to powers of
two.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.routing.op import Settings


@triton.jit
def _sum(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _max(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def _logsumexp(x):
    """The logsumexp along the last dimension, and the softmax. A NaN makes both NaN."""
    # The maximum must not see a NaN: what it then is differs between the interpreter and a device.
    top = _max(tl.where(x == x, x, float("-inf")), 1)
    exponentials = tl.exp(x - top[:, None])
    total = _sum(exponentials, 1)
    return top + tl.log(total), exponentials / total[:, None]


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # at most 1
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


#: Elements of a tile [BT, EP]: at 4 warps 16 a thread, of which some six copies live at once, keys counting twice. More
#: would spill at E = 128 and above; fewer leaves too little in flight to hide the rounds' latency.
TILE = 2048


def mask_bytes(mask_T: Tensor | None, logits_TE: Tensor) -> Tensor:
    """Return the mask as bytes, or without one a tensor that the kernel does not read."""
    return logits_TE if mask_T is None else mask_T.contiguous().view(torch.uint8)


def constants_for(logits_TE: Tensor, mask_T: Tensor | None, s: Settings) -> dict[str, Any]:
    """Return the constants of both kernels."""
    n_experts = logits_TE.shape[1]
    padded = triton.next_power_of_2(n_experts)
    return {
        "E": n_experts,
        "EP": padded,
        "K": s.top_k,
        "KP": triton.next_power_of_2(s.top_k),
        "SIGMOID": s.scoring.startswith("sigmoid"),
        "OVER_SET": s.scoring in ("topk-softmax", "sigmoid-normalized"),
        "SQRT": s.gate == "sqrt",
        "HAS_MASK": mask_T is not None,
        "BT": max(1, min(128, TILE // padded)),
        "num_warps": 4,
    }
