"""``hyperp``: Ren, Liu, Shen, Chen, arXiv:2603.28743. Muon on the Frobenius sphere, and the baselines beside it.

A step on the sphere is relative to the radius, so no learning rate carries a width factor, and weight decay is a
first-order no-op. The initialization only sets the radii: fan-in for matrices; for the unembedding and the router, whose outputs
do not grow, d^-1 (``hyperp``, ours) or what the paper prints (``hyperp-paper``). Read against the authors' public code
(github.com/microsoft/ArchScale, ``pretrain.py`` and ``lit_gpt/``).
"""

from __future__ import annotations

from dataclasses import replace

from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import FFN_MATRICES, Parameterization, Preset, Table, register, rows

_SOURCE = "2603.28743 Table 1, eq. 8"
_LR = "L^-1/2 T^-0.32 B^1/2"
_MATRIX = {"init": "fan_in^-1/2", "lr": _LR}
_VECTOR = {"lr": _LR}
_ADAMW_SIDE: Table = {
    **rows(_SOURCE, **dict.fromkeys(("embedding", "norm", "qk_norm", "final_norm", "bias"), _VECTOR)),
    # A matrix that starts at zero has no radius. AdamW moves each entry by lr, all in agreement with the input: fan_in^-1.
    **rows(
        _SOURCE,
        "derived",
        scalar=_VECTOR,
        modulation={"init": "fan_in^-1/2", "lr": f"fan_in^-1 {_LR}", "wd": "fan_in"},
    ),
}

_PRINTED: Table = {
    **rows(
        _SOURCE,
        **dict.fromkeys(("hidden", *FFN_MATRICES), _MATRIX),
        router={**_MATRIX, "absent_init": "d^-1/2"},
        unembedding=_VECTOR,
    ),
    **_ADAMW_SIDE,
}

# Outputs with a fixed number of rows. With the printed constant std a step of lr eta moves the logits by eta * d, and Muon's
# a router's by eta * sqrt(d); the paper never sees it, because on its path d, L and T grow together and L^-1/2 T^-0.32 falls
# faster. With radii that fall as in muP they do not grow (docs/derivations/hyperp.md).
_SPHERE: Table = {
    **_PRINTED,
    Role.UNEMBEDDING: replace(_PRINTED[Role.UNEMBEDDING], init="d^-1", status="derived"),
    Role.ROUTER: replace(_PRINTED[Role.ROUTER], init="d^-1", status="derived"),
}

# Plain Muon, the comparison. lr is the ratio of the update's spectral norm (`spectral` in docs/theory.md section 5.2); wd is
# against that lr. The code applies its decay, L^-1, to the unadjusted rate, so wd undoes the shape factor of lr.
_MUON_MATRIX = {"init": "fan_in^-1/2", "lr": f"fan_out^1/2 fan_in^-1/2 {_LR}", "wd": "fan_out^-1/2 fan_in^1/2 L^-1"}
# The AdamW side of plain Muon. The code multiplies the logits by 8/L, which on its path (width = 128 L) is d^-1: folded here.
_ADAM: Table = {
    **_ADAMW_SIDE,
    **rows("2603.28743, muP++ head (folded)", "code", unembedding={"init": "d^-1", "lr": f"d^-1 {_LR}", "wd": "d"}),
}
_MUON: Table = {
    **_ADAM,
    **rows(
        "2603.28743, plain Muon; T^-0.32 taken over",
        "code",
        **dict.fromkeys(("hidden", *FFN_MATRICES), _MUON_MATRIX),
        router={**_MUON_MATRIX, "absent_init": "d^-1/2"},
    ),
}

_PAPER = Preset(
    source="2603.28743: width = 128 x depth",
    base={"depth": 8, "width": 1024, "tokens": 10.4e9, "batch_tokens": 2**21},
    hyperparameters={"lr": 0.015, "momentum": 0.95},
)

HYPERP = register(
    Parameterization(
        name="hyperp",
        source="arXiv:2603.28743",
        page="docs/derivations/hyperp.md",
        tables={"sphere": _SPHERE, "muon": _MUON, "adam": _ADAM},
        routing={"gate": frozenset({"sqrt"})},
        # The paper's absolute value is (2L)^-1/2; give the base that value and every depth has it.
        # The code's sqrt(128)/k is k^-1 too, of its head size of 128.
        multipliers={"residual": "L^-1/2", "attention": "k^-1"},
        # Ours: AdamW moves a tied table, too, by an amount that no width changes (docs/derivations/hyperp.md).
        tied_output="d^-1",
        moves=frozenset({"width", "ffn_width", "active_width", "depth", "tokens", "batch_tokens"})
        | {"n_experts", "top_k", "expert_width"},
        presets={"paper": _PAPER},
    )
)

#: The paper's own radii of unembedding and router, right on its path of d, L and T together, not for width alone.
HYPERP_PAPER = register(replace(HYPERP, name="hyperp-paper", tables={"sphere": _PRINTED}, tied_output="1"))
