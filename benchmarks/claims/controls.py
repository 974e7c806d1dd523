"""Controls: rules and an optimizer that are wrong, or simpler than the rule that is claimed. Importing it registers the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from lightning_mue.parameterizations import Parameterization, Role, get_rule
from lightning_mue.parameterizations.rules.table import register


def _changed(rule: str, name: str, role: Role, **cells: str) -> Parameterization:
    """A rule with other cells in one row of its table for Adam."""
    of = get_rule(rule)
    table = {**of.tables["adam"], role: replace(of.tables["adam"][role], source="control", **cells)}
    return register(
        replace(of, name=name, source=f"control: {rule} with another row of {role}", tables={"adam": table})
    )


#: SP whose embedding alone has a rule: its rate grows with the width.
SP_EMBEDDING = _changed("sp", "sp-embedding", Role.EMBEDDING, lr="d")
#: SP with `IndependentDecay`; a name of its own, so that its runs are told from those with AdamW.
SP_DECAY = register(replace(get_rule("sp"), name="sp-decay", source="control: SP with IndependentDecay"))
#: MoE-DMFT with the fan-in draw of the experts' down matrix.
DMFT_FAN_IN = _changed("moe-dmft", "moe-dmft-fan-in", Role.EXPERT_DOWN, init="alpha_ffn^-1/2 d^-1/2")


class IndependentDecay(torch.optim.AdamW):
    """AdamW whose decay of a step is weight_decay x the schedule's factor, whatever the learning rate (arXiv:2309.14322).

    Args:
        params: Parameters or groups without rates of their own.
        lr: Learning rate at the schedule's peak.
        weight_decay: Share of a weight that a step at the peak takes away; torch's own is multiplied by the rate.
        betas: As of AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay / lr, betas=betas)
