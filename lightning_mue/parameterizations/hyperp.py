"""``hyperp``: Ren, Liu, Shen, Chen, arXiv:2603.28743. Muon on the Frobenius sphere.

A step on the sphere is relative to the radius, so no learning rate carries a width factor, and weight decay is a
first-order no-op. The initialization only sets the radii: fan-in for matrices, constant for the unembedding.
"""

from __future__ import annotations

from lightning_mue.parameterizations.table import Parameterization, register, rows

_LR = "L^-1/2 T^-0.32 B^1/2"
_MATRIX = {"init": "fan_in^-1/2", "lr": _LR}
_VECTOR = {"lr": _LR}

HYPERP = register(
    Parameterization(
        name="hyperp",
        source="arXiv:2603.28743",
        tables={
            "sphere": {
                **rows(
                    "2603.28743 (theory 4.7)",
                    hidden=_MATRIX,
                    ffn_up=_MATRIX,
                    ffn_down=_MATRIX,
                    expert_up=_MATRIX,
                    expert_down=_MATRIX,
                    shared_up=_MATRIX,
                    shared_down=_MATRIX,
                    router={**_MATRIX, "absent_init": "d^-1/2"},
                    unembedding=_VECTOR,
                    embedding=_VECTOR,
                    norm=_VECTOR,
                    qk_norm=_VECTOR,
                    final_norm=_VECTOR,
                    bias=_VECTOR,
                ),
                **rows("2603.28743 (theory 4.7)", "derived", scalar=_VECTOR),
            }
        },
        routing={"gate": frozenset({"sqrt"})},
        # The paper's absolute value is (2L)^-1/2; give the base that value and every depth has it.
        multipliers={"residual": "L^-1/2"},
        moves=frozenset(
            {
                "width",
                "ffn_width",
                "active_width",
                "depth",
                "tokens",
                "batch_tokens",
                "n_experts",
                "top_k",
                "expert_width",
            }
        ),
    )
)
