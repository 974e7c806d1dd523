"""``mup``: Yang et al., arXiv:2203.03466. Width only."""

from __future__ import annotations

from lightning_mue.parameterizations.rules.table import Parameterization, register, rows

_VECTOR = {"eps": "d^-1"}
# The fan-in of a matrix that reads the residual stream is d, the paper's symbol; where it is not (an output projection of a fixed
# number of heads, a low-rank factor, a layer of a part that does not grow), its own fan-in is what counts.
_MATRIX = {"init": "fan_in^-1/2", "lr": "fan_in^-1", "wd": "fan_in", "eps": "d^-1"}
_OUTPUT = {"init": "fan_in^-1", "lr": "fan_in^-1", "wd": "fan_in"}

_ADAM = {
    **rows(
        "2203.03466 Table 8",
        embedding=_VECTOR,
        norm=_VECTOR,
        bias=_VECTOR,
        hidden=_MATRIX,
        ffn_up=_MATRIX,
        expert_up=_MATRIX,
        shared_up=_MATRIX,
        ffn_down=_MATRIX,
        expert_down=_MATRIX,
        shared_down=_MATRIX,
        router={**_OUTPUT, "absent_init": "d^-1/2"},
        unembedding=_OUTPUT,
    ),
    **rows("2203.03466 Table 8", final_norm=_VECTOR),
    # A QK norm acts on one head, whose size the width leaves alone.
    **rows("2203.03466 Table 8", "derived", qk_norm={}, scalar={}),
}

# SGD's weight decay is an L2 term, applied as lr * wd: that product is kept, so wd moves against lr.
_SGD_VECTOR = {"lr": "d", "wd": "d^-1"}
# A bias grows as its layer's output does: d on the residual stream, H inside an FFN, not at all on the logits.
_SGD_BIAS = {"lr": "fan_out", "wd": "fan_out^-1"}
_SGD_MATRIX = {"lr": "fan_out fan_in^-1", "wd": "fan_in fan_out^-1"}
_SGD_OUTPUT = _OUTPUT

_SGD = {
    **rows("2203.03466 Table 8, SGD", embedding=_SGD_VECTOR, norm=_SGD_VECTOR, bias=_SGD_BIAS, final_norm=_SGD_VECTOR),
    **rows("2203.03466 Table 8, SGD", hidden={"init": "fan_in^-1/2", **_SGD_MATRIX}, unembedding=_SGD_OUTPUT),
    **rows("2203.03466 Table 8, SGD", router={**_SGD_OUTPUT, "absent_init": "d^-1/2"}),
    **rows(
        "2203.03466 Table 8, SGD",
        "derived",
        ffn_up={"init": "fan_in^-1/2", **_SGD_MATRIX},
        expert_up={"init": "fan_in^-1/2", **_SGD_MATRIX},
        shared_up={"init": "fan_in^-1/2", **_SGD_MATRIX},
        ffn_down={"init": "fan_in^-1/2", **_SGD_MATRIX},
        expert_down={"init": "fan_in^-1/2", **_SGD_MATRIX},
        shared_down={"init": "fan_in^-1/2", **_SGD_MATRIX},
        qk_norm={},
        scalar={},
    ),
}

MUP = register(
    Parameterization(
        name="mup",
        source="arXiv:2203.03466",
        page="docs/derivations/mup.md",
        tables={"adam": _ADAM, "sgd": _SGD},
        multipliers={"attention": "k^-1"},
        moves=frozenset({"width", "ffn_width", "head_dim", "active_width", "expert_width"}),
    )
)
