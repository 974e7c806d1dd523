"""The communication of MoE layers whose experts are sharded, and of their balance, from the sizes of the layers.

Shape legend: T tokens of a micro-batch, P ranks of the expert mesh, c = ceil(T / P), E experts, K experts per token, d width.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from lightning_mue.analysis.dry_run.recording import Traffic, sent_bytes
from lightning_mue.moe.layer import MoELayer
from lightning_mue.moe.parallel.expert_parallel import ExpertParallel
from lightning_mue.moe.parallel.replicas import FINGERPRINT

_GATE_BYTES = 4  # gates are float32 unless the model is float64


def expert_traffic(module: nn.Module, tokens: int, dtype: torch.dtype | None, micro_batches: int) -> list[Traffic]:
    """The all-to-alls and all-gathers of one rank in an optimizer step, if the router sends equally many tokens everywhere.

    Args:
        module: The model, with `Experts.parallel` set.
        tokens: T of each rank.
        dtype: The type in which rows are sent; None: that of the weights.
        micro_batches: In an optimizer step.
    """
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(what: str, kind: str, ranks: int, *handed: int) -> None:
        entry = sums[what, kind]
        entry[0] += micro_batches * len(handed)
        entry[1] += micro_batches * sum(sent_bytes(kind, ranks, each) for each in handed)

    for layer in module.modules():
        parallel = layer.experts.parallel if isinstance(layer, MoELayer) else None
        if not isinstance(layer, MoELayer) or not isinstance(parallel, ExpertParallel) or parallel.n_ranks == 1:
            continue
        ranks, weight, replicated = parallel.n_ranks, layer.router.weight, parallel.tokens == "replicated"
        mine = -(-tokens // ranks) if replicated else tokens
        number = (dtype or weight.dtype).itemsize
        gate = max(_GATE_BYTES, number)
        width = mine * layer.width
        rows, gates = layer.top_k * width * number, layer.top_k * mine * gate
        add("expert counts", "all-to-all", ranks, 8 * (layer.n_experts + ranks * FINGERPRINT * replicated))
        add("tokens to experts and back, forward", "all-to-all", ranks, rows, gates, rows)
        add("their gradients, backward", "all-to-all", ranks, rows, gates, rows)
        if replicated:
            add("outputs of token slices, forward", "all-gather", ranks, width * number)
            add(
                "gradients of token slices, backward",
                "all-gather",
                ranks,
                width * weight.dtype.itemsize,
                layer.top_k * mine * gate,
            )
    return [Traffic(*key, *sent) for key, sent in sums.items()]


def balance_traffic(module: nn.Module, world: int, micro_batches: int) -> list[Traffic]:
    """The all-reduces of the load among all ranks: one a step for biases, one a layer and micro-batch for a global loss."""
    layers = [each for each in module.modules() if isinstance(each, MoELayer)]
    rows = []
    if biased := [layer.n_experts for layer in layers if "bias" in layer.balances]:
        rows.append(Traffic("load for bias balance", "all-reduce", 1, sent_bytes("all-reduce", world, 8 * sum(biased))))
    if spread := [
        layer.n_experts for layer in layers if "switch" in layer.balances and layer.balance_scope == "global"
    ]:
        sent = micro_batches * sum(sent_bytes("all-reduce", world, 16 * experts) for experts in spread)
        rows.append(Traffic("load of the global switch loss", "all-reduce", micro_batches * len(spread), sent))
    return rows if world > 1 else []
