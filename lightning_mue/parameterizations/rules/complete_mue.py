"""``complete-mue``: Peng et al., arXiv:2605.23893. From a dense FFN to any Mixture of Experts, under AdamW.

The layer is ``y = c * r * sum_i ghat_i E_i(x) + c * sum_shared E_s(x)``, gates normalized over the active set. Only
the active width A enters: c = d / A, and the down init carries sqrt(A). A dense FFN is the case a = E = 1.
"""

from __future__ import annotations

from lightning_mue.parameterizations.rules.complete_p import COMPLETE_P
from lightning_mue.parameterizations.rules.table import Parameterization, register, rows

# The fan-in of an up matrix is d: see mup.py.
_UP = {"init": "fan_in^-1/2", "lr": "fan_in^-1 L^(alpha-1) S", "wd": "fan_in S"}
_DOWN = {"init": "A^1/2 d^-1", "lr": "d^-1 L^(alpha-1) S", "wd": "d S"}
# The gradient of an FFN's weights: the residual stream's d^-1 through the multiplier c = d / A, of which one expert sees the
# fraction kappa of the tokens. For a dense FFN kappa is 1 on both sides, unless the other side is an MoE.
_EPS = {"eps": "kappa A^-1 L^-alpha S^-1"}
# A shared expert sees every token.
_SHARED_EPS = {"eps": "A^-1 L^-alpha S^-1"}
_ROUTER = {"init": "d^-1", "lr": "d^-1 L^(alpha-1) S", "wd": "d S", "eps": "L^-alpha S^-1", "absent_init": "d^-1/2"}

COMPLETE_MUE = register(
    Parameterization(
        name="complete-mue",
        source="arXiv:2605.23893",
        page="docs/derivations/complete-mue.md",
        tables={
            "adam": {
                **COMPLETE_P.tables["adam"],
                # init, lr and wd are the paper's cells; eps, and the init of a router that the base lacks, are derived.
                **rows(
                    "2605.23893 Table 2; eps ours",
                    "derived",
                    ffn_up={**_UP, **_EPS},
                    shared_up={**_UP, **_SHARED_EPS},
                    expert_up={**_UP, **_EPS},
                    ffn_down={**_DOWN, **_EPS},
                    shared_down={**_DOWN, **_SHARED_EPS},
                    expert_down={**_DOWN, **_EPS},
                    router=_ROUTER,
                ),
            }
        },
        multipliers={**COMPLETE_P.multipliers, "ffn": "d A^-1", "route": "a"},
        tied_output=COMPLETE_P.tied_output,
        betas=COMPLETE_P.betas,
        # The gates over the active set sum to 1.
        routing={"gate": frozenset({"linear"}), "scoring": frozenset({"topk-softmax", "sigmoid-normalized"})},
        moves=COMPLETE_P.moves | {"n_experts", "top_k", "expert_width"},
    )
)
