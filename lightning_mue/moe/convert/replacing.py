"""Replaces the Mixture-of-Experts blocks of a transformers model, and exports its weights in their original names.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_mue.checks import value_error
from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.convert.pretrained import is_moe_block, moe_from_transformers, router_of, run_block
from lightning_mue.moe.convert.transformers_state import layout_of, state_dict_to_transformers
from lightning_mue.moe.convert.trial import require_module
from lightning_mue.moe.masks import follow_attention_mask
from lightning_mue.moe.router import RoutingInfo


class TransformersMoE(nn.Module):
    """An MoE layer in the place of a transformers block: it returns the same, and gives transformers its router's logits.

    transformers reads logits either from what the block returns (older versions), or by a hook on modules of the router's
    class. So a router without weights is kept, and returns our router's logits, with their graph.

    Args:
        moe: The layer.
        block: The block that it replaces.
    """

    def __init__(self, moe: MoEBase, block: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        weight = moe.router.weight
        self.returns_logits = not weight.is_meta and isinstance(
            run_block(block, weight.new_ones(1, 2, moe.width)), tuple
        )
        names = (name for name in block.state_dict() if name.endswith("e_score_correction_bias"))
        self.correction_name = next(names, None)  # the router has it, or the block itself
        self.router_name = "gate" if "gate" in block._modules else "router"
        self.layout = layout_of(block.state_dict())
        self.recorder = _recorder(router_of(block))
        self._forward_hooks.update(block._forward_hooks)
        self._logits_TE: Tensor | None = None
        moe.router.register_forward_hook(self._show)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Maps [B, S, d] to [B, S, d]; returns the logits [T, E] too if the block did."""
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
    """A module of the router's class with its hooks, but without weights, that returns what transformers' router does."""
    if router is None or type(router) is nn.Linear:
        return None
    recorder: nn.Module = type(router).__new__(type(router))
    nn.Module.__init__(recorder)
    recorder.forward = _hand_out
    recorder._forward_hooks.update(router._forward_hooks)
    return recorder


def replace_moe_blocks(model: nn.Module, *, layer_class: type[MoEBase], **layer_arguments: Any) -> list[str]:
    """Replaces every Mixture-of-Experts block of a model by a layer of equal output, in place.

    The model runs, trains and generates as before, and ``output_router_logits=True`` gives the logits and the auxiliary loss.
    Its state dict then has our names; `transformers_state_dict` gives it in transformers', and the model's ``save_pretrained``
    writes those. Padding in the model's ``attention_mask`` does not count (`follow_attention_mask`). Make optimizers afterwards.

    Args:
        model: A transformers model, or any module that holds such blocks.
        layer_class: As for `moe_from_transformers`.
        **layer_arguments: As for `moe_from_transformers`.

    Returns:
        The names of the blocks, e.g. ``["model.layers.0.mlp"]``.

    Raises:
        TypeError: `model` is no module.
        ValueError: The model has no such block, or one cannot be read; those before it are replaced by then.
    """
    require_module("model", model)
    if "optimizer" in layer_arguments:
        found, expected = "one for layers inside a model", "none: the model's own optimizer trains them"
        raise value_error("optimizer", found=found, expected=expected, do="Leave it out.")
    places = _places(model)
    for names in places.values():
        if "" in names:
            found, do = f"{type(model).__name__}, which is itself a block", "Use MoELayer.from_pretrained_block(model)."
            raise value_error("model", found=found, expected="a model that holds blocks", do=do)
        block = model.get_submodule(names[0])
        layer = moe_from_transformers(block, layer_class=layer_class, **layer_arguments)
        adapter = TransformersMoE(layer, block).train(block.training)
        del block
        for name in names:
            model.set_submodule(name, adapter)
    follow_attention_mask(model)
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = partial(_save_pretrained, module)  # type: ignore[assignment]
    return [name for names in places.values() for name in names]


def transformers_state_dict(model: nn.Module, layout: str = "stacked") -> dict[str, Tensor]:
    """The state dict of a model after `replace_moe_blocks`, with the names that it had before.

    ``fresh.load_state_dict(transformers_state_dict(model))`` puts it into a model of the same config, which can then be saved
    with ``save_pretrained``.

    Args:
        model: The model.
        layout: As for `state_dict_to_transformers`; "stacked" is that of transformers 5.

    Returns:
        Names and tensors.
    """
    return _in_their_names(model, model.state_dict(), layout)


def _save_pretrained(model: Any, directory: Any, *args: Any, state_dict: Any = None, **arguments: Any) -> Any:
    """The model's ``save_pretrained``, with weights in the names that its class loads."""
    state = _in_their_names(model, model.state_dict() if state_dict is None else state_dict, None)
    return type(model).save_pretrained(model, directory, *args, state_dict=state, **arguments)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """The names of each block: names, not modules, so that a replaced block's memory is freed."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_moe_block(module):
            places.setdefault(id(module), []).append(name)
    if not places:
        found = f"{type(model).__name__}, which holds no Mixture-of-Experts block"
        expected = "a module with `experts` beside a `gate` or `router`"
        do = "For dense feed-forward networks use MoELayer.from_ffn."
        raise value_error("model", found=found, expected=expected, do=do)
    return places


def _in_their_names(model: nn.Module, given: Mapping[str, Tensor], layout: str | None) -> dict[str, Tensor]:
    """A state dict of the model; `layout` None: each block's own."""
    state = dict(given)
    for name, adapter in model.named_modules(remove_duplicate=False):
        if not isinstance(adapter, TransformersMoE):
            continue
        prefix = f"{name}." if name else ""
        inner = f"{prefix}moe."
        own = {key.removeprefix(inner): state.pop(key) for key in list(state) if key.startswith(inner)}
        state |= state_dict_to_transformers(
            own,
            layout or adapter.layout,
            prefix=prefix,
            router=adapter.router_name,
            correction_bias=True if adapter.correction_name else None,
            correction_name=adapter.correction_name,
        )
    return state
