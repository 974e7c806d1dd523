"""``mup``: Yang et al., arXiv:2203.03466. Width only."""

from __future__ import annotations

from lightning_mue.parameterizations.rules.table import FFN_MATRICES, Parameterization, register, rows

_VECTOR = {"eps": "d^-1"}
# The fan-in of a matrix that reads the residual stream is d, the paper's symbol; where it is not (an output projection of a fixed
# number of heads, a low-rank factor, a layer of a part that does not grow), its own fan-in is what counts.
_MATRIX = {"init": "fan_in^-1/2", "lr": "fan_in^-1", "wd": "fan_in", "eps": "d^-1"}
_OUTPUT = {"init": "fan_in^-1", "lr": "fan_in^-1", "wd": "fan_in"}

_HIDDEN = ("hidden", *FFN_MATRICES)

_SOURCE = "2203.03466 Table 8"
_ADAM = {
    **rows(
        _SOURCE,
        **dict.fromkeys(("embedding", "norm", "bias", "final_norm"), _VECTOR),
        **dict.fromkeys(_HIDDEN, _MATRIX),
        router={**_OUTPUT, "absent_init": "d^-1/2"},
        unembedding=_OUTPUT,
    ),
    # A QK norm acts on one head, whose size the width leaves alone.
    **rows(_SOURCE, "derived", qk_norm={}, scalar={}, modulation=_MATRIX),
}

# SGD's weight decay is an L2 term, applied as lr * wd: that product is kept, so wd moves against lr.
_SGD_VECTOR = {"lr": "d", "wd": "d^-1"}
# A bias grows as its layer's output does: d on the residual stream, H inside an FFN, not at all on the logits.
_SGD_BIAS = {"lr": "fan_out", "wd": "fan_out^-1"}
_SGD_MATRIX = {"init": "fan_in^-1/2", "lr": "fan_out fan_in^-1", "wd": "fan_in fan_out^-1"}

_SGD_SOURCE = f"{_SOURCE}, SGD"
_SGD = {
    **rows(
        _SGD_SOURCE,
        **dict.fromkeys(("embedding", "norm", "final_norm"), _SGD_VECTOR),
        bias=_SGD_BIAS,
        hidden=_SGD_MATRIX,
        unembedding=_OUTPUT,
        router={**_OUTPUT, "absent_init": "d^-1/2"},
    ),
    **rows(_SGD_SOURCE, "derived", **dict.fromkeys((*FFN_MATRICES, "modulation"), _SGD_MATRIX), qk_norm={}, scalar={}),
}

MUP = register(
    Parameterization(
        name="mup",
        source="arXiv:2203.03466",
        page="docs/derivations/mup.md",
        tables={"adam": _ADAM, "sgd": _SGD},
        multipliers={"attention": "k^-1"},
        tied_output="d^-1",
        moves=frozenset({"width", "ffn_width", "head_dim", "active_width", "expert_width"}),
    )
)
