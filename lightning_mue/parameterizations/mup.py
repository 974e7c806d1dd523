"""``mup``: Yang et al., arXiv:2203.03466. Width only."""

from __future__ import annotations

from lightning_mue.parameterizations.table import Parameterization, register, rows

_VECTOR = {"eps": "d^-1"}
_UP = {"init": "d^-1/2", "lr": "d^-1", "wd": "d", "eps": "d^-1"}
_DOWN = {"init": "fan_in^-1/2", "lr": "fan_in^-1", "wd": "fan_in", "eps": "d^-1"}
_OUTPUT = {"init": "d^-1", "lr": "d^-1", "wd": "d"}

_ADAM = {
    **rows(
        "2203.03466 Table 8",
        embedding=_VECTOR,
        norm=_VECTOR,
        bias=_VECTOR,
        hidden=_UP,
        ffn_up=_UP,
        expert_up=_UP,
        shared_up=_UP,
        ffn_down=_DOWN,
        expert_down=_DOWN,
        shared_down=_DOWN,
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
_SGD_OUTPUT = {"init": "d^-1", "lr": "d^-1", "wd": "d"}

_SGD = {
    **rows("2203.03466 Table 8, SGD", embedding=_SGD_VECTOR, norm=_SGD_VECTOR, bias=_SGD_BIAS, final_norm=_SGD_VECTOR),
    **rows("2203.03466 Table 8, SGD", hidden={"init": "d^-1/2"}, unembedding=_SGD_OUTPUT),
    **rows("2203.03466 Table 8, SGD", router={**_SGD_OUTPUT, "absent_init": "d^-1/2"}),
    **rows(
        "2203.03466 Table 8, SGD",
        "derived",
        ffn_up={"init": "d^-1/2", **_SGD_MATRIX},
        expert_up={"init": "d^-1/2", **_SGD_MATRIX},
        shared_up={"init": "d^-1/2", **_SGD_MATRIX},
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
        tables={"adam": _ADAM, "sgd": _SGD},
        multipliers={"attention": "k^-1"},
        moves=frozenset({"width", "ffn_width", "head_dim", "active_width", "expert_width"}),
    )
)
