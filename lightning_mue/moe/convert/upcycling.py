"""Upcycling: from a trained dense feed-forward network to an MoE layer that computes the same or nearly the same.

Sparse upcycling: arXiv:2212.05055. Fine-grained experts: arXiv:2401.06066. Routers tied over the parts of a split network
("virtual groups"): arXiv:2410.07524. Redrawn units: arXiv:2502.19261.

Shape legend: d width, h hidden width of the dense network, e of one expert, E experts, K active ones, P parts of a split
network (1 unless split), r = E / P experts with the same part. Expert ``p r + j`` is the j-th with part p.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_mue.checks import listed, require_choice, require_number, require_positive, value_error
from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.convert.dense_ffn import DenseFFN, read_ffn
from lightning_mue.moe.convert.filling import Cut, add_noise, draw_router, fill_experts, permutation, redraw_units
from lightning_mue.parameterizations.applying.initial_weights import keep_weights

HOWS = ("copy", "split", "noise", "drop")
_log = logging.getLogger(__name__)
Layer = TypeVar("Layer", bound=MoEBase)


def moe_from_ffn(
    module: nn.Module | Sequence[nn.Module],
    n_experts: int,
    top_k: int = 2,
    *,
    how: str = "copy",
    expert_width: int | None = None,
    shuffle: bool = False,
    noise_std: float | None = None,
    drop_fraction: float | None = None,
    router_init_std: float | None = 0.02,
    route_scale: float | None = None,
    generator: torch.Generator | None = None,
    gate_name: str | None = None,
    up_name: str | None = None,
    down_name: str | None = None,
    activation: str | None = None,
    layer_class: type[Layer],
    **layer_arguments: Any,
) -> Layer:
    """Makes a layer out of a dense feed-forward network. The network is not changed and shares no memory with the layer.

    | how     | an expert is                                            | the layer's output at first                   |
    |---------|---------------------------------------------------------|-----------------------------------------------|
    | "copy"  | the whole network                                       | the network's                                 |
    | "split" | one of P parts of the hidden units, each part r times   | the network's if P divides K, else on average |
    | "noise" | the whole network, with normal noise on each matrix     | close to the network's                        |
    | "drop"  | the whole network, a fraction of its units drawn anew   | close to the network's                        |

    This holds where the gates of a token's experts sum to a constant, that is for the scorings "topk-softmax" and
    "sigmoid-normalized" with ``gate="linear"``, or "softmax-topk" with every expert active. Otherwise the scale is chosen so
    that it holds for equal gates (the limit of a small `router_init_std`), and a warning says so. With ``gate="sqrt"`` it
    does not last: once the experts' outputs are independent, the gates keep the RMS of their sum, not their mean, and the
    output shrinks by up to sqrt(K).

    For "split", if P divides K, the router starts with the same rows for every part, so that each token's experts hold every
    part equally often. With `shared_width` the shared expert gets the network's first units and its output bias.

    Args:
        module: As for `read_ffn`: ours, transformers' (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, T5 and others),
            ``nn.Sequential(Linear, GELU, Linear)``, or a list of modules that are applied one after the other.
        n_experts: E.
        top_k: K.
        how: See above.
        expert_width: For "split" the size e of a part, so that P = h / e and r = E / P; None: P = E. Else h.
        shuffle: For "split", whether parts are random hidden units instead of neighbouring ones.
        noise_std: For "noise": its standard deviation over that of the matrix. None: 0.05.
        drop_fraction: For "drop": the fraction of each expert's units that is drawn anew, normal with each matrix's mean and
            standard deviation. None: 0.5.
        router_init_std: Standard deviation of the router's initial weight; None: 0.02.
        route_scale: None: the scale for which the above holds. A given scale is compensated for in the experts' `w_down` (and
            `b_down`), so that a scale which a parameterization will set can be allowed for.
        generator: For all draws; None: the global one.
        gate_name: As for `read_ffn`, as are the next three.
        up_name: See there.
        down_name: See there.
        activation: See there.
        layer_class: The class of the layer: `MoELayer` or a subclass with its arguments.
        **layer_arguments: Further arguments of `layer_class`. Its `width` is the network's.

    Returns:
        A layer of the network's dtype, device, mode and ``requires_grad`` (of each map; the router is always trained).

    Raises:
        TypeError: `module` is no module, or a size is no integer.
        ValueError: The network cannot be read, or an argument does not fit it; the message names it.
    """
    ffn = read_ffn(module, gate_name=gate_name, up_name=up_name, down_name=down_name, activation=activation)
    require_choice("how", how, HOWS)
    sizes = {"expert_width": expert_width, "shared_width": layer_arguments.get("shared_width") or None}
    require_positive(
        n_experts=n_experts, top_k=top_k, **{name: size for name, size in sizes.items() if size is not None}
    )
    _refuse_unsupported(how, ffn, layer_arguments, shuffle=shuffle, noise_std=noise_std, drop_fraction=drop_fraction)
    if route_scale is not None and not 0 < abs(route_scale) < math.inf:
        expected = "a finite number other than 0: the experts' weights are divided by it"
        raise value_error("route_scale", found=route_scale, expected=expected)
    shared_width = layer_arguments.get("shared_width", 0)
    cut = _cut(ffn, how, n_experts, expert_width, shared_width, permutation(ffn, generator) if shuffle else None)
    needed = _needed_scale(cut.parts, n_experts, top_k, layer_arguments)
    arguments = {"bias": any(b is not None for b in (ffn.b_gate, ffn.b_up, ffn.b_down)), **layer_arguments}
    layer = empty_layer(
        layer_class,
        ffn.w_up,
        width=ffn.w_up.shape[1],
        expert_width=cut.width,
        n_experts=n_experts,
        top_k=top_k,
        activation=ffn.activation,
        router_init_std=router_init_std,
        route_scale=needed if route_scale is None else route_scale,
        **arguments,
    )
    factor = 1.0 if route_scale is None else needed / route_scale
    with torch.no_grad():
        fill_experts(layer, ffn, cut, factor)
        if how == "noise":
            add_noise(layer, ffn, 0.05 if noise_std is None else noise_std, factor, generator)
        elif how == "drop":
            redraw_units(layer, ffn, 0.5 if drop_fraction is None else drop_fraction, factor, generator)
        draw_router(layer, cut, top_k, generator)
    _finish(layer, module, ffn)
    if (reason := _why_not_equal(layer, cut)) is not None:
        _log.warning("MoELayer.from_ffn(how=%r): %s", how, reason)
    return layer


def empty_layer(layer_class: type[Layer], like: Tensor, **arguments: Any) -> Layer:
    """Makes a layer of a tensor's dtype and device without drawing its weights, which takes seconds for large models."""
    with torch.device("meta"):
        layer = layer_class(**arguments)
    layer = layer.to(like.dtype).to_empty(device=like.device)
    for module in layer.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:  # a plain attribute, which to_empty leaves on meta
                setattr(module, name, torch.zeros_like(value, device=like.device))
    nn.init.zeros_(layer.router.balance_bias)
    return layer


def _refuse_unsupported(how: str, ffn: DenseFFN, layer_arguments: dict[str, Any], **own: Any) -> None:
    belongs = {"shuffle": "split", "noise_std": "noise", "drop_fraction": "drop"}
    for name, value in own.items():
        if value not in (None, False) and belongs[name] != how:
            expected = f"it with how={belongs[name]!r} only, not with how={how!r}"
            raise value_error(name, found=value, expected=expected, do="Leave it out.")
    if own["noise_std"] is not None:
        require_number("noise_std", own["noise_std"], above=0, do="Without noise, experts are how='copy'.")
    if own["drop_fraction"] is not None and not 0 < own["drop_fraction"] <= 1:
        raise value_error("drop_fraction", found=own["drop_fraction"], expected="a number in (0, 1]")
    given, leave_out, routers = layer_arguments.get, "Leave it out.", "Use router_init_std for the router."
    has_bias = any(b is not None for b in (ffn.b_gate, ffn.b_up, ffn.b_down))
    whole = f"0 with how={how!r}: the active experts are the whole network, and nothing is left for a shared one"
    no_gate = "False: a network split over experts has no such gate to start from"
    lost = "True: the network has biases, which would be lost"
    refused = {
        "width": ("width" in layer_arguments, f"none: it is the network's, {ffn.w_up.shape[1]}", leave_out),
        "shared_gate": (bool(given("shared_gate")), no_gate, leave_out),
        "init_std": ("init_std" in layer_arguments, "none: all weights but the router's are the network's", routers),
        "shared_width": (bool(given("shared_width")) and how != "split", whole, "Use how='split'."),
        "bias": (given("bias") is False and has_bias, lost, leave_out),
    }
    for name, (refuse, expected, do) in refused.items():
        if refuse:
            raise value_error(name, found=layer_arguments[name], expected=expected, do=do)


def _cut(ffn: DenseFFN, how: str, n_experts: int, width: int | None, shared_width: int, order: Tensor | None) -> Cut:
    h = len(ffn.w_up)
    order = torch.arange(h) if order is None else order
    if how != "split":
        if width not in (None, h):
            expected = f"the network's own hidden width {h} with how={how!r}"
            do = "Leave it out, or use how='split'."
            raise value_error("expert_width", found=width, expected=expected, do=do)
        return Cut(order[None], order[:0])
    routed = h - shared_width
    parts = n_experts if width is None else (routed // width if routed % width == 0 else 0)
    if parts < 1 or routed < 1 or routed % parts or n_experts % parts:
        fitting = [
            routed // p for p in range(1, n_experts + 1) if routed > 0 and n_experts % p == 0 and routed % p == 0
        ]
        expected = (
            f"a size of parts into which how='split' can cut the network's {h} hidden units (less shared_width={shared_width}), "
            f"with a number of parts that divides n_experts={n_experts}"
        )
        do = f"It may be {listed(fitting, 'nothing with this shared_width')}."
        raise value_error("expert_width", found=width, expected=expected, do=do)
    return Cut(order[shared_width:].view(parts, -1), order[:shared_width])


def _needed_scale(parts: int, n_experts: int, top_k: int, layer_arguments: dict[str, Any]) -> float:
    """The route scale that keeps the network's output if all gates of a token are equal: P / (K gate).

    The experts of a token hold the network K / P times (on average, if P does not divide K), each times its gate.
    """
    gates = {"softmax-topk": 1 / n_experts, "sigmoid": 0.5}
    gate = gates.get(layer_arguments.get("scoring", "topk-softmax"), 1 / top_k)
    if layer_arguments.get("gate", "linear") == "linear":
        return parts / (top_k * gate)
    # The layer multiplies both terms by sqrt(1/2) where there is a shared expert.
    return parts / (top_k * math.sqrt(gate)) * (math.sqrt(2) if layer_arguments.get("shared_width") else 1.0)


def _finish(layer: MoEBase, module: nn.Module | Sequence[nn.Module], ffn: DenseFFN) -> None:
    first = module if isinstance(module, nn.Module) else module[0]
    layer.output_multiplier = ffn.output_multiplier
    layer.train(first.training)
    given = {name for name, value in ffn._asdict().items() if isinstance(value, Tensor)}
    for target in (layer.experts, layer.shared):
        for name, parameter in target.named_parameters() if target is not None else ():
            parameter.requires_grad_(name in ffn.trained or name not in given)
    keep_weights(layer)


def _why_not_equal(layer: MoEBase, cut: Cut) -> str | None:
    """Why the layer's output differs from the network's for some gates, or None if it does for none."""
    router, k = layer.router, layer.top_k
    normalized = router.scoring in ("topk-softmax", "sigmoid-normalized")
    constant = normalized or (router.scoring == "softmax-topk" and k == layer.n_experts)
    equal = normalized and k == cut.parts  # one expert of each part, all with the same row of the router
    if router.choice == "expert" or (not (constant and router.gate == "linear") and not equal):
        return (
            f"with choice={router.choice!r}, scoring={router.scoring!r} and gate={router.gate!r} a token's gates do not sum to a "
            "constant, so the output is the dense network's only as far as they are equal. A smaller router_init_std brings it "
            "closer; choice='token', scoring='topk-softmax' and gate='linear' make it exact."
        )
    if k % cut.parts or (cut.parts % router.n_groups and router.n_groups % cut.parts):
        return (
            f"a token's {k} experts do not hold each of the {cut.parts} parts equally often, so the output is the dense "
            f"network's only on average. With top_k a multiple of {cut.parts} it is equal."
        )
    return None
