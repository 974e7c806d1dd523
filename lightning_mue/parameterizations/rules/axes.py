"""The sizes of a model, and the ratios between two of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.rules.monomial import SYMBOLS


@dataclass(frozen=True)
class Axes:
    """Sizes along which a model scales (docs/theory.md section 1). ``None``: unknown, its ratio counts as 1.

    A dense model is the case ``n_experts = top_k = 1``, ``expert_width = active_width = ffn_width``.

    Attributes:
        width: Residual width d.
        depth: Number of transformer blocks L.
        ffn_width: Hidden width H of a dense FFN.
        expert_width: Hidden width h of one routed expert.
        n_experts: Number of routed experts E.
        top_k: Routed experts active per token, a.
        active_width: Active FFN width A: ``H``, or ``top_k * expert_width + shared width``.
        head_dim: Attention head dimension k.
        tokens: Training length T in tokens.
        batch_tokens: Batch size B in tokens.
    """

    width: float | None = None
    depth: float | None = None
    ffn_width: float | None = None
    expert_width: float | None = None
    n_experts: float | None = None
    top_k: float | None = None
    active_width: float | None = None
    head_dim: float | None = None
    tokens: float | None = None
    batch_tokens: float | None = None

    def __post_init__(self) -> None:
        # A dense model is the MoE of one expert.
        for name in ("expert_width", "active_width"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.ffn_width)
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise value_error(f.name, found=repr(value), expected="a positive size")

    def changed(self, base: Axes) -> list[str]:
        """Names of the axes that differ from the base's."""
        mine, theirs = self.to_dict(), base.to_dict()
        # Of two dense models the FFN's width is named once, not as the width of one expert and of the active ones too.
        dense = all((axes.n_experts or 1) == 1 and axes.ffn_width is not None for axes in (self, base))
        twice = {"expert_width", "active_width"} if dense else set()
        return [name for name in mine if name in theirs and mine[name] != theirs[name] and name not in twice]

    def sizes(self) -> dict[str, float]:
        """Symbol of the tables -> absolute size, for the known axes."""
        known = self.to_dict()
        return {symbol: float(known[axis]) for symbol, axis in SYMBOLS.items() if axis in known}

    def ratios(self, base: Axes) -> dict[str, float]:
        """Symbol of the tables -> ratio target/base. An axis that either side does not know counts as unchanged."""
        mine, theirs = self.sizes(), base.sizes()
        ratio = {s: mine[s] / theirs[s] if s in mine and s in theirs else 1.0 for s in "dLHhEaAkBT"}
        ratio["S"] = math.sqrt(ratio["B"] / ratio["T"])
        ratio["kappa"] = ratio["a"] / ratio["E"]
        ratio["alpha_ffn"] = ratio["h"] / ratio["d"]
        return ratio

    def to_dict(self) -> dict[str, float]:
        """The known sizes by name."""
        return {name: size for name, size in asdict(self).items() if size is not None}
