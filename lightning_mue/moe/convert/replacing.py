"""Exchanging the Mixture-of-Experts blocks of a transformers model for `MoELayer`, and getting its weights back out.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.moe.convert.pretrained import is_moe_block, moe_from_transformers, router_of, run_block
from lightning_mue.moe.convert.transformers_state import state_dict_to_transformers
from lightning_mue.moe.convert.trial import require_module
from lightning_mue.moe.layer import MoELayer
from lightning_mue.moe.router import RoutingInfo


class TransformersMoE(nn.Module):
    """A `MoELayer` in the place of a transformers block: it returns what the block did, and shows its router's logits.

    transformers reads logits either from what the block returns (older versions), or by a hook on modules of the router's
    class. So a router without weights stays, and hands out our router's logits, with their graph.

    Args:
        moe: The layer.
        block: The block that it replaces.

    Attributes:
        moe: The layer.
    """

    def __init__(self, moe: MoELayer, block: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        weight = moe.router.weight
        self.returns_logits = not weight.is_meta and isinstance(
            run_block(block, weight.new_ones(1, 2, moe.width)), tuple
        )
        names = (name for name in block.state_dict() if name.endswith("e_score_correction_bias"))
        self.correction_name = next(names, None)  # the router has it, or the block itself
        self.router_name = "gate" if "gate" in block._modules else "router"
        self.recorder = _recorder(router_of(block))
        self._forward_hooks.update(block._forward_hooks)
        self._logits_TE: Tensor | None = None
        moe.router.register_forward_hook(self._show)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map [B, S, d] to [B, S, d], with the logits [T, E] beside it if the block returned them."""
        y: Tensor = self.moe(hidden_states)
        logits_TE, self._logits_TE = self._logits_TE, None
        return (y, logits_TE) if self.returns_logits and logits_TE is not None else y

    def _show(self, router: nn.Module, args: Any, routing: RoutingInfo) -> None:
        if self.returns_logits:
            self._logits_TE = routing.logits
        if self.recorder is not None:
            self.recorder(routing)


def _hand_out(routing: RoutingInfo) -> tuple[Tensor, Tensor, Tensor]:
    return routing.logits, routing.gates, routing.expert_ids


def _recorder(router: nn.Module | None) -> nn.Module | None:
    """A module of the router's class and with its hooks, but without weights, that returns what a router does."""
    if router is None or type(router) is nn.Linear:
        return None
    recorder: nn.Module = type(router).__new__(type(router))
    nn.Module.__init__(recorder)
    recorder.forward = _hand_out
    recorder._forward_hooks.update(router._forward_hooks)
    return recorder


def replace_moe_blocks(model: nn.Module, **layer_arguments: Any) -> list[str]:
    """Exchange every Mixture-of-Experts block of a model for a `MoELayer` of equal output, in place, one after the other.

    The model runs, trains and generates as before, and ``output_router_logits=True`` gives the logits and the auxiliary loss.
    Its state dict then has our names: `transformers_state_dict` gives it in transformers'. Optimizers have to be made afterwards.

    Args:
        model: A transformers model, or any module that holds such blocks.
        **layer_arguments: As for `moe_from_transformers`.

    Returns:
        Where the blocks were, e.g. ``["model.layers.0.mlp"]``.

    Raises:
        TypeError: `model` is no module.
        ValueError: There is none, or one cannot be read; those before it are exchanged then, and the model runs as before.
    """
    require_module("model", model)
    places: dict[int, list[str]] = {}  # names, not modules: a block's memory is free as soon as it is exchanged
    for name, module in model.named_modules(remove_duplicate=False):
        if is_moe_block(module):
            places.setdefault(id(module), []).append(name)
    if not places:
        raise ValueError(
            f"model: {type(model).__name__} holds no Mixture-of-Experts block (a module with `experts` beside a `gate` or "
            "`router`). Dense feed-forward networks become one by MoELayer.from_ffn."
        )
    for names in places.values():
        if "" in names:
            raise ValueError(
                f"model: {type(model).__name__} is itself a block. Use MoELayer.from_pretrained_block(model)."
            )
        adapter = _adapt(model.get_submodule(names[0]), layer_arguments)
        for name in names:
            model.set_submodule(name, adapter)
    return [name for names in places.values() for name in names]


def _adapt(block: nn.Module, layer_arguments: dict[str, Any]) -> TransformersMoE:
    return TransformersMoE(moe_from_transformers(block, **layer_arguments), block).train(block.training)


def transformers_state_dict(model: nn.Module, layout: str = "stacked") -> dict[str, Tensor]:
    """The state dict of a model after `replace_moe_blocks`, in the names that it had before.

    ``fresh.load_state_dict(transformers_state_dict(model))`` puts it into a model of the same config, which can then be saved
    with ``save_pretrained``.

    Args:
        model: The model.
        layout: As for `state_dict_to_transformers`; "stacked" is that of transformers 5.

    Returns:
        Names and tensors.
    """
    state = dict(model.state_dict())
    for name, adapter in model.named_modules(remove_duplicate=False):
        if not isinstance(adapter, TransformersMoE):
            continue
        prefix = f"{name}." if name else ""
        inner = f"{prefix}moe."
        own = {key.removeprefix(inner): state.pop(key) for key in list(state) if key.startswith(inner)}
        state |= state_dict_to_transformers(
            own,
            layout,
            prefix=prefix,
            router=adapter.router_name,
            correction_bias=True if adapter.correction_name else None,
            correction_name=adapter.correction_name,
        )
    return state
