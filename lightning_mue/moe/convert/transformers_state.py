"""Converts an MoE block's state dict between the names and layouts of transformers and ours.

| here                        | "stacked"                      | "qwen"                       | "mixtral"            |
|-----------------------------|--------------------------------|------------------------------|----------------------|
| router.weight               | gate.weight                    | gate.weight                  | gate.weight          |
| router.balance_bias         | gate.e_score_correction_bias, where the block has one (MiniMax-M2: without "gate.")  |
| experts.w_gate              | experts.gate_up_proj, 1st half | experts.0.gate_proj.weight   | experts.0.w1.weight  |
| experts.w_up                | experts.gate_up_proj, 2nd half | experts.0.up_proj.weight     | experts.0.w3.weight  |
| experts.w_down              | experts.down_proj              | experts.0.down_proj.weight   | experts.0.w2.weight  |
| shared.w_gate, w_up, w_down | shared_expert.gate_proj.weight, up_proj, down_proj (DeepSeek: shared_experts)        |
| shared_gate.weight          | shared_expert_gate.weight                                                            |

"stacked" is what modules of transformers 5 hold; "mixtral" and "qwen" (also OLMoE, DeepSeek) what the files on the hub and
modules of transformers 4 hold.

Shape legend: d width, h expert hidden width, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mue.checks import listed, require_choice, value_error

LAYOUTS = ("stacked", "qwen", "mixtral")
#: Layouts with one module per expert: our name -> theirs.
_SEPARATE = {
    "qwen": {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"},
    "mixtral": {"w_gate": "w1", "w_up": "w3", "w_down": "w2"},
}
_OURS = {theirs: ours for names in _SEPARATE.values() for ours, theirs in names.items()}
_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.weight")
_SHARED = re.compile(r"(?:shared_experts?|shared_mlp)\.(gate_proj|up_proj|down_proj)\.weight")
_SINGLE = {
    "gate.weight": "router.weight",
    "router.weight": "router.weight",
    "gate.e_score_correction_bias": "router.balance_bias",
    "router.e_score_correction_bias": "router.balance_bias",
    "e_score_correction_bias": "router.balance_bias",
    "shared_expert_gate.weight": "shared_gate.weight",
    "experts.down_proj": "experts.w_down",
}


def state_dict_from_transformers(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a `MoELayer` from that of a transformers block, in any of `LAYOUTS`.

    Args:
        state: A block's state dict, or that of a model or file that holds it.
        prefix: What the block's names begin with there, e.g. ``"model.layers.0.mlp."``.

    Returns:
        New tensors, which share no memory with the old ones.

    Raises:
        ValueError: The weights are not those of a block of gated experts without biases; the message names them.
    """
    ours: dict[str, Tensor] = {}
    separate: dict[str, dict[int, Tensor]] = {}
    unknown = []
    block = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    for name, tensor in block.items():
        if name in _SINGLE:
            ours[_SINGLE[name]] = tensor.detach().clone()
        elif name == "experts.gate_up_proj":
            gate, up = _halves(tensor.detach(), block.get("experts.down_proj"))
            ours["experts.w_gate"], ours["experts.w_up"] = gate.clone(), up.clone()
        elif (match := _SHARED.fullmatch(name)) is not None:
            ours[f"shared.{_OURS[match[1]]}"] = tensor.detach().clone()
        elif (match := _EXPERT.fullmatch(name)) is not None and match[2] in _OURS:
            separate.setdefault(_OURS[match[2]], {})[int(match[1])] = tensor.detach()
        else:
            unknown.append(name)
    for name, experts in separate.items():
        ours[f"experts.{name}"] = torch.stack([experts[i] for i in sorted(experts)])
    _check(ours, block, unknown, prefix)
    bias = ours.get("router.balance_bias", torch.zeros(len(ours["router.weight"]), device=ours["router.weight"].device))
    ours["router.balance_bias"] = bias.float()
    return ours


def state_dict_to_transformers(
    state: Mapping[str, Tensor],
    layout: str = "stacked",
    *,
    prefix: str = "",
    router: str = "gate",
    correction_bias: bool | None = None,
    correction_name: str | None = None,
) -> dict[str, Tensor]:
    """The state dict of a transformers block from that of a `MoELayer`.

    Settings that are not weights (scoring, route scale, groups) must be in the block's config.

    Args:
        state: A layer's state dict.
        layout: One of `LAYOUTS`.
        prefix: Put before every name.
        router: What the block calls its router, "gate" or "router".
        correction_bias: Whether to write ``e_score_correction_bias``; None: if it is not zero.
        correction_name: What the block calls it; None: ``gate.e_score_correction_bias``, with the router's name.

    Returns:
        Names and tensors: the layer's own, or new ones where weights are concatenated.

    Raises:
        ValueError: The layout is unknown, or the experts have no gate or have biases, which no such block has.
    """
    require_choice("layout", layout, LAYOUTS)
    # Counts since the last optimizer step are no weights.
    unknown = [name for name in state if name not in _EXPORTED and name != "pending_counts"]
    missing = [name for name in ("router.weight", *_STACKS) if name not in state]
    if unknown or missing:
        found = f"unknown weights: {listed(unknown)}; missing weights: {listed(missing)}"
        expected = "a layer of gated experts without biases, as transformers' blocks have"
        raise value_error("state", found=found, expected=expected, do="Only such layers can be exported.")
    gate, up, down = (state[name] for name in _STACKS)
    theirs = {f"{router}.weight": state["router.weight"]}
    bias = state.get("router.balance_bias")
    if bias is not None and (bool(bias.any()) if correction_bias is None else correction_bias):
        theirs[correction_name or f"{router}.e_score_correction_bias"] = bias
    if layout == "stacked":
        theirs |= {"experts.gate_up_proj": torch.cat([gate, up], dim=1), "experts.down_proj": down}
    else:
        names = _SEPARATE[layout]
        for i in range(len(gate)):
            for ours, stack in (("w_gate", gate), ("w_up", up), ("w_down", down)):
                theirs[f"experts.{i}.{names[ours]}.weight"] = stack[i]
    shared = "shared_expert" if "shared_gate.weight" in state else "shared_experts"
    for ours, name in _SEPARATE["qwen"].items():
        if f"shared.{ours}" in state:
            theirs[f"{shared}.{name}.weight"] = state[f"shared.{ours}"]
    if "shared_gate.weight" in state:
        theirs["shared_expert_gate.weight"] = state["shared_gate.weight"]
    return {prefix + name: tensor for name, tensor in theirs.items()}


def layout_of(state: Mapping[str, Tensor]) -> str:
    """Which of `LAYOUTS` a block's state dict has."""
    parts = {match[2] for name in state if (match := _EXPERT.fullmatch(name)) is not None}
    return next((layout for layout, names in _SEPARATE.items() if parts & set(names.values())), "stacked")


_STACKS = ("experts.w_gate", "experts.w_up", "experts.w_down")
_EXPORTED = {"router.weight", "router.balance_bias", "shared_gate.weight", *_STACKS} | {
    f"shared.{name}" for name in ("w_gate", "w_up", "w_down")
}


def _halves(gate_up: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate_up.ndim != 3 or down is None or down.shape != (len(gate_up), gate_up.shape[2], gate_up.shape[1] // 2):
        key = "experts.gate_up_proj and experts.down_proj"
        found = f"shapes {list(gate_up.shape)} and {'nothing' if down is None else list(down.shape)}"
        do = "Transposed and interleaved experts (Llama 4, GPT-OSS) cannot be read."
        raise value_error(key, found=found, expected="[E, 2h, d] and [E, d, h]", do=do)
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up


def _check(ours: Mapping[str, Tensor], block: Mapping[str, Tensor], unknown: list[str], prefix: str) -> None:
    missing = [name for name in ("router.weight", *_STACKS) if name not in ours]
    sizes = {ours[name].shape[0] for name in ("router.weight", *_STACKS) if name in ours}
    if unknown or missing or len(sizes) != 1:
        raise value_error(
            "state",
            found=f"{len(block)} names under prefix={prefix!r}; unknown: {listed(unknown, limit=6)}; missing: "
            f"{listed(missing)}; numbers of experts: {sorted(sizes)}",
            expected="the weights of one MoE block of gated experts without biases",
            do="Pass a block's own state dict, or the prefix of its names up to the last dot, the dot included.",
        )
