"""The contract: the attributes by which a user's own modules join. docs/extending.md has a runnable example of each kind.

All of them are optional and read by name, so no class of this package has to be inherited from or imported.

These are read in this file only; other files call its functions:

| attribute | on | type | meaning | read by |
|---|---|---|---|---|
| ``mue_roles`` | module | mapping: name of an own parameter -> role | what each parameter does | plan, LogitsZMonitor |
| ``mue_axes`` | model | method -> mapping: axis -> size | sizes along which the model scales | plan, coordinate check |
| ``mue_multipliers`` | module | mapping: kind -> name of an own attribute | forward multipliers (floats) to set | plan, monitors |
| ``mue_branch`` | module | str: "attention", "ffn" or another | ``forward`` returns a residual branch's output | plan, monitors |
| ``mue_router`` | module | bool | the output has ``logits`` and ``counts`` | plan, monitors |
| ``mue_attention_core`` | module | bool | ``forward(q, k, v)``, causal, with a float ``scale`` | LogitsZMonitor |
| ``mue_role_of_output`` | module | str: "lm_logits" or another | what the output is | LogitsZMonitor |
| ``mue_role`` | parameter | str | role, for optimizers that see no module (`tag_roles`) | HyperSphereOptimizer |
| ``mue_split`` | parameter | int, list or dict | parts of a fused matrix (`note_splits`) | HyperSphereOptimizer |
| ``mue_family`` | optimizer | str: "adam", "sgd", "sphere", "muon" | which table holds its factors | MuECallback |
| ``mue_scaled`` | param group (key) | bool | the factors are in it already (`param_groups`) | MuECallback |
| ``active_width`` | branch | int | hidden width that a token passes through | plan |
| ``n_experts``, ``top_k``, ``expert_width`` | MoE branch | int | its sizes | plan |
| ``mue_counts_batches`` | loader | bool | its state's ``step`` counts micro-batches, and may be taken back | MuECallback |
| ``flops_per_token`` | model | method -> number | FLOPs of one token in training, forward and backward | ThroughputMonitor |

Ordinary attributes (``logits`` of a router's output, ``hparams`` of a model) are read where they are needed; docs/extending.md
lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: In a checkpoint of the Trainer: how many micro-batches since the last optimizer step its counts leave out.
REWOUND = "lightning_mue_rewound"


def declared_roles(module: object) -> Mapping[str, str]:
    """``mue_roles``: name of an own parameter of a module -> role; empty if it declares none."""
    return getattr(module, "mue_roles", None) or {}


def declared_role(parameter: object) -> str | None:
    """``mue_role``: the role noted on a parameter itself, or None."""
    return getattr(parameter, "mue_role", None)


def note_role(parameter: Any, role: str) -> None:
    """Notes a role on a parameter itself, for optimizers that see no module."""
    parameter.mue_role = role


def declared_split(parameter: object) -> Any:
    """``mue_split``: the parts of a fused matrix noted on a parameter itself, or None."""
    return getattr(parameter, "mue_split", None)


def note_split(parameter: Any, split: Any) -> None:
    """Notes the parts of a fused matrix on a parameter itself."""
    parameter.mue_split = split


def declared_axes(module: object) -> dict[str, float]:
    """``mue_axes()``: axis -> size; empty if a module has no such method."""
    declare = getattr(module, "mue_axes", None)
    return dict(declare()) if callable(declare) else {}


def declared_multipliers(module: object) -> Mapping[str, str]:
    """``mue_multipliers``: kind of forward multiplier -> name of the module's attribute that holds it; empty if none."""
    return getattr(module, "mue_multipliers", None) or {}


def branch_kind(module: object) -> str | None:
    """``mue_branch``: "attention", "ffn" or another name of the residual branch whose output a module returns, or None."""
    kind = getattr(module, "mue_branch", None)
    return kind if isinstance(kind, str) else None


def branch_sizes(branch: Any) -> dict[str, float] | None:
    """The sizes of one FFN or MoE branch by the tables' symbols A, E, a, h; a dense FFN is the MoE of one expert.

    Args:
        branch: A module with ``active_width`` and, for an MoE, ``n_experts``, ``top_k`` and ``expert_width``.

    Returns:
        Symbol -> size, or None for a module without ``active_width``.
    """
    if not hasattr(branch, "active_width"):
        return None
    active = float(branch.active_width)
    read = {"E": ("n_experts", 1.0), "a": ("top_k", 1.0), "h": ("expert_width", active)}
    return {"A": active, **{symbol: float(getattr(branch, name, other)) for symbol, (name, other) in read.items()}}


def is_router(module: object) -> bool:
    """``mue_router``: whether a module's output has ``logits`` [T, E] and ``counts`` [E]."""
    return getattr(module, "mue_router", False) is True


def is_attention_core(module: object) -> bool:
    """``mue_attention_core``: whether a module is ``forward(q, k, v)``, causal, with a float ``scale``."""
    return getattr(module, "mue_attention_core", False) is True


def role_of_output(module: object) -> str | None:
    """``mue_role_of_output``: what a module declares its output to be ("lm_logits" or another), or None."""
    return getattr(module, "mue_role_of_output", None)


def returns_lm_logits(module: object) -> bool:
    """Whether a module declares its output to be the LM logits."""
    return role_of_output(module) == "lm_logits"


def flops_per_token(module: object) -> float | None:
    """``flops_per_token()``: FLOPs of one token in training, forward and backward; None if a module has no such method."""
    count = getattr(module, "flops_per_token", None)
    return float(count()) if callable(count) else None


def declared_family(optimizer: object) -> Any:
    """``mue_family``: the family in whose table an optimizer's factors stand, or None if it does not say."""
    return getattr(optimizer, "mue_family", None)


def counts_batches(loader: object) -> bool:
    """``mue_counts_batches``: whether a loader's saved state has a ``step`` that counts its micro-batches."""
    return getattr(loader, "mue_counts_batches", False) is True
