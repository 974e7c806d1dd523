"""How a parameter was drawn, recognised from its initial values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn: ``normal`` or ``uniform`` with mean 0, ``constant``, or ``keep`` (left as it is).

    Attributes:
        kind: The distribution, as measured on the base.
        value: Standard deviation, or the constant.
    """

    kind: str
    value: float


def measure_init(tensor: Tensor) -> Init:
    """Recognises how a freshly initialized parameter of any shape was drawn.

    Returns:
        ``constant`` where all entries are equal; ``uniform`` or ``normal`` for a mean of about 0; else ``keep``.
    """
    values = tensor.detach().float().flatten()
    if values.numel() == 0:
        return Init("keep", 0.0)
    first = float(values[0])
    if bool((values == first).all()):
        return Init("constant", first)
    mean, std, peak = float(values.mean()), float(values.std(correction=0)), float(values.abs().max())
    # Five standard errors: a false alarm once in two million parameters.
    if abs(mean) > 5 * std / values.numel() ** 0.5 or values.numel() < 2:
        return Init("keep", 0.0)
    # A uniform distribution ends at sqrt(3) standard deviations; 64 normal draws go past 1.8 with near certainty.
    rms = float(values.square().mean().sqrt())
    kind = "uniform" if values.numel() >= 64 and peak < 1.8 * rms else "normal"
    return Init(kind, rms)
