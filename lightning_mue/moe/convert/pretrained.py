"""Makes a layer that computes the same as a Mixture-of-Experts block of transformers.

Blocks are read by structure, not by class: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 without limited groups, and
others of the same structure, of transformers 4 and 5. The layer is then compared with the block on a few tokens.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.checks import listed, value_error
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.convert.transformers_state import state_dict_from_transformers
from lightning_mue.moe.convert.trial import call, places, require_module
from lightning_mue.moe.convert.upcycling import Layer, empty_layer
from lightning_mue.moe.settings import warn_of_constant_gates
from lightning_mue.parameterizations.applying.initial_weights import keep_weights

#: Median relative error over tokens below which block and layer are taken to be equal. In half precision the block's router
#: chooses other experts for some tokens, because it computes in half precision.
_SAME = {torch.float64: 1e-4, torch.float32: 1e-4}
_SAME_IN_HALF = 0.05


def moe_from_transformers(
    block: nn.Module, *, verify: bool = True, layer_class: type[Layer], **layer_arguments: Any
) -> Layer:
    """Makes a layer of a block's weights and settings. The block is not changed and shares no memory with the layer.

    Args:
        block: A block with a router (`gate` or `router`), `experts` with ``gate_up_proj`` and ``down_proj``, stacked or as a
            list of modules, and optionally a shared expert with or without a gate.
        verify: Whether to run block and layer on a few tokens and compare. Without it, or on the meta device, a block that
            does not say whether its gates are normalized over the chosen experts is taken to normalize them.
        layer_class: The class of the layer: `MoELayer` or a subclass with its arguments.
        **layer_arguments: Further arguments of `layer_class`, such as ``backend`` or ``balance``. By default `balance` is "bias"
            if the block has a correction bias, else "none": a transformers model adds its auxiliary loss itself.

    Returns:
        A layer of the block's dtype, device, mode and ``requires_grad``.

    Raises:
        TypeError: `block` is no module.
        ValueError: The block cannot be read, asks for what a `MoELayer` does not do, or computes something else.
    """
    require_module("block", block)
    for name in ("init_std", "router_init_std"):
        if name in layer_arguments:
            expected = "none: the weights are the block's"
            raise value_error(name, found=layer_arguments[name], expected=expected, do="Leave it out.")
    if (
        verify and layer_arguments.get("n_groups", 1) != 1
    ):  # too few tokens differ for the comparison to be sure to see it
        expected, do = (
            "none: the block chooses experts freely",
            "Leave it out; verify=False changes what the block computes.",
        )
        raise value_error("n_groups", found=layer_arguments["n_groups"], expected=expected, do=do)
    if not is_moe_block(block):
        parts = listed([name for name, _ in block.named_children()])
        found = f"{type(block).__name__} with the modules {parts}, no Mixture-of-Experts block that can be read"
        expected = "modules `gate` (or `router`) with a weight [E, d], and `experts`"
        do = "Pass the block itself, e.g. model.model.layers[0].mlp; a dense network goes to MoELayer.from_ffn."
        raise value_error("block", found=found, expected=expected, do=do)
    _refuse_unsupported(block)
    state = state_dict_from_transformers(block.state_dict())
    scorings = _scorings(block)
    settings = _settings(block, state)
    with warnings.catch_warnings():  # the scoring is not known for sure yet
        warnings.filterwarnings("ignore", message="top_k: found 1")
        layer = empty_layer(
            layer_class, state["router.weight"], **{**settings, "scoring": scorings[0], **layer_arguments}
        )
    layer.load_state_dict(state, assign=True)
    _copy_requires_grad(layer, block)
    if verify and not state["router.weight"].is_meta:
        _choose_scoring(block, layer, (layer_arguments["scoring"],) if "scoring" in layer_arguments else scorings)
    router = layer.router
    warn_of_constant_gates(router.scoring, router.choice, top_k=router.top_k, n_experts=router.n_experts)
    layer.train(block.training)
    keep_weights(layer)
    return layer


def is_moe_block(module: nn.Module) -> bool:
    """Whether a module looks like a transformers MoE block: a linear router beside experts."""
    weight = getattr(router_of(module), "weight", None)
    is_linear = isinstance(weight, Tensor) and weight.ndim == 2
    return is_linear and not isinstance(module, MoEBase) and "experts" in module._modules


def router_of(block: nn.Module) -> nn.Module | None:
    """The router of a block, if it has one."""
    return block._modules.get("gate") or block._modules.get("router")


def run_block(block: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Any:
    """What a block returns in evaluation, without gradients, autocast and hooks, with some weights replaced."""
    exchanged: dict[Tensor, Tensor] = {block.get_parameter(name): tensor for name, tensor in (weights or {}).items()}
    exchanged |= {buffer: buffer.clone() for buffer in block.buffers()}  # a block may change its own
    tensors = {place: exchanged[t] for place, t in places(block).items() if t in exchanged}
    return call(block, tensors, x.clone())


def _setting(block: nn.Module, *names: str, default: Any = None) -> Any:
    """A setting of a block under one of some names, held by its router, the block itself or its config."""
    for owner in (router_of(block), block, getattr(block, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return default


def _refuse_unsupported(block: nn.Module) -> None:
    groups, chosen = _setting(block, "n_group", "num_group", default=1), _setting(block, "topk_group", default=1)
    if groups > 1 and chosen < groups:
        chooses = f"chooses {chosen} of {groups} groups and experts inside them (n_group={groups}, topk_group={chosen})"
        expected = "one that chooses freely (n_group=1, or topk_group=n_group)"
        do = "Such a block cannot be read: the groups of a MoELayer all get equally many active experts."
        raise value_error("block", found=f"{type(block).__name__}, which {chooses}", expected=expected, do=do)
    jitter = _setting(block, "jitter_noise", "input_jitter_noise", "router_jitter_noise", default=0.0)
    if jitter:
        found = f"{type(block).__name__}, which multiplies router's and experts' input by noise in training (jitter {jitter})"
        expected = "one without noise on its experts' input: a MoELayer has noise on its router's only"
        do = "Set the block's jitter to 0, and pass jitter= if you want the router's."
        raise value_error("block", found=found, expected=expected, do=do)


def _scorings(block: nn.Module) -> tuple[str, ...]:
    """The scorings that the block may have, the likeliest first."""
    normalized = _setting(block, "norm_topk_prob")
    sigmoid = any(name.endswith("e_score_correction_bias") for name in block.state_dict())
    pair = ("sigmoid-normalized", "sigmoid") if sigmoid else ("topk-softmax", "softmax-topk")
    return pair if normalized is None else pair[:1] if normalized else pair[1:]


def _settings(block: nn.Module, state: dict[str, Tensor]) -> dict[str, Any]:
    n_experts, expert_width, width = state["experts.w_up"].shape
    top_k = _setting(block, "top_k", "num_experts_per_tok")
    if top_k is None:
        found = f"no such setting of {type(block).__name__}"
        raise value_error("block.top_k", found=found, expected="how many experts a token gets", do="Set it.")
    shared = state.get("shared.w_up")
    return {
        "width": width,
        "expert_width": expert_width,
        "n_experts": n_experts,
        "top_k": int(top_k),
        "activation": _activation(block),
        "shared_width": 0 if shared is None else len(shared),
        "shared_gate": "shared_gate.weight" in state,
        "route_scale": float(_setting(block, "routed_scaling_factor", default=1.0)),
        "balance": "bias" if any(name.endswith("correction_bias") for name in block.state_dict()) else "none",
    }


def _activation(block: nn.Module) -> str:
    """The name of the block's activation, found by its values: libraries have several names for one function."""
    experts = block._modules["experts"]
    places = [experts, *experts.children()] if experts is not None else []
    found = [f for place in places for n in ("act_fn", "activation_fn", "act") if (f := getattr(place, n, None))]
    z = torch.linspace(-6, 6, 97, device="cpu")  # also under torch.device("meta"), where a plan builds models
    for function in found[:1]:
        for name, activation in ACTIVATIONS.items():
            if activation.gated and torch.allclose(function(z), activation.function(z), rtol=1e-5, atol=1e-6):
                return name
    known = listed([name for name, activation in ACTIVATIONS.items() if activation.gated])
    what = f"experts with the activation {found[0]}" if found else "experts without an activation that can be read"
    raise value_error("block", found=f"{type(block).__name__}: {what}", expected=f"the function of one of {known}")


def _copy_requires_grad(layer: MoEBase, block: nn.Module) -> None:
    """Copies ``requires_grad`` part by part: a part is trained if any of the block's weights in it is."""
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


def _choose_scoring(block: nn.Module, layer: MoEBase, scorings: tuple[str, ...]) -> None:
    """Sets the scoring with which the layer computes the same as the block."""
    weight = layer.router.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, layer.width, generator=generator).to(weight)
    # The same random router for both: the block's own may be zero, and then all scores tie.
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
            layer.hparams["scoring"] = scoring  # type: ignore[index,operator,assignment]
            layer.last_routing = None  # type: ignore[assignment]
            return
    raise value_error(
        "block",
        found=f"{type(block).__name__}, which computes something else than a MoELayer with its weights: a typical token is "
        f"off by {min(errors):.2g} relative (scoring {' or '.join(scorings)}, {layer.experts.activation}, route_scale "
        f"{layer.route_scale:g})",
        expected="the same outputs",
        do="The block cannot be read; verify=False skips this check.",
    )
