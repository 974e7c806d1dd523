"""``mssp``: Vankadara, Haas, Hayward, Bordt, Breccia, arXiv:2605.14200. Maximally scale-stable MoE, Adam and SGD.

Three regimes, by what grows: I width and expert width; II width and experts; III all. Gates are sigmoids, not
normalized, and in II and III the routed sum is divided by top-k. Each cell was read against the authors' public code
(github.com/vankadara-lab/mssp-moe); rows that only the code has say so. ``mssp`` picks the regime from what moved.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, Preset, Table, register, rows

_SOURCE = "2605.14200 Table 1; wd: its public code"
_PAGE = "docs/derivations/mssp.md"
_FAN_IN = {"init": "fan_in^-1/2", "lr": "fan_in^-1", "wd": "fan_in", "eps": "d^-1"}
_VECTOR = {"eps": "d^-1"}
# Drawn at zero by the authors: a base drawn at zero is measured as the constant 0 and stays 0.
_OUTPUT = {"init": "d^-1", "lr": "d^-1", "wd": "d"}

_ADAM_DENSE = {
    **rows(_SOURCE, embedding=_VECTOR, norm=_VECTOR, bias=_VECTOR, hidden=_FAN_IN, unembedding=_OUTPUT),
    **rows(_SOURCE, "code", final_norm=_VECTOR, ffn_up=_FAN_IN, ffn_down=_FAN_IN),
    # A QK norm acts on one head, whose size stays. A shared expert is a dense FFN.
    **rows(
        _SOURCE, "derived", qk_norm={}, scalar={}, **dict.fromkeys(("shared_up", "shared_down", "modulation"), _FAN_IN)
    ),
}

_UP = {"init": "d^-1/2", "lr": "d^-1", "wd": "d"}
_DOWN = {"init": "h^-1/2", "lr": "h^-1", "wd": "h"}
_ROUTER = {"lr": "d^-1", "wd": "d", "absent_init": "d^-1/2"}


def _alike(table: Table) -> Table:
    """The table with every expert of a layer starting from the same draw."""
    experts = (Role.EXPERT_UP, Role.EXPERT_DOWN)
    return {role: replace(row, tied=role in experts) for role, row in table.items()}


_ADAM_I = rows(
    _SOURCE, router={**_ROUTER, "init": "d^-1"}, expert_up={**_UP, "eps": "d^-1"}, expert_down={**_DOWN, "eps": "d^-1"}
)
_ADAM_II = rows(
    _SOURCE,
    router={**_ROUTER, "init": "d^-1/2", "eps": "E^-1"},
    expert_up={**_UP, "eps": "E^-1"},
    # sqrt(E/h) in absolute sizes: h is fixed here, the lr's h^-1 is 1.
    expert_down={**_DOWN, "init": "E^1/2 h^-1/2", "eps": "d^-1 E^-1"},
)
_ADAM_III = _alike(
    rows(
        _SOURCE,
        router={**_ROUTER, "init": "d^-1/2", "eps": "E^-1"},
        expert_up={**_UP, "eps": "d^-1 E^-1"},
        expert_down={**_DOWN, "eps": "d^-1 E^-1"},
    )
)

# lr * wd is kept, as in the authors' AdamW groups (their SGD has no weight decay). SGD has no epsilon.
_SGD_MATRIX = {"init": "fan_in^-1/2", "lr": "fan_out fan_in^-1", "wd": "fan_in fan_out^-1"}
_SGD_VECTOR = {"lr": "d", "wd": "d^-1"}
# A bias grows as its layer's output does (mup.py).
_SGD_BIAS = {"lr": "fan_out", "wd": "fan_out^-1"}

_SGD_DENSE = {
    **rows(_SOURCE, embedding=_SGD_VECTOR, unembedding=_OUTPUT, hidden={"init": "fan_in^-1/2"}),
    **rows(_SOURCE, "derived", norm=_SGD_VECTOR, final_norm=_SGD_VECTOR, bias=_SGD_BIAS, qk_norm={}, scalar={}),
    **rows(_SOURCE, "derived", modulation={"init": "fan_in^-1/2"}),
    **rows(_SOURCE, "derived", **dict.fromkeys(("ffn_up", "ffn_down", "shared_up", "shared_down"), _SGD_MATRIX)),
}
_SGD_ROUTER = {"absent_init": "d^-1/2"}

_SGD_I = rows(
    _SOURCE,
    router={**_SGD_ROUTER, "init": "d^-1", "lr": "d^-1", "wd": "d"},
    expert_up={"init": "d^-1/2"},
    expert_down={"init": "h^-1/2"},
)
_SGD_II = rows(
    _SOURCE,
    router={**_SGD_ROUTER, "init": "d^-1/2", "lr": "E d^-1", "wd": "d E^-1"},
    expert_up={"init": "d^-1/2", "lr": "E d^-1", "wd": "d E^-1"},
    expert_down={"init": "E^1/2 h^-1/2", "lr": "E d", "wd": "E^-1 d^-1"},
)
_SGD_III = _alike(
    rows(
        _SOURCE,
        router={**_SGD_ROUTER, "init": "d^-1/2"},
        expert_up={"init": "d^-1/2", "lr": "E", "wd": "E^-1"},
        expert_down={"init": "h^-1/2", "lr": "E", "wd": "E^-1"},
    )
)

_WIDTHS = frozenset({"width", "ffn_width", "active_width"})


def _regime(regime: str, grows: str, moves: frozenset[str], adam: Table, sgd: Table) -> Parameterization:
    """Registers one regime."""
    routed = regime != "I"
    return register(
        Parameterization(
            name=f"mssp-{regime}",
            source=f"arXiv:2605.14200, regime {regime} ({grows} grow)",
            page=_PAGE,
            tables={"adam": {**_ADAM_DENSE, **adam}, "sgd": {**_SGD_DENSE, **sgd}},
            # (K*/K)^theta: theta is 1 where experts are added, else 0. The head size stays, so muP's k^-1 is 1.
            multipliers={"attention": "k^-1", **({"route": "a^-1"} if routed else {})},
            tied_output="d^-1",
            moves=moves,
            routing={"gate": frozenset({"linear"}), "scoring": frozenset({"sigmoid"})},
            fixed=frozenset({"kappa"}) if routed else frozenset(),
        )
    )


MSSP_I = _regime("I", "width and expert width", _WIDTHS | {"expert_width"}, _ADAM_I, _SGD_I)
MSSP_II = _regime("II", "width and experts", _WIDTHS | {"n_experts", "top_k"}, _ADAM_II, _SGD_II)
MSSP_III = _regime("III", "width, expert width and experts", MSSP_I.moves | MSSP_II.moves, _ADAM_III, _SGD_III)


def choose_regime(target: Axes, base: Axes) -> tuple[Parameterization, str]:
    """Picks the regime by the axes that moved (docs/derivations/mssp.md).

    Returns:
        (the regime's rule, the reason, e.g. ``"regime II, because n_experts moved and expert_width did not"``).
    """
    moved = set(target.changed(base))
    experts = " and ".join(sorted(moved & {"n_experts", "top_k"}))
    if not experts:
        rule, why, with_width = MSSP_I, "neither n_experts nor top_k moved", "h" if "expert_width" in moved else ""
    elif "expert_width" in moved:
        rule, why, with_width = MSSP_III, f"{experts} moved and expert_width too", "hE"
    else:
        rule, why, with_width = MSSP_II, f"{experts} moved and expert_width did not", "E"
    regime = rule.name.removeprefix("mssp-")
    return rule, f"regime {regime}, because {why}{_off_path(target, base, with_width)}"


def _off_path(target: Axes, base: Axes, symbols: str) -> str:
    """Says where sizes that the regime scales in proportion to the width do not."""
    ratios = target.ratios(base)
    off = [f"{symbol} x {ratios[symbol]:g}" for symbol in symbols if ratios[symbol] != ratios["d"]]
    if not off:
        return ""
    return f"; the paper scales these with the width (d x {ratios['d']:g}), found {', '.join(off)}"


_EMBEDDING, _UNEMBEDDING = r"(^|\.)embedding\.weight$", r"(^|\.)unembedding\.weight$"
_QKV, _O = r"\.attention\.w_[qkv]$", r"\.attention\.w_o$"
_EXPERT_UP, _EXPERT_DOWN, _ROUTER_W = r"\.experts\.w_(up|gate)$", r"\.experts\.w_down$", r"\.router\.weight$"
_FFN_UP, _FFN_DOWN = r"\.ffn\.w_(up|gate)$", r"\.ffn\.w_down$"

#: Multipliers of the authors' language models at width 256, for the names of `MoELanguageModel`. Its own std of every matrix is
#: fan_in^-1/2; regime II's sqrt(E/h) of the down matrix is a factor E^1/2 on that.
_SIZES = {"width": 256, "n_heads": 4, "scoring": "sigmoid", "embedding_std": 0.02, "router_init_std": 1 / 16}
_PAPER_II = Preset(
    source="public code of 2605.14200, width 256, 32 experts in every second layer",
    base={
        **_SIZES,
        "depth": 4,
        "moe_every": 2,
        "n_experts": 32,
        "top_k": 16,
        "expert_width": 32,
        "route_scale": 1 / 16,
    },
    hyperparameters={"lr": 7.74264e-3},
    factors={
        _EMBEDDING: {"lr": 32, "init": 4},
        _QKV: {"lr": 4, "init": 1 / 8},
        _O: {"init": 1 / 4},
        _FFN_UP: {"lr": 2, "init": 1 / 2},
        _FFN_DOWN: {"lr": 4, "init": 2},
        _EXPERT_UP: {"lr": 4, "init": 1 / 8},
        _EXPERT_DOWN: {"lr": 256, "init": 32**0.5},
        _ROUTER_W: {"lr": 1 / 2, "init": 1 / 32},
        _UNEMBEDDING: {"lr": 8, "init": 1 / 4},
    },
)
_PAPER_III = Preset(
    source="public code of 2605.14200, width 256, 8 experts in every layer",
    base={**_SIZES, "depth": 8, "n_experts": 8, "top_k": 4, "expert_width": 128, "route_scale": 1 / 4},
    hyperparameters={"lr": 4.64159e-3},
    factors={
        _EMBEDDING: {"lr": 16},
        _QKV: {"lr": 2},
        _O: {"lr": 2},
        _EXPERT_UP: {"lr": 2},
        _EXPERT_DOWN: {"lr": 128, "init": 4},
        _ROUTER_W: {"lr": 8},
        _UNEMBEDDING: {"lr": 8},
    },
)

MSSP = register(
    Parameterization(
        name="mssp",
        source="arXiv:2605.14200, the regime chosen by what moved",
        page=_PAGE,
        # The smallest claim, until sizes are known.
        tables=MSSP_I.tables,
        multipliers=MSSP_I.multipliers,
        tied_output=MSSP_I.tied_output,
        moves=MSSP_III.moves,
        routing=MSSP_I.routing,
        resolve=choose_regime,
        presets={"paper-II": _PAPER_II, "paper-III": _PAPER_III},
    )
)
