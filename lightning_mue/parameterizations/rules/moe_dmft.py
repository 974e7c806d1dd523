"""``moe-dmft``: Jiang, Bordelon, Pehlevan, Hanin, arXiv:2601.20205. MoE scaling at fixed sparsity, under AdamW.

The layer is ``y = (1/a) * sum_i sigmoid(g_i) E_i(x)`` over the top-a experts. Width, depth, experts and expert width
may all move as long as kappa = a/E stays. The expert's down matrix is drawn at ``alpha_ffn^-1 d^-1/2``, which is NOT fan-in.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_mue.parameterizations.rules.complete_p import COMPLETE_P
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, Preset, Row, Table, register, rows

_SOURCE = "2601.20205 Table 1"
_DENSE = COMPLETE_P.tables["adam"]

# init and lr are the paper's cells. S is complete-p's; wd undoes the lr's sizes, as there. eps is the scale of the gradient:
# the stream's d^-1, of which an expert sees E^-1 (a fraction kappa of the tokens, through the layer's 1/a).
_EXPERTS = rows(
    f"{_SOURCE}; S, wd and eps ours",
    "derived",
    router={"init": "d^-1", "lr": "d^-1 S", "wd": "d S", "eps": "E^-1 L^-1 S^-1", "absent_init": "d^-1/2"},
    expert_up={"init": "d^-1/2", "lr": "d^-1 S", "wd": "d S", "eps": "h^-1 E^-1 L^-1 S^-1"},
    expert_down={
        "init": "alpha_ffn^-1 d^-1/2",
        "lr": "alpha_ffn^-1 d^-1 S",
        "wd": "alpha_ffn d S",
        "eps": "d^-1 E^-1 L^-1 S^-1",
    },
)
# A shared expert sees every token and has no 1/a: it is a dense FFN.
_SHARED = {
    shared: replace(_DENSE[dense], source=f"{_DENSE[dense].source}, the dense FFN's row", status="derived")
    for shared, dense in ((Role.SHARED_UP, Role.FFN_UP), (Role.SHARED_DOWN, Role.FFN_DOWN))
}

_ADAM: Table = {
    **_DENSE,
    **_EXPERTS,
    **_SHARED,
    # Not trained by gradient: b_i <- b_i - eta_b (load_i - kappa), eta_b the same at every size.
    Role.BALANCE_BIAS: Row(source=_SOURCE),
}

#: Ends of names of ours and of common foreign models (Llama, Mixtral, Qwen, GPT-NeoX style).
_END = r"(\.weight)?$"
_QUERY_KEY = r"(^|\.)(w_q|w_k|q_proj|k_proj|wq|wk|query|key)" + _END
_VALUE = r"(^|\.)(w_v|v_proj|wv|value)" + _END
_DOWN = r"(^|\.)(w_down|down_proj|w2|fc_out|dense_4h_to_h)" + _END

_PAPER = Preset(
    source="2601.20205, constants found at the authors' base",
    factors={_VALUE: {"init": 1 / 16, "lr": 1 / 16}, _QUERY_KEY: {"lr": 1 / 16}, _DOWN: {"init": 1 / 4, "lr": 1 / 16}},
)

MOE_DMFT = register(
    Parameterization(
        name="moe-dmft",
        source="arXiv:2601.20205",
        page="docs/derivations/moe-dmft.md",
        tables={"adam": _ADAM},
        multipliers={**COMPLETE_P.multipliers, "route": "a^-1"},
        tied_output=COMPLETE_P.tied_output,
        betas=COMPLETE_P.betas,
        moves=COMPLETE_P.moves | {"n_experts", "top_k", "expert_width"},
        routing={"gate": frozenset({"linear"}), "scoring": frozenset({"sigmoid"})},
        fixed=frozenset({"kappa"}),
        alpha=1.0,
        # The variance of the residual stream at initialization is 1 / (L a alpha_ffn).
        invariants={"alpha_star": "d h^-1 E^-1 L^-1"},
        presets={"paper": _PAPER},
    )
)


#: gamma = 1/2: router logits of constant variance at initialization, instead of vanishing ones.
MOE_DMFT_HALF = register(
    replace(
        MOE_DMFT,
        name="moe-dmft-half",
        source="arXiv:2601.20205, gamma = 1/2",
        tables={"adam": {**_ADAM, Role.ROUTER: replace(_ADAM[Role.ROUTER], init="d^-1/2")}},
    )
)
