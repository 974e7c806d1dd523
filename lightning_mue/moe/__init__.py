"""Mixture-of-Experts layers: routing, expert compute, balance; each part usable alone."""

from __future__ import annotations

from lightning_mue.moe.balance import LossFreeBalance, router_z_loss, switch_loss, update_balance_bias
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.ffn import SwiGLU
from lightning_mue.moe.layer import MoELayer
from lightning_mue.moe.router import Router, RoutingInfo

__all__ = [
    "Experts",
    "LossFreeBalance",
    "MoELayer",
    "Router",
    "RoutingInfo",
    "SwiGLU",
    "router_z_loss",
    "switch_loss",
    "update_balance_bias",
]
