"""What a parameter does in the network: the key by which a parameterization's table is read.

A module declares the roles of the parameters that it owns directly, beside them, as a class or instance attribute:

    class Router(nn.Module):
        mue_roles = {"weight": Role.ROUTER, "balance_bias": Role.BALANCE_BIAS}

The attribute is read by name, not through a base class, so any module may declare roles without importing this
package's classes.
"""

from __future__ import annotations

from enum import Enum


class Role(str, Enum):
    """The role of one parameter (docs/theory.md section 3).

    MODULATION is a hidden matrix that starts at zero, such as that of adaLN-zero: it has no norm that a sphere could keep, so
    AdamW trains it under HyperSphereOptimizer, too. SCALAR holds single trained numbers, and parameters that act on each
    channel by itself although they have two sides, e.g. ``A_log`` of Mamba.
    """

    EMBEDDING = "embedding"
    HIDDEN = "hidden"
    MODULATION = "modulation"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    ROUTER = "router"
    BALANCE_BIAS = "balance_bias"
    NORM = "norm"
    QK_NORM = "qk_norm"
    FINAL_NORM = "final_norm"
    BIAS = "bias"
    UNEMBEDDING = "unembedding"
    SCALAR = "scalar"

    def __str__(self) -> str:
        return self.value


#: Roles of weights by which an activation is multiplied as a matrix; the others act as vectors, scalars or look-up tables.
MATRIX_ROLES = frozenset(
    {
        Role.HIDDEN,
        Role.MODULATION,
        Role.FFN_UP,
        Role.FFN_DOWN,
        Role.EXPERT_UP,
        Role.EXPERT_DOWN,
        Role.SHARED_UP,
        Role.SHARED_DOWN,
        Role.ROUTER,
        Role.UNEMBEDDING,
    }
)
