"""How a parameter was drawn, recognised from its initial values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lightning_mue.names import all_indices

#: Kinds that are drawn anew, with mean 0.
DRAWN = ("normal", "uniform", "truncated")
#: Standard deviation of a standard normal distribution that is cut at -2 and 2.
CUT_STD = 0.8796256610342398


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn.

    Attributes:
        kind: ``normal``, ``uniform`` or ``truncated`` (a normal distribution cut at two of its standard deviations), each with
            mean 0; ``constant``; ``scaled``: the values that the module's own constructor drew, which have a form that entries
            drawn one by one would lose (an orthogonal matrix, blocks of different spread), times one number; ``keep``: left as
            it is.
        value: Standard deviation (of what is left, where a distribution is cut), the root mean square of ``scaled``, or the
            constant.
    """

    kind: str
    value: float


KINDS = ("normal", "uniform", "truncated", "constant", "scaled", "keep")
KEEP = Init("keep", 0.0)
#: Fourth moment over the squared variance; for a cut at 2: (3 Z - 28 p) Z / (Z - 4 p)^2, p the density at 2, Z the mass left.
_KURTOSIS = {"normal": 3.0, "uniform": 1.8, "truncated": 2.3655}


def recognise(table: Tensor, dim: int) -> Init:
    """How a parameter of `dim` dimensions is drawn, from quantiles of the distribution of each entry."""
    rms, mean = float(table.square().mean().sqrt()), float(table.mean())
    if abs(mean) < 1e-3 * rms:
        kurtosis = float((table / rms).pow(4).mean())
        for kind, expected in _KURTOSIS.items():
            if abs(kurtosis - expected) < 0.04:
                return Init(kind, rms)
        if 2.4 < kurtosis < 3.2:  # cut far out, or rounded
            return Init("normal", rms)
    # Another distribution: that of the target's own constructor, in the size that the plan asks for.
    return Init("scaled", rms) if dim > 1 else KEEP


def measure_init(tensor: Tensor) -> Init:
    """Recognises how a freshly initialized parameter of any shape was drawn, from its values alone.

    Returns:
        ``constant`` where all entries are equal; ``scaled`` for orthogonal matrices and others whose rows or columns differ in
        size; ``uniform``, ``truncated`` or ``normal`` for a mean of about 0; else ``keep``.
    """
    matrix = tensor.detach().float()
    values = matrix.flatten()
    if values.numel() == 0:
        return KEEP
    first = float(values[0])
    if bool((values == first).all()):
        return Init("constant", first)
    mean, std, peak = float(values.mean()), float(values.std(correction=0)), float(values.abs().max())
    rms = float(values.square().mean().sqrt())
    sparse = (
        2 * int((values == 0).sum()) >= values.numel()
    )  # an identity, or a draw of few entries: no plain distribution
    # Five standard errors: a false alarm once in two million parameters.
    if sparse or not abs(mean) <= 5 * std / values.numel() ** 0.5 or values.numel() < 2:
        return KEEP
    if is_orthogonal(matrix) or is_uneven(matrix) or (values.numel() >= 64 and peak < 1.45 * rms):  # the last: signs
        return Init("scaled", rms) if matrix.dim() > 1 else KEEP
    # A uniform distribution ends at sqrt(3) standard deviations; 64 normal draws go past 1.8 with near certainty.
    if values.numel() >= 64 and peak < 1.8 * rms:
        return Init("uniform", rms)
    # One that is cut at 2 ends at 2.274; 1024 normal draws go past 2.35 but once in 10^8 tensors.
    return Init("truncated" if values.numel() >= 1024 and peak < 2.35 * rms else "normal", rms)


def is_orthogonal(tensor: Tensor) -> bool:
    """Whether the rows (or columns) of a matrix, or of each in a stack, are orthogonal and of one length."""
    if tensor.dim() < 2:
        return False
    flat = tensor.flatten(1)
    return _orthonormal(flat) or (tensor.dim() == 3 and len(tensor) > 0 and all(map(_orthonormal, tensor)))


def _orthonormal(matrix: Tensor) -> bool:
    rows = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    if len(rows) < 2:  # a single row is orthogonal however it was drawn
        return False
    gram = rows @ rows.T
    scale = float(gram.diagonal().mean())
    return scale > 0 and float((gram / scale - torch.eye(len(rows), dtype=gram.dtype)).abs().max()) < 1e-3


def is_uneven(tensor: Tensor) -> bool:
    """Whether rows or columns of a matrix differ in size by more than entries drawn alike would (trained weights mostly do)."""
    if tensor.dim() < 2 or min(tensor.shape) == 0:
        return False
    squares = tensor.detach().double().square().flatten(1)
    mean = float(squares.mean())
    for sizes, n in ((squares.mean(1), squares.shape[1]), (squares.mean(0), squares.shape[0])):
        # The square of a normal entry has a variance of 2 of its mean's square; other distributions here have less.
        if n >= 16 and mean > 0 and float(sizes.max()) / mean > 1 + 6 * (2 / n) ** 0.5 + 60 / n:
            return True
    return False


def pool(inits: Mapping[str, Init], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Init]:
    """Averages the stds of parameters that seem to be drawn alike: the same name but for indices, shape and distribution.

    One draw of n entries shows a std to within ``1/sqrt(2n)``: 7 % for 32 x 3 entries. Layers whose stds differ by more than five
    standard errors (a std that falls with the layer's index) are left as they are.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, init in inits.items():
        if init.kind in DRAWN:
            groups[all_indices(name), shapes[name]].append(name)
    pooled = dict(inits)
    for names in groups.values():
        mean = (sum(inits[name].value ** 2 for name in names) / len(names)) ** 0.5
        error = (2 * max(1, prod(shapes[names[0]]))) ** -0.5
        if all(abs(inits[name].value / mean - 1) < 5 * error for name in names):
            kinds = [inits[name].kind for name in names]
            # A single tensor of few entries may look uniform by chance.
            kind = "normal" if "normal" in kinds else max(set(kinds), key=kinds.count)
            pooled |= {name: replace(inits[name], kind=kind, value=mean) for name in names}
    return pooled
