"""``complete-p``: Dey et al. arXiv:2505.01618; Mlodozeniec et al. arXiv:2512.22382 ("Complete(d)P").

Dense transformers under AdamW: width, depth, batch size and duration.
"""

from __future__ import annotations

from lightning_mue.parameterizations.rules.table import Parameterization, register, rows

# The paper writes d for fan_in: see mup.py.
_HIDDEN = {"init": "fan_in^-1/2", "lr": "fan_in^-1 L^(alpha-1) S", "wd": "fan_in S", "eps": "d^-1 L^-alpha S^-1"}

_SOURCE = "2512.22382 Table 1"

_ADAM = {
    **rows(
        _SOURCE,
        embedding={"lr": "S", "wd": "S", "eps": "d^-1 S^-1"},
        hidden=_HIDDEN,
        ffn_up=_HIDDEN,
        ffn_down=_HIDDEN,
        bias={"lr": "L^(alpha-1) S", "wd": "S", "eps": "d^-1 L^-alpha S^-1"},
        norm={"lr": "L^(alpha-1) S", "wd": "S", "eps": "d^-1 L^-alpha S^-1"},
        qk_norm={"lr": "L^(alpha-1) S", "wd": "S", "eps": "L^-alpha S^-1"},
        final_norm={"lr": "S", "wd": "S", "eps": "S^-1"},
        unembedding={"init": "fan_in^-1", "lr": "fan_in^-1 S", "wd": "fan_in S", "eps": "S^-1"},
    ),
    **rows(_SOURCE, "derived", scalar={"lr": "S", "wd": "S", "eps": "S^-1"}, modulation=_HIDDEN),
}

COMPLETE_P = register(
    Parameterization(
        name="complete-p",
        source="arXiv:2505.01618, arXiv:2512.22382",
        page="docs/derivations/complete-p.md",
        tables={"adam": _ADAM},
        multipliers={"residual": "L^-alpha", "attention": "k^-1"},
        tied_output="d^-1",
        # 1 - beta scales with B / T.
        betas="B T^-1",
        moves=frozenset({"width", "ffn_width", "head_dim", "active_width", "depth", "tokens", "batch_tokens"}),
    )
)
