"""Probes of spectra: a weight matrix with the inputs that it is multiplied by, and the queries and keys of an attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.probes import UnhookedProbe, measuring
from lightning_mue.diagnostics import (
    alignment_summary,
    leading_singular,
    mean_alignment,
    minority_share,
    qk_spectral_entropy,
    stable_rank,
)
from lightning_mue.diagnostics.spectral import ALIGNMENT_SIZE
from lightning_mue.moe.passes import records_gradients
from lightning_mue.sharded import whole

#: Functions that multiply inputs by a weight: positions of (inputs, weight), and whether the weight is [in, out].
_PRODUCTS: dict[Callable[..., Any], tuple[int, int, bool]] = {
    F.linear: (0, 1, False),
    torch.addmm: (1, 2, True),
    torch.matmul: (0, 1, True),
    Tensor.matmul: (0, 1, True),
    Tensor.__matmul__: (0, 1, True),
}


class _WeightProbe(UnhookedProbe):
    """Reads parameters while their modules run, when FSDP2 has put them together; the first forward pass of a sample counts."""

    def __init__(self, label: str, module: nn.Module) -> None:
        super().__init__(label)
        self.module = module

    def attach(self, device: torch.device) -> RemovableHandle:
        """Hooks the module."""
        handle, self._seen = super().attach(device), False
        self._handles = [
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]
        return handle

    def finish(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        raise NotImplementedError

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Called after the module has run, also if it raised."""


class MatrixProbe(_WeightProbe):
    """One weight, a matrix or a stack of them. Inputs are seen where they are multiplied, whoever calls the product.

    Statistics: [times seen, largest singular value, smallest stable rank (both over the stack)] and those of
    `alignment_summary`, zero for a stack.
    """

    size = 3 + ALIGNMENT_SIZE

    def __init__(self, label: str, module: nn.Module, name: str, iterations: int) -> None:
        super().__init__(label, module)
        self._name, self._iterations = name, iterations
        self._vectors: Tensor | None = None
        self._watches: list[_Products] = []
        own = [leaf for leaf, p in module.named_parameters(recurse=False) if p.ndim == 2]
        self._alone = own == [name]  # what goes into the module is then what the weight is multiplied by

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not records_gradients():
            return
        weight = module.get_parameter(self._name)
        if not self._seen:
            self._seen = True
            with measuring(weight.device):
                self._measure(whole(weight.detach()))
        if weight.ndim == 2:
            watch = _Products(weight, self._see)
            self._watches.append(watch)
            watch.__enter__()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._watches:
            return
        watch = self._watches.pop()
        watch.__exit__(None, None, None)
        x, width = inputs[0] if inputs else None, module.get_parameter(self._name).shape[-1]
        if self._alone and not watch.told and isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == width:
            self._see(x, None)  # a kernel of its own, as our routers have

    def _measure(self, weight: Tensor) -> None:
        weight = weight.flatten(1) if weight.ndim > 3 else weight
        start = self._vectors
        if start is not None and (
            start.shape[:-1] != (*weight.shape[:-2], weight.shape[-1]) or not start.isfinite().all()
        ):
            start = None
        leading, self._vectors = leading_singular(weight, start, self._iterations)
        assert self.total is not None
        self.total[:3] = torch.stack(
            [torch.ones_like(leading.max()), leading.max(), stable_rank(weight, leading).min()]
        )

    def _see(self, x: Tensor, turned: Tensor | None) -> None:
        """Takes inputs; of a weight that is stored as [in, out], ``turned``, the other side's vector is theirs."""
        if self._vectors is None or self.total is None:
            return
        with measuring(x.device):
            direction = self._vectors[..., 0]
            if turned is not None:
                direction = F.normalize(whole(turned.detach()).float() @ direction, dim=0)
            self.total[3:] += alignment_summary(whole(x), direction)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums, and the extremes of those that saw the weight."""
        if a[0] == 0 or b[0] == 0:
            return a + b
        return torch.cat([a[:1] + b[:1], torch.maximum(a[1:2], b[1:2]), torch.minimum(a[2:3], b[2:3]), a[3:] + b[3:]])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Tag -> value."""
        if total[0] == 0:
            return {}
        found = {"leading": total[1], "stable_rank": total[2]}
        if total[3] != 0:
            found |= {"alignment": mean_alignment(total[3:]), "minority_share": minority_share(total[3:])}
        return {f"spectral/{name}/{self.label}": float(value) for name, value in found.items()}


class _Products(TorchFunctionMode):
    """Tells of the inputs that a weight is multiplied by, while a module runs."""

    def __init__(self, weight: Tensor, see: Callable[[Tensor, Tensor | None], None]) -> None:
        super().__init__()
        self._weight, self._see = weight, see
        self.told = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and len(args) > 5 and args[5] is self._weight:
            self.told = True
            for x in {id(x): x for x in args[:3]}.values():  # queries, keys and values, which are one in self-attention
                self._see(x.detach(), None)
        elif func in _PRODUCTS:
            x_at, weight_at, transposed = _PRODUCTS[func]
            if len(args) > weight_at and args[weight_at] is self._weight:
                self.told = True
                self._see(args[x_at].detach(), self._weight if transposed else None)
        return func(*args, **kwargs)


class QueryKeyProbe(_WeightProbe):
    """The queries and keys of one attention. Statistics: [times seen, sum over heads of the entropy, heads, lowest entropy].

    Args:
        label: ``<role>/<layer>``.
        module: Holds the query matrix.
        read: Returns the heads' rows (w_q [H, k, d], w_k [G, k, d]).
    """

    size = 4

    def __init__(self, label: str, module: nn.Module, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        super().__init__(label, module)
        self._read = read

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._seen or self.total is None or not records_gradients():
            return
        self._seen = True
        with measuring(self.total.device):
            entropy_H = qk_spectral_entropy(*self._read())
            heads = torch.full_like(entropy_H[0], len(entropy_H))
            self.total[:] = torch.stack([heads / heads, entropy_H.sum(), heads, entropy_H.min()])

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums, and the lowest of those that saw the weights."""
        if a[0] == 0 or b[0] == 0:
            return a + b
        return torch.cat([a[:3] + b[:3], torch.minimum(a[3:], b[3:])])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Tag -> value."""
        if total[0] == 0:
            return {}
        found = {"qk_entropy": total[1] / total[2], "qk_entropy_lowest_head": total[3]}
        return {f"spectral/{name}/{self.label}": float(value) for name, value in found.items()}
