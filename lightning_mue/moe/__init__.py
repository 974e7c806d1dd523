"""Mixture-of-Experts layers: routing, expert compute, balance; each part usable alone."""

from __future__ import annotations

from lightning_mue.moe.balance import load_balancing_loss, router_z_loss, switch_loss, update_balance_bias
from lightning_mue.moe.balance_callbacks import GlobalBatchBalance, LossFreeBalance
from lightning_mue.moe.convert.replacing import transformers_state_dict
from lightning_mue.moe.convert.transformers_experts import register_experts
from lightning_mue.moe.convert.transformers_state import state_dict_from_transformers, state_dict_to_transformers
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.feed_forward import FeedForward
from lightning_mue.moe.layer import MoELayer, moe_from_ffn, moe_from_transformers, replace_moe_blocks
from lightning_mue.moe.masks import follow_attention_mask, real_tokens
from lightning_mue.moe.parallel.expert_parallel import ExpertParallel, clip_grad_norm, parallelize_experts
from lightning_mue.moe.router import Router, RoutingInfo

__all__ = [
    "ExpertParallel",
    "Experts",
    "FeedForward",
    "GlobalBatchBalance",
    "LossFreeBalance",
    "MoELayer",
    "Router",
    "RoutingInfo",
    "clip_grad_norm",
    "follow_attention_mask",
    "load_balancing_loss",
    "moe_from_ffn",
    "moe_from_transformers",
    "parallelize_experts",
    "real_tokens",
    "register_experts",
    "replace_moe_blocks",
    "router_z_loss",
    "state_dict_from_transformers",
    "state_dict_to_transformers",
    "switch_loss",
    "transformers_state_dict",
    "update_balance_bias",
]
