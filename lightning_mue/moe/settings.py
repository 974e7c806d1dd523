"""Arguments of a layer and of its router that depend on each other: checks them, and refuses those that have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from lightning_mue.checks import listed, mismatch, require_choice, require_non_negative, type_error, value_error
from lightning_mue.moe.balance import BIAS_UPDATES, SCOPES

BALANCES = ("none", "switch", "sequence", "bias")
#: Auxiliary losses, with their default coefficients.
LOSSES = {"switch": 0.01, "sequence": 0.0001}
_RATE = 0.001


class Balance(NamedTuple):
    """The balance of a layer, as `MoELayer` describes it.

    Attributes:
        kinds: Some of `BALANCES` without "none"; empty for no balance.
        scope: Over which tokens the loss takes the load.
        coef: Weight of the auxiliary loss; 0 for none.
        rate: Step size of the bias.
        update: Form of its update.
    """

    kinds: tuple[str, ...]
    scope: str
    coef: float
    rate: float
    update: str


def read_balance(
    balance: str | Sequence[str], scope: str, coef: float | None, rate: float | None, update: str | None
) -> Balance:
    """Checks the arguments of `MoELayer` that say how it is balanced.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: One is out of range, or has no effect; the message names it.
    """
    kinds = _kinds(balance)
    require_choice("balance_scope", scope, SCOPES)
    require_non_negative(aux_loss_coef=coef or 0.0, bias_update_rate=_RATE if rate is None else rate)
    if update is not None:
        require_choice("bias_update", update, BIAS_UPDATES)
    elif (coef, rate) == (LOSSES["switch"], _RATE) and kinds in ((), ("switch",), ("bias",)):
        coef = rate = None  # configs of earlier versions hold both, whatever the balance
        if kinds == ("bias",):
            _warn_of_earlier_config()
    if kinds == ("bias",) and coef:
        kinds = ("bias", "switch")
    losses = [kind for kind in kinds if kind in LOSSES]
    if not losses and coef:
        _refuse("aux_loss_coef", coef, "a balance with a loss", "balance='switch'", balance)
    if "switch" not in kinds and scope != "local":
        _refuse("balance_scope", scope, "a balance with the switch loss", "balance='switch'", balance)
    for name, value in (("bias_update_rate", rate), ("bias_update", update)):
        if "bias" not in kinds and value is not None:
            _refuse(name, value, "a balance with the bias", "balance='bias'", balance)
    default = LOSSES[losses[0]] if losses else 0.0
    return Balance(
        kinds,
        "sequence" if "sequence" in kinds else scope,
        default if coef is None else coef,
        _RATE if rate is None else rate,
        update or BIAS_UPDATES[0],
    )


def _kinds(balance: str | Sequence[str]) -> tuple[str, ...]:
    kinds = (balance,) if isinstance(balance, str) else tuple(balance) if isinstance(balance, (list, tuple)) else None
    if kinds is None:
        expected = f"one of {', '.join(BALANCES)}, or a list of them"
        raise type_error("balance", found=f"{balance!r} of type {type(balance).__name__}", expected=expected)
    for kind in kinds:
        require_choice("balance", kind, BALANCES)
    if kinds == ("none",):
        return ()
    if not kinds or "none" in kinds or len(set(kinds)) < len(kinds) or set(LOSSES) <= set(kinds):
        expected = "one of 'none', 'switch', 'sequence', 'bias', or 'bias' with one of 'switch' and 'sequence'"
        raise value_error("balance", found=repr(balance), expected=expected)
    return tuple(sorted(kinds))


def _warn_of_earlier_config() -> None:
    found = f"{LOSSES['switch']} beside bias_update_rate={_RATE} with balance='bias', as configs of earlier versions hold them"
    expected = "neither for the bias alone, which is what these meant: no loss is added"
    do = "Leave aux_loss_coef out, or set balance=['bias', 'switch'] for the loss too."
    warnings.warn(mismatch("aux_loss_coef", found=found, expected=expected, do=do), stacklevel=4)


def _refuse(name: str, value: object, needs: str, example: str, balance: object) -> None:
    found, do = f"{value!r} with balance={balance!r}, where it has no effect", f"Leave it out, or set {example}."
    raise ValueError(mismatch(name, found=found, expected=needs, do=do))


def require_consistent(choice: str, kinds: tuple[str, ...], shared_width: int, *, shared_gate: bool) -> None:
    """Refuses combinations of a layer's options that do not fit together.

    Raises:
        ValueError: With what to set instead.
    """
    if choice == "expert" and kinds:
        expected = "'none' with choice='expert', where every expert takes equally many tokens anyway"
        raise value_error("balance", found=repr("+".join(kinds)), expected=expected, do="Set balance='none'.")
    if shared_gate and not shared_width:
        expected = "a shared expert for shared_gate=True to multiply"
        raise value_error("shared_width", found=0, expected=expected, do="Give it a width.")


def require_groups(n_groups: int, n_experts: int, top_k: int, name: str = "n_groups") -> None:
    """Raises a ValueError unless the number of groups divides that of the experts and of the active experts."""
    for what, size in (("n_experts", n_experts), ("top_k", top_k)):
        if size % n_groups:
            fitting = [g for g in range(1, min(n_experts, top_k) + 1) if n_experts % g == 0 and top_k % g == 0]
            expected = f"a divisor of {what}={size}: every group has equally many experts and equally many active ones"
            do = f"With n_experts={n_experts} and top_k={top_k} it may be {listed(fitting)}."
            raise value_error(name, found=n_groups, expected=expected, do=do)


def require_active(n_experts: int, top_k: int, init_std: float | None) -> None:
    """Raises a ValueError for more active experts than there are, and for a router of zeros that has to choose."""
    if top_k > n_experts:
        expected = f"at most n_experts={n_experts}: a token cannot choose more experts than there are"
        raise value_error("top_k", found=top_k, expected=expected, do="Lower it, or add experts.")
    if init_std == 0 and top_k < n_experts:
        found = "0 for the router (router_init_std of MoELayer)"
        expected = (
            f"above 0 with top_k={top_k} of n_experts={n_experts}: all experts then tie, and the same ones always win"
        )
        do = f"Give a value such as 0.02, or make every expert active (top_k={n_experts})."
        raise value_error("init_std", found=found, expected=expected, do=do)


def require_expert_choice(scoring: str, n_groups: int) -> None:
    """Raises a ValueError for what goes together only with tokens that choose experts."""
    why = "choice='expert' has no set of experts to normalize a token's gates over."
    require_choice("scoring", scoring, ("softmax-topk", "sigmoid"), do=why)
    if n_groups > 1:
        expected = "1 with choice='expert', where every expert takes equally many tokens anyway"
        raise value_error("n_groups", found=n_groups, expected=expected)


def warn_of_constant_gates(scoring: str, choice: str, *, top_k: int, n_experts: int) -> None:
    """Warns of a router whose gates are constant: top-1 with gates normalized over the active set."""
    normalized = choice == "token" and scoring in ("topk-softmax", "sigmoid-normalized")
    if top_k == 1 and n_experts > 1 and normalized:
        other = "softmax-topk" if scoring == "topk-softmax" else "sigmoid"
        found = (
            f"1 with scoring={scoring!r}: the only gate of a token is 1, and the output gives the router no gradient"
        )
        do = f"Use scoring={other!r}, or a larger top_k."
        expected = "a gate that depends on the router where one expert is active"
        warnings.warn(mismatch("top_k", found=found, expected=expected, do=do), stacklevel=3)
