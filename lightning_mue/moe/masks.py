"""Padding masks that a model is called with, handed to the MoE layers inside it.

A layer in the middle of a model sees hidden states, not the mask. So the mask that the model gets is noted on its layers while
its forward runs. It changes no output: it says which tokens count in loads, losses and monitors.

Shape legend: B batch, S tokens of a call, Q queries, M entries of a mask (S, or more with a cache of keys), T tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.checks import mismatch, type_error
from lightning_mue.moe.base import MoEBase

_NAME = "attention_mask"
#: (arguments, keywords) of a call -> the mask that it is given.
MaskReader = Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
_INPUTS = ("input_ids", "inputs_embeds", "tokens", "x", "inputs")


@contextmanager
def real_tokens(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """While it is open, only real tokens count in the loads and losses of the model's MoE layers; outputs do not change.

    Args:
        model: Holds the layers.
        mask: [B, S], nonzero for real tokens, or any attention mask that `mask_of` reads. None: all tokens count.

    Raises:
        TypeError: `mask` is no tensor.

    Example:
        >>> from lightning_mue.moe import MoELayer
        >>> layer = MoELayer(width=16, expert_width=32, n_experts=4, top_k=2)
        >>> with real_tokens(layer, torch.tensor([[1, 1, 1, 0, 0]])):
        ...     y = layer(torch.randn(1, 5, 16))
        >>> int(layer.last_routing.counts.sum())
        6
    """
    if mask is not None and not isinstance(mask, Tensor):
        expected = "a tensor [B, S], nonzero for real tokens, or None"
        raise type_error("mask", found=type(mask).__name__, expected=expected)
    _enter(model, mask)
    try:
        yield
    finally:
        _leave(model)


def follow_attention_mask(model: nn.Module) -> list[str]:
    """Makes the MoE layers inside a model read the ``attention_mask`` that it is called with, in place.

    Of `model` and the modules between it and its layers, those are watched whose ``forward`` takes ``attention_mask`` beside
    tokens or their embeddings; the innermost one decides, so that encoder and decoder have each their own. A second call
    changes nothing. `replace_moe_blocks` does it for its model.

    Args:
        model: Holds the layers.

    Returns:
        The names of the watched modules; "" is the model itself.
    """
    watched = []
    for name, module in model.named_modules():
        if isinstance(module, MoEBase) or not _takes_mask(module, is_root=not name) or not _layers(module):
            continue
        watched.append(name)
        if not any(getattr(hook, "func", None) is _read for hook in module._forward_pre_hooks.values()):
            names = _places(_forward_of(module))[0]  # found once: compiled code cannot look at signatures
            # First of all: where a later one raises, `_done` runs too.
            module.register_forward_pre_hook(partial(_read, names), with_kwargs=True, prepend=True)
            module.register_forward_hook(_done, always_call=True)
    return watched


def mask_readers(model: nn.Module) -> list[tuple[nn.Module, MaskReader]]:
    """The modules of any model that are called with tokens and an ``attention_mask``, each with what reads it from a call.

    A reader takes the arguments and keywords of a call, and returns bool [B, S], or None if the call has no such mask.
    """
    found: list[tuple[nn.Module, MaskReader]] = []
    for name, module in model.named_modules():
        if not isinstance(module, MoEBase) and _takes_mask(module, is_root=not name):
            found.append((module, partial(_given, _places(_forward_of(module))[0])))
    return found


def mask_of(mask: Tensor) -> Tensor:
    """Which tokens an attention mask lets take part: bool [B, M].

    [B, M]: nonzero entries (1, or the number of a packed sequence), or those of at least 0 if some are negative (additive).
    [B, Q, M] and [B, heads, Q, M]: keys that some query attends to, where a bool True or a number of at least 0 attends. Rows
    that attend to everything, as some attention kernels want of padding, tell nothing unless they are the last.
    """
    if mask.ndim == 2:
        if not mask.is_floating_point():
            return mask != 0
        return torch.where((mask < 0).any(), mask >= 0, mask > 0)
    attends = mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask != 0
    attends_BQM = attends.flatten(1, -3).any(1) if attends.ndim == 4 else attends
    tells_BQ1 = ~attends_BQM.all(-1, keepdim=True)
    tells_BQ1 = torch.cat([tells_BQ1[:, :-1], torch.ones_like(tells_BQ1[:, -1:])], 1)
    return (attends_BQM & tells_BQ1).any(1)


def fit(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """The entries of a mask for tokens of a shape, flat: bool [T]; None, with a warning, if it does not fit them.

    Of tokens in a row [T], as of those of [B, S]. Never waits for the device.
    """
    if mask.ndim in (2, 3, 4):
        real_BM = mask_of(mask)
        if len(shape) == 2 and real_BM.shape in (shape, (1, shape[1])):
            return real_BM.expand(shape).reshape(-1)
        if len(shape) == 1 and shape[0] == real_BM.numel():
            return real_BM.reshape(-1)
    _warn_of_misfit(tuple(mask.shape), tuple(shape))
    return None


def _enter(model: nn.Module, mask: Tensor | None) -> None:
    for layer in _layers(model):
        layer.token_masks = (*layer.token_masks, mask)
        layer.has_followed = True


def _leave(model: nn.Module) -> None:
    for layer in _layers(model):
        layer.token_masks = layer.token_masks[:-1]


def _layers(model: nn.Module) -> list[MoEBase]:
    return [module for module in model.modules() if isinstance(module, MoEBase)]


def _places(forward: Any) -> tuple[dict[str, int], bool]:
    """The positions at which a forward function takes the mask and tokens, and whether it takes further keywords."""
    parameters = list(inspect.signature(forward).parameters.values())
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    # -1: `self`, of the plain function.
    found = {name: names.index(name) - (names[0] == "self") for name in (_NAME, *_INPUTS) if name in names}
    return found, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _forward_of(module: nn.Module) -> Any:
    forward = module.forward
    return getattr(forward, "__func__", forward)


def _takes_mask(module: nn.Module, *, is_root: bool) -> bool:
    found, further = _places(_forward_of(module))
    return (_NAME in found and (len(found) > 1 or is_root)) or (is_root and further)


def _read(names: dict[str, int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _enter(module, _given(names, args, kwargs))


def _given(names: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = _argument(_NAME, names, args, kwargs)
    if isinstance(given, dict):  # one mask for each kind of attention
        given = given.get("full_attention")
    mask = given if isinstance(given, Tensor) else None
    tokens = [_argument(name, names, args, kwargs) for name in _INPUTS]
    sizes = [each.shape[1] for each in tokens if isinstance(each, Tensor) and each.ndim > 1]
    if mask is not None and sizes and mask.ndim in (2, 3, 4):
        mask = mask_of(mask)[:, -sizes[0] :]  # with a cache of keys, the mask is longer than the tokens
    return mask


def _argument(name: str, names: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    place = names.get(name)
    return kwargs.get(name, args[place] if place is not None and place < len(args) else None)


def _done(module: nn.Module, args: Any, output: Any) -> None:
    _leave(module)


@cache
def _warn_of_misfit(mask: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    expected = f"one entry for each token of a MoELayer's input, {list(tokens)}"
    do = "All tokens count now, padding too; give the mask with `lightning_mue.moe.real_tokens(model, mask)`."
    warnings.warn(mismatch(_NAME, found=f"shape {list(mask)}", expected=expected, do=do), stacklevel=2)
