"""Runs a model with some of its weights replaced, and sees what goes through it: layers, attention logits, output.

Shape legend: B batch, H heads, Q queries, K keys, k head dimension.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_mue.names import clean_name

#: Calls a module's forward pass on one batch and returns its loss.
Loss = Callable[[Any, Any], Any]
_LOSSES = ("loss", "cross_entropy", "kl_div")
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
_CHOICES = frozenset({"topk", "argmax"})
#: What masks put into attention logits lies beyond it.
_MASKED = 1e4


class Watch(TorchFunctionMode):
    """Keeps the attention logits, and what loss functions are called on, of the calls inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[Tensor] = []
        self.outputs: list[Tensor] = []
        #: Dimension of an attention head, as seen in the last product of queries and keys.
        self.head_dim = 0
        self._product = 0
        #: Whether something chose among experts.
        self.chooses = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if name == "scaled_dot_product_attention":
            query, key = _query_key(args, kwargs)
            self.head_dim = query.shape[-1]
            self.attention.append(_attention_logits(query, key, kwargs.get("scale")))
        elif name == "softmax" and isinstance(first, Tensor) and _is_attention(first):
            self.head_dim = self._product or self.head_dim
            self.attention.append(first.detach())
        elif name.endswith(_LOSSES) and isinstance(first, Tensor) and first.is_floating_point():
            # Log-probabilities are logits but for a constant.
            logs = any(kind in name for kind in ("nll", "ctc", "kl_div"))
            self.outputs.append((first - first.mean(-1, keepdim=True) if logs else first).detach())
        self.chooses = self.chooses or name in _CHOICES
        result = func(*args, **kwargs)
        if name.strip("_") in _PRODUCTS and isinstance(result, Tensor) and _is_attention(result):
            self._product = args[-2].shape[-1]
        return result


def _query_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    named = dict(zip(("query", "key"), args, strict=False)) | dict(kwargs)
    return named["query"].detach(), named["key"].detach()


def _attention_logits(q_BHQk: Tensor, k_BHKk: Tensor, scale: float | None) -> Tensor:
    """Logits [B, H, Q, K] before any mask; with fewer key heads than query heads these are repeated."""
    if q_BHQk.ndim == 4 and k_BHKk.shape[1] != q_BHQk.shape[1]:
        k_BHKk = k_BHKk.repeat_interleave(q_BHQk.shape[1] // k_BHKk.shape[1], dim=1)
    factor = q_BHQk.shape[-1] ** -0.5 if scale is None else scale
    return (q_BHQk.float() @ k_BHKk.float().transpose(-1, -2)) * factor


def _is_attention(x: Tensor) -> bool:
    return x.ndim == 4 or (x.ndim == 3 and x.shape[-1] == x.shape[-2])


def rms(pairs: list[tuple[Tensor, Tensor | None]]) -> float:
    """Root mean square of the differences (of the first, where the second is None), without what masks put in."""
    total, count = 0.0, 0
    for new, old in pairs:
        if old is not None and old.shape != new.shape:
            continue
        seen = new.abs() < _MASKED
        difference = torch.where(seen, new if old is None else new - old, 0.0).double()
        total, count = total + float(difference.square().sum()), count + int(seen.sum())
    return (total / count) ** 0.5 if count else 0.0


def steady_rms(new: Tensor, old: Tensor | None = None) -> float:
    """RMS of a difference (of the first, without a second) at the four fifths of the positions where it is least.

    For layers with a router: a few tokens change their experts, by jumps that are no measure of a step.
    """
    if old is not None and old.shape != new.shape:
        return 0.0
    difference = (new if old is None else new - old).double()
    squares = difference.square().mean(-1).flatten().sort().values if difference.ndim else difference.square()[None]
    return float(squares[: max(1, len(squares) * 4 // 5)].mean().sqrt())


def differences(new: list[Tensor], old: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Pairs of equal calls; empty where the number of calls differs."""
    return list(zip(new, old, strict=True)) if len(new) == len(old) else []


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of a module's inputs or output."""
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(first_tensor, parts) if found is not None), None)


@contextmanager
def replaced(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Gives parameters other values; tied ones in every place."""
    saved = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in saved.items():
            parameter.data = value


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode, as norms and routers have it while they train, but with dropout modules off."""
    modes = {child: child.training for child in model.modules()}
    model.train()
    for child in model.modules():
        if "dropout" in type(child).__name__.lower() or "droppath" in type(child).__name__.lower():
            child.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """The same random numbers in every run, of torch on the CPU, NumPy and Python; the generators are left as they were."""
    plain, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)  # noqa: NPY002


def call_again(child: nn.Module, args: Any, kwargs: Any, seed: int) -> tuple[Tensor | None, Watch]:
    """Calls a module on copies of its inputs: a cache among them is filled by every call."""
    with suppress(RuntimeError, TypeError):  # what cannot be copied is shared
        args, kwargs = copy.deepcopy((args, kwargs))
    with same_draws(seed), Watch() as watch:
        return first_tensor(child(*args, **kwargs)), watch


def find_layers(model: nn.Module, run: Callable[[], object]) -> dict[str, nn.Module]:
    """The layers of the residual stream: the outermost called elements of lists whose output is shaped like their input.

    A stage, which only calls layers one after another, is none.

    Returns:
        Clean name -> module, in the order of their calls. A layer has parts; a linear layer in a Sequential is none.
    """
    found: dict[str, nn.Module] = {}
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, y = first_tensor((args, kwargs)), first_tensor(output)
            if x is not None and y is not None and x.shape == y.shape:
                found[name] = child
                ends[name] = x, y

        return note

    handles = [
        child.register_forward_hook(hook(clean_name(name)), with_kwargs=True)
        for name, child in model.named_modules()
        if name.rpartition(".")[2].isdigit() and any(True for _ in child.children())
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for name in list(found):
        if _is_stage(name, ends):
            del found[name]
    inner = {name for name in found if any(name.startswith(f"{other}.") for other in found)}
    return {name: child for name, child in found.items() if name not in inner}


def _is_stage(name: str, ends: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """True for a module that hands its input to the first of the layers in it, and returns the output of the last."""
    inside = [pair for other, pair in ends.items() if other.startswith(f"{name}.")]
    x, y = ends[name]
    same = lambda a, b: a.data_ptr() == b.data_ptr()  # noqa: E731
    return any(same(x, pair[0]) for pair in inside) and any(same(y, pair[1]) for pair in inside)
