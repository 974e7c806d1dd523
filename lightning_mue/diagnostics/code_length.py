"""Code length of tokens under a language model: nats per token, perplexity, bits per byte.

A target of -100 (torch's own mark) is not scored, as in `torch.nn.functional.cross_entropy`.

Shape legend: V vocabulary, R rows: all positions of the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.checks import require_number, value_error

#: Elements of the largest float32 temporary (64 MiB).
CHUNK_ELEMENTS = 1 << 24
#: The target of a position that is not scored.
IGNORED = -100


def token_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Code length of all targets together, and how many there are: sums, which add up over batches and ranks.

    Logits are widened to float32 a chunk of positions at a time.

    Args:
        logits: [..., V] floating point.
        targets: [...] int64, the token that each position of ``logits`` predicts; -100: not scored.

    Returns:
        Nats as a float32 scalar, 0 when nothing is scored; scored positions as an int64 scalar.

    Raises:
        ValueError: If the shapes do not fit, or the targets are no token ids.
    """
    if logits.ndim == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != targets.shape:
        raise value_error(
            "logits, targets",
            found=f"shapes {list(logits.shape)} and {list(targets.shape)}",
            expected="logits [..., vocabulary] and one target for each position, [...]",
            do="Bring the vocabulary to the last dimension, and shift logits or targets by one outside.",
        )
    if targets.dtype != torch.int64:
        do = "Pass token ids, as targets.long()."
        raise value_error("targets", found=f"{targets.dtype}", expected="token ids, int64", do=do)
    x_RV, targets_R = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = max(1, CHUNK_ELEMENTS // x_RV.shape[1])
    nats = torch.zeros((), dtype=torch.float32, device=logits.device)
    for chunk_RV, part_R in zip(x_RV.split(rows), targets_R.split(rows), strict=True):
        nats = nats + F.cross_entropy(chunk_RV.float(), part_R, ignore_index=IGNORED, reduction="sum")
    return nats, (targets_R != IGNORED).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean code length in nats per scored token, float32 scalar; NaN when nothing is scored. Arguments: `token_nats`."""
    nats, tokens = token_nats(logits, targets)
    return nats / tokens


def perplexity(logits: Tensor, targets: Tensor) -> Tensor:
    """``exp`` of `cross_entropy`: of how many equally likely tokens the model is as unsure. Arguments: `token_nats`."""
    return cross_entropy(logits, targets).exp()


def bits_per_byte(logits: Tensor, targets: Tensor, bytes_per_token: float = 1.0) -> Tensor:
    """Code length in bits per byte of text, which compares models of different tokenizers.

    Args:
        logits: See `token_nats`.
        targets: See `token_nats`.
        bytes_per_token: Mean number of bytes of a token in the text that is scored.

    Returns:
        Float32 scalar; NaN when nothing is scored.

    Raises:
        ValueError: As `token_nats`; or ``bytes_per_token`` is not above 0.
    """
    require_number("bytes_per_token", bytes_per_token, above=0)
    return cross_entropy(logits, targets) / (math.log(2) * bytes_per_token)
