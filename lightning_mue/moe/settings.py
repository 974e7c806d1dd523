"""How a layer is balanced: checks its arguments, and refuses those that have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from lightning_mue.checks import mismatch, require_choice, require_non_negative, type_error, value_error
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
