"""Spectral diagnostics: leading singular value of a weight, how inputs align with it, and the spectrum of the QK products.

Shape legend: ``...`` matrices in a stack (experts), out, in  rows and columns, b  vectors iterated at once, T  tokens,
H  query heads, G  key heads, k  head dimension, d  residual width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mue.checks import value_error

#: A summary's entries: tokens that are not zero, sum of |cosine|, tokens with a positive cosine.
ALIGNMENT_SIZE = 3
#: Vectors that `leading_singular` iterates at once, by default.
BLOCK = 4


def leading_singular(weight: Tensor, start: Tensor | None = None, iterations: int = 8) -> tuple[Tensor, Tensor]:
    """Largest singular value and right singular vectors of each matrix, by power iteration on a block of vectors.

    Each iteration applies ``W^T W`` and orthonormalizes; at the end the best vectors within the block are taken (Rayleigh-Ritz).
    The error shrinks by ``(s_5 / s_1)^4`` an iteration for the value, where a single vector would have ``(s_2 / s_1)^4``. The
    value is never above the true one. Weights change little between two samples, so a few iterations from the last result
    suffice.

    Args:
        weight: [..., out, in], any floating dtype.
        start: The vectors that a former call returned, [..., in, b]; None: a fixed random block, and 4 times the iterations.
        iterations: At least 1.

    Returns:
        Float32 [...] the value; float32 [..., in, b] the vectors, the leading one first, of the sign that makes its largest
        entry positive. NaN where the matrix is not finite.

    Raises:
        ValueError: If ``weight`` is no matrix or empty.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        do = "Pass a matrix [out, in] or a stack of them."
        raise value_error("weight", found=f"shape {list(weight.shape)}", expected="at least one matrix", do=do)
    weight = weight.detach().float()
    v = _random_block(weight) if start is None else start
    scale = torch.linalg.vector_norm(weight, math.inf, dim=(-2, -1), keepdim=True)
    finite = scale[..., 0, 0].isfinite()
    # Squares of small weights would underflow; QR and SVD raise on NaN.
    weight = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num_(0.0, 0.0, 0.0)
    for _ in range(iterations if start is not None else 4 * iterations):
        v = torch.linalg.qr(weight.mT @ (weight @ v)).Q
    _, values, rotation = torch.linalg.svd(weight @ v, full_matrices=False)
    v = v @ rotation.mT
    largest = v[..., 0].gather(-1, v[..., 0].abs().argmax(-1, keepdim=True))
    v = v * torch.where(largest < 0, -1.0, 1.0)[..., None]
    return (values[..., 0] * scale[..., 0, 0]).where(finite, float("nan")), v


def _random_block(weight: Tensor) -> Tensor:
    """[..., in, b] orthonormal vectors, the same at every call and on every rank."""
    size, width = weight.shape[-1], min(BLOCK, *weight.shape[-2:])
    block = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(weight.device)
    return torch.linalg.qr(block).Q.expand(*weight.shape[:-2], size, width)


def stable_rank(weight: Tensor, leading: Tensor) -> Tensor:
    """``|W|_F^2 / s_1^2``, float32 [...], of matrices [..., out, in] with the leading singular values [...].

    Between 1 (one direction holds everything) and min(out, in) (all singular values are equal). NaN for a zero matrix.
    """
    weight = weight.detach().float()
    return (torch.linalg.matrix_norm(weight) / leading).square()


def alignment_summary(x: Tensor, direction: Tensor) -> Tensor:
    """The statistics of tokens' cosines with a direction, in a form that adds up over calls and ranks.

    Args:
        x: [..., in] inputs of a layer; all-zero tokens (padding) are left out.
        direction: [in], of length 1.

    Returns:
        Float32 [3]: tokens, sum of |cosine|, tokens with a positive cosine. NaN where an input is not finite.
    """
    x_Td = x.detach().flatten(0, -2) if x.ndim > 1 else x.detach().unsqueeze(0)
    x_Td = x_Td.float()
    dot_T, norm_T = x_Td @ direction, torch.linalg.vector_norm(x_Td, dim=-1)
    seen_T = norm_T != 0  # true for NaN
    cosine_T = torch.where(seen_T, dot_T / norm_T, 0.0)
    positive = torch.where(cosine_T.isnan(), cosine_T, (cosine_T > 0).float())
    return torch.stack([seen_T.sum().float(), cosine_T.abs().sum(), positive.sum()])


def mean_alignment(summary: Tensor) -> Tensor:
    """Spectral alignment: mean of ``|cosine|`` of a layer's inputs with the leading right singular vector of its weight.

    Inputs of random directions have ``sqrt(2 / (pi in))``; near 1 the layer works on one direction. NaN without tokens.
    Source: arXiv:2510.04202.
    """
    return summary[1] / summary[0]


def minority_share(summary: Tensor) -> Tensor:
    """Share of the tokens whose cosine has the rarer sign, in [0, 1/2]; its fall to 0 precedes an explosion of the loss.

    NaN without tokens. Source: arXiv:2510.04202.
    """
    positive = summary[2] / summary[0]
    return torch.minimum(positive, 1 - positive)


def qk_spectral_entropy(w_q_Hkd: Tensor, w_k_Gkd: Tensor) -> Tensor:
    """Entropy of the spectrum of each head's ``W_q^T W_k``, in nats.

    With s the singular values: the entropy of ``s^2 / sum(s^2)``. It is ln(k) when all are equal, 0 when one direction makes all
    of the logits. The d x d products never exist: with ``W_q^T = Q R`` and ``W_k^T = Q' R'`` the singular values are those of ``R
    R'^T``, k x k. Source: arXiv:2606.28116; docs/theory.md section 6.

    Args:
        w_q_Hkd: [H, k, d] the rows of the query matrix by head.
        w_k_Gkd: [G, k, d] those of the key matrix; query head i reads key head ``i // (H / G)``.

    Returns:
        Float32 [H]. NaN for a head of zeros or with values that are not finite.

    Raises:
        ValueError: If the shapes do not fit.
    """
    H, G = w_q_Hkd.shape[0], w_k_Gkd.shape[0]
    if w_q_Hkd.ndim != 3 or w_k_Gkd.ndim != 3 or w_q_Hkd.shape[1:] != w_k_Gkd.shape[1:] or G == 0 or H % G:
        found = f"shapes {list(w_q_Hkd.shape)} and {list(w_k_Gkd.shape)}"
        expected = "[query heads, k, d] and [key heads, k, d], where the query heads divide evenly among the key heads"
        raise value_error("w_q, w_k", found=found, expected=expected, do="Split the rows by head first.")
    r_Hrk, finite_H = _triangular(w_q_Hkd)
    s_Grk, finite_G = _triangular(w_k_Gkd)
    repeat = H // G
    values_Hr = torch.linalg.svdvals(r_Hrk @ s_Grk.repeat_interleave(repeat, 0).mT)
    squares_Hr = values_Hr.double().square()
    entropy_H = torch.special.entr(squares_Hr / squares_Hr.sum(-1, keepdim=True)).sum(-1).float()
    return entropy_H.where(finite_H & finite_G.repeat_interleave(repeat), float("nan"))


def _triangular(w_Hkd: Tensor) -> tuple[Tensor, Tensor]:
    """R of ``W^T = Q R`` by head, of W scaled to a largest entry of 1; and whether the head is finite."""
    w_Hkd = w_Hkd.detach().float()
    finite_H = w_Hkd.isfinite().flatten(1).all(-1)
    w_Hkd = w_Hkd.where(finite_H[:, None, None], 0.0)
    scale_H11 = w_Hkd.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.qr((w_Hkd / scale_H11).mT, mode="r").R, finite_H
