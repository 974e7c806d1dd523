"""From a transformers Mixture-of-Experts block to a `MoELayer` that computes the same.

Read by structure, not by class: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 without limited groups, and what is built
like them, of transformers 4 and 5. What was read is then checked against what the block computes.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.moe.convert.transformers_state import state_dict_from_transformers
from lightning_mue.moe.convert.trial import call, places, require_module
from lightning_mue.moe.convert.upcycling import empty_layer
from lightning_mue.moe.layer import MoELayer
from lightning_mue.parameterizations.applying.initial_weights import keep_weights

#: Relative error of a typical token below which two results are one function. In half precision the block's own router,
#: which computes in it, chooses other experts for some tokens.
_SAME = {torch.float64: 1e-4, torch.float32: 1e-4}
_SAME_IN_HALF = 0.05


def moe_from_transformers(
    block: nn.Module, *, verify: bool = True, layer_class: type[MoELayer] = MoELayer, **layer_arguments: Any
) -> MoELayer:
    """Make a layer of a block's weights and settings. The block is left as it is and shares no memory with the layer.

    Args:
        block: A block with a router (`gate` or `router`), `experts` with ``gate_up_proj`` and ``down_proj``, stacked or as a
            list of modules, and optionally a shared expert with or without a gate.
        verify: Whether to run block and layer on a few tokens and compare. Without it, or on the meta device, a block that
            does not say whether its gates are normalized over the chosen experts is taken to normalize them.
        layer_class: `MoELayer` or a subclass with its arguments.
        **layer_arguments: Further arguments of `MoELayer`, such as ``backend`` or ``balance``. By default `balance` is "bias"
            where the block has a correction bias and "none" elsewhere: a transformers model adds its auxiliary loss itself.

    Returns:
        A layer of the block's dtype, device, mode and ``requires_grad``.

    Raises:
        TypeError: `block` is no module.
        ValueError: The block cannot be read, asks for what a `MoELayer` does not do, or computes something else.
    """
    require_module("block", block)
    if not is_moe_block(block):
        raise ValueError(
            f"block: {type(block).__name__} is no Mixture-of-Experts block that can be read: expected modules `gate` (or "
            f"`router`) with a weight [E, d], and `experts`; found {[name for name, _ in block.named_children()] or 'none'}. "
            "Pass the block itself, e.g. model.model.layers[0].mlp; a dense network goes to MoELayer.from_ffn."
        )
    _refuse_what_differs(block)
    state = state_dict_from_transformers(block.state_dict())
    scorings = _scorings(block, state)
    settings = _settings(block, state)
    layer = empty_layer(layer_class, state["router.weight"], **{**settings, "scoring": scorings[0], **layer_arguments})
    layer.load_state_dict(state, assign=True)
    _follow(layer, block)
    if verify and not state["router.weight"].is_meta:
        _choose_scoring(block, layer, (layer_arguments["scoring"],) if "scoring" in layer_arguments else scorings)
    layer.train(block.training)
    keep_weights(layer)
    return layer


def is_moe_block(module: nn.Module) -> bool:
    """Whether a module looks like a transformers MoE block: a linear router beside experts."""
    router = router_of(module)
    weight = getattr(router, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(module, MoELayer)
        and "experts" in module._modules
    )


def router_of(block: nn.Module) -> nn.Module | None:
    """The router of a block, if it has one."""
    return block._modules.get("gate") or block._modules.get("router")


def run_block(block: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Any:
    """What a block returns in evaluation, without gradients, autocast and hooks, with some weights exchanged."""
    exchanged: dict[Tensor, Tensor] = {block.get_parameter(name): tensor for name, tensor in (weights or {}).items()}
    exchanged |= {buffer: buffer.clone() for buffer in block.buffers()}  # a block may change its own
    tensors = {place: exchanged[t] for place, t in places(block).items() if t in exchanged}
    return call(block, tensors, x.clone())


class _Owner(NamedTuple):
    """Where settings may stand: on the router, the block or its config, under several names."""

    places: tuple[object, ...]

    def get(self, *names: str, default: Any = None) -> Any:
        for place in self.places:
            for name in names:
                value = getattr(place, name, None)
                if value is not None:
                    return value
        return default


def _owner(block: nn.Module) -> _Owner:
    return _Owner((router_of(block), block, getattr(block, "config", None)))


def _refuse_what_differs(block: nn.Module) -> None:
    owner = _owner(block)
    groups, chosen = owner.get("n_group", "num_group", default=1), owner.get("topk_group", default=1)
    if groups > 1 and chosen < groups:
        raise ValueError(
            f"block: {type(block).__name__} chooses {chosen} of {groups} groups and experts inside them (n_group={groups}, "
            f"topk_group={chosen}). MoELayer's groups are others: it takes equally many experts from every group. Only blocks "
            "that choose freely (n_group=1, or topk_group=n_group) can be read."
        )
    jitter = owner.get("jitter_noise", "input_jitter_noise", "router_jitter_noise", default=0.0)
    if jitter:
        raise ValueError(
            f"block: {type(block).__name__} multiplies its whole input by noise in training (jitter {jitter}), the experts' too; "
            "MoELayer only its router's. Set the block's jitter to 0, and pass jitter= if you want the router's."
        )


def _scorings(block: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
    """The scorings that the block may have, the likeliest first."""
    normalized = _owner(block).get("norm_topk_prob")
    sigmoid = any(name.endswith("e_score_correction_bias") for name in block.state_dict())
    pair = ("sigmoid-normalized", "sigmoid") if sigmoid else ("topk-softmax", "softmax-topk")
    return pair if normalized is None else pair[:1] if normalized else pair[1:]


def _settings(block: nn.Module, state: dict[str, Tensor]) -> dict[str, Any]:
    owner = _owner(block)
    n_experts, expert_width, width = state["experts.w_up"].shape
    top_k = owner.get("top_k", "num_experts_per_tok")
    if top_k is None:
        raise ValueError(
            f"block: {type(block).__name__} does not say how many experts a token gets. Set `block.top_k` to that number."
        )
    shared = state.get("shared.w_up")
    return {
        "width": width,
        "expert_width": expert_width,
        "n_experts": n_experts,
        "top_k": int(top_k),
        "activation": _activation(block),
        "shared_width": 0 if shared is None else len(shared),
        "shared_gate": "shared_gate.weight" in state,
        "route_scale": float(owner.get("routed_scaling_factor", default=1.0)),
        "balance": "bias" if any(name.endswith("correction_bias") for name in block.state_dict()) else "none",
    }


def _activation(block: nn.Module) -> str:
    """The one whose function the block's own has: names differ, and several name one function."""
    experts = block._modules["experts"]
    places = [experts, *experts.children()] if experts is not None else []
    found = [f for place in places for n in ("act_fn", "activation_fn", "act") if (f := getattr(place, n, None))]
    z = torch.linspace(-6, 6, 97)
    for function in found[:1]:
        for name, activation in ACTIVATIONS.items():
            if activation.gated and torch.allclose(function(z), activation.function(z), rtol=1e-5, atol=1e-6):
                return name
    known = ", ".join(name for name, activation in ACTIVATIONS.items() if activation.gated)
    raise ValueError(
        f"block: the experts of {type(block).__name__} have the activation {found[0] if found else 'nowhere to be found'}; "
        f"MoELayer's gated ones are {known}."
    )


def _follow(layer: MoELayer, block: nn.Module) -> None:
    """Take over ``requires_grad`` part by part: a part is trained if any of its weights is."""
    shared = [c for n, c in block.named_children() if n in ("shared_expert", "shared_experts", "shared_mlp")]
    pairs: list[tuple[nn.Module | None, nn.Module | None]] = [
        (layer.router, router_of(block)),
        (layer.experts, block._modules["experts"]),
        (layer.shared, shared[0] if shared else None),
        (layer.shared_gate, block._modules.get("shared_expert_gate")),
    ]
    for ours, theirs in pairs:
        if ours is not None and theirs is not None:
            ours.requires_grad_(any(p.requires_grad for p in theirs.parameters()))


def _choose_scoring(block: nn.Module, layer: MoELayer, scorings: tuple[str, ...]) -> None:
    """Set the scoring with which the layer computes what the block does."""
    weight = layer.router.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, layer.width, generator=generator).to(weight)
    # A router of its own for both: a fresh one may be zero, and then ties decide.
    rows = (torch.randn(weight.shape, generator=generator) / math.sqrt(layer.width)).to(weight)
    name = "gate.weight" if "gate" in block._modules else "router.weight"
    result = run_block(block, x, {name: rows})
    y = result[0] if isinstance(result, tuple) else result
    errors = []
    for scoring in scorings:
        layer.router.scoring = scoring
        difference = (run_block(layer, x, {"router.weight": rows}) - y.view_as(x)).double().norm(dim=-1)
        errors.append(float((difference / y.view_as(x).double().norm(dim=-1).clamp_min(1e-30)).median()))
        if errors[-1] <= _SAME.get(weight.dtype, _SAME_IN_HALF):
            _reset(layer, scoring)
            return
    raise ValueError(
        f"block: {type(block).__name__} computes something else than a MoELayer with its weights: a typical token is off by "
        f"{min(errors):.2g} relative (scoring {' or '.join(scorings)}, {layer.experts.activation}, route_scale "
        f"{layer.route_scale:g}). It cannot be read; verify=False skips this check."
    )


def _reset(layer: MoELayer, scoring: str) -> None:
    layer.hparams["scoring"] = scoring
    layer.last_routing, layer.aux_loss = None, torch.zeros((), device=layer.router.weight.device)
