"""Negative controls: rules that are wrong on purpose, so that a check must find them."""

from __future__ import annotations

from dataclasses import replace

from lightning_mue.parameterizations import Parameterization, Role, get_rule


def moe_dmft_fan_in() -> Parameterization:
    """``moe-dmft`` with the fan-in draw of the experts' down matrix: what is learned outgrows what is drawn by sqrt(alpha_ffn)."""
    rule = get_rule("moe-dmft")
    table = dict(rule.tables["adam"])
    table[Role.EXPERT_DOWN] = replace(table[Role.EXPERT_DOWN], init="alpha_ffn^-1/2 d^-1/2", source="negative control")
    return replace(rule, name="moe-dmft-fan-in", source="negative control of arXiv:2601.20205", tables={"adam": table})
