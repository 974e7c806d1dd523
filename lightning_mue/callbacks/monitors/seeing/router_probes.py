"""Probes of routers: load, entropies, gate mass, similarity of the experts' scores, and how fast choices change.

Shape legend: T tokens, E experts, K experts a token, d width, P fixed directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import Probe, first_tensor
from lightning_mue.callbacks.monitors.seeing.padding import PaddingMask
from lightning_mue.callbacks.monitors.seeing.watching import Handles, WatchingProbe, WeightCalls
from lightning_mue.checks import value_error
from lightning_mue.diagnostics import dead_experts, load_entropy, load_max_fraction, max_violation
from lightning_mue.sharded import is_sharded, whole

#: Statistics before the counts: [token entropies, tokens, gate masses, tokens with a choice, similarities, experts, changed
#: choices, directions].
_HEADER = 8
#: Fixed directions whose choice is followed.
_DIRECTIONS = 256

_TOP = frozenset({torch.topk, Tensor.topk})
_CHOICES = _TOP | {torch.argmax, Tensor.argmax, torch.max, Tensor.max}


class _Routing(Probe):
    """Statistics: `_HEADER`, then the counts of the E experts."""

    _choices_P: Tensor | None = None
    _weighed = False

    @property
    def n_experts(self) -> int:
        """E."""
        return self.size - _HEADER

    def weight(self) -> Tensor | None:
        """The router's weight [E, d], if it is whole on this rank."""
        return None

    def statistics(
        self, logits_TE: Tensor, ids: Tensor | None, counts_E: Tensor | None, mask_T: Tensor | None
    ) -> Tensor:
        """Float32 [size] of one pass; ``ids`` [T, K] are the chosen experts, where they are known token by token."""
        logits_TE = logits_TE.float()
        real_T = logits_TE.new_ones(len(logits_TE)) if mask_T is None else mask_T.reshape(-1).float()
        p_TE = logits_TE.softmax(-1)
        entropy = (torch.special.entr(p_TE).sum(-1) * real_T).sum()
        zero = entropy.new_zeros(())
        mass, chosen = zero, zero
        if ids is not None:
            valid_TK = (ids >= 0) & (ids < self.n_experts) & (real_T > 0).unsqueeze(1)
            held_TK = p_TE.gather(1, ids.clamp(0, self.n_experts - 1).long()) * valid_TK
            mass, chosen = held_TK.sum(), valid_TK.any(1).float().sum()
            if counts_E is None:
                flat = ids.clamp(0, self.n_experts - 1).long().flatten()
                counts_E = zero.new_zeros(self.n_experts).scatter_add_(0, flat, valid_TK.float().flatten())
        counts_E = zero.new_zeros(self.n_experts) if counts_E is None else counts_E.float()
        header = [entropy, real_T.sum(), mass, chosen, *self._of_weight(zero)]
        return torch.cat([torch.stack(header), counts_E])

    def metrics(self, total: Tensor) -> dict[str, float]:
        tokens, counts_E = total[1], total[_HEADER:]
        if tokens == 0:
            return {}
        values = {"token_entropy": total[0] / tokens}
        if counts_E.sum() > 0:
            values |= {
                "max_violation": max_violation(counts_E),
                "load_entropy": load_entropy(counts_E),
                "dead_experts": dead_experts(counts_E),
                "load_max_fraction": load_max_fraction(counts_E),
            }
        for name, at in (("gate_mass", 2), ("expert_similarity", 4), ("choice_churn", 6)):
            if total[at + 1] > 0:
                values[name] = total[at] / total[at + 1]
        return {f"routing/{name}/{self.label}": float(value) for name, value in values.items()}

    def _of_weight(self, zero: Tensor) -> list[Tensor]:
        """[sum over experts of the largest cosine with another one, experts, changed choices, directions], once a step."""
        weight = None if self._weighed else self.weight()
        if weight is None or weight.shape[0] < 2:
            return [zero, zero, zero, zero]
        self._weighed = True
        w_Ed = weight.detach().float()
        unit_Ed = torch.nn.functional.normalize(w_Ed, dim=1)
        cosine_EE = (unit_Ed @ unit_Ed.t()).fill_diagonal_(float("-inf"))
        choices_P = (_directions(w_Ed.shape[1], w_Ed.device) @ w_Ed.t()).argmax(1)
        changed, seen = zero, zero
        if self._choices_P is not None:
            changed, seen = (choices_P != self._choices_P).sum().float(), zero + _DIRECTIONS
        self._choices_P = choices_P
        return [cosine_EE.amax(1).sum(), zero + len(w_Ed), changed, seen]


@lru_cache(maxsize=8)
def _directions(width: int, device: torch.device) -> Tensor:
    """[P, d], the same ones on every rank and in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_DIRECTIONS, width, generator=generator, dtype=torch.float32).to(device)


class DeclaredRouterProbe(_Routing):
    """A router whose output has ``logits`` [T, E] and ``counts`` [E], and may have ``expert_ids`` [T, K] and a ``mask`` [T]."""

    def __init__(self, module: nn.Module, label: str) -> None:
        super().__init__(module, label)
        self.size = _HEADER + _n_experts(module, label)

    def weight(self) -> Tensor | None:
        """The module's ``weight`` [E, d], if it has one."""
        return _whole_weight(getattr(self.module, "weight", None), self.n_experts)

    def attach(self, device: torch.device) -> Any:
        """Hook the module and forget the previous step."""
        self._weighed = False
        return super().attach(device)

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """From the output."""
        logits, counts_E = getattr(output, "logits", None), getattr(output, "counts", None)
        if logits is None or counts_E is None:
            return None
        if counts_E.numel() != self.n_experts:
            found = f"counts of {counts_E.numel()} experts"
            expected = f"{self.n_experts}, which is its n_experts (or the rows of its weight)"
            do = "Return one count for each expert, zeros included."
            raise value_error(f"router {self.label}", found=found, expected=expected, do=do)
        ids = getattr(output, "expert_ids", None)
        if (
            not isinstance(ids, Tensor)
            or ids.ndim != 2
            or len(ids) != len(logits)
            or getattr(output, "token_ids", None) is not None
        ):
            ids = None  # not by token
        return self.statistics(logits, ids, counts_E, getattr(output, "mask", None))


class FoundRouterProbe(WatchingProbe, _Routing):
    """A router of any project, seen at work inside the module round it.

    Logits are what comes of the product with its weight (else its output of E columns); the choice is the last ``topk`` over E
    entries while the module round it runs, or what ``argmax`` and ``max`` find together; else the integers in its output, else
    the ``top_k`` largest logits. Where experts choose among the tokens there is no load.
    """

    def __init__(
        self,
        module: nn.Module,
        label: str,
        leaf: str,
        n_experts: int,
        top_k: int | None,
        scopes: Sequence[nn.Module],
        padding: PaddingMask,
    ) -> None:
        super().__init__(module, label, scopes)
        self.size = _HEADER + n_experts
        self._padding = padding
        self._leaf, self._top_k, self._calls = leaf, top_k, WeightCalls(module, leaf, n_experts)
        self.enter()

    def weight(self) -> Tensor | None:
        """The weight by its name."""
        return _whole_weight(getattr(self.module, self._leaf, None), self.n_experts)

    def attach(self, device: torch.device) -> Any:
        """Hook the scopes and the router itself, and forget the previous step."""
        self._weighed = False

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._returned.append(output)

        return Handles(super().attach(device), self.module.register_forward_hook(keep), self._padding.attach())

    def enter(self) -> None:
        """A pass begins."""
        self._calls.forget()
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._returned: list[Any] = []
        self._by_experts = self._many = False

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep the logits and the choices of this pass."""
        product = self._calls.product(func, args, kwargs, output)
        if product is not None:
            self._logits.append(whole(product.detach()).reshape(-1, self.n_experts))
            self._chosen = self._chosen[: len(self._logits) - 1]
        elif func in _CHOICES:
            scores = args[0] if args else kwargs.get("input")
            if isinstance(scores, Tensor) and self.n_experts in scores.shape:
                self._choose(func, scores, args[1:], kwargs, output)

    def _choose(self, func: Any, scores: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep a choice made over the experts: of several columns, or one expert a token at each call (DeepSpeed's argmax)."""
        single = func not in _TOP
        place = 0 if single else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else None if single else -1)
        keeps = single and kwargs.get("keepdim", any(arg is True for arg in args))
        if keeps or not isinstance(dim, int):
            return  # to subtract the largest, or over all entries
        if scores.shape[dim] != self.n_experts:
            tokens = [logits.numel() for logits in self._logits[-1:]]
            self._by_experts |= scores.numel() in tokens and self.n_experts in scores.shape[-2:]
            return
        ids = (output if isinstance(output, Tensor) else output[1]).detach()
        ids = whole(ids).unsqueeze(-1) if single else whole(ids).movedim(dim, -1)
        ids = ids.flatten(0, -2)
        at = max(0, len(self._logits) - 1)
        before = self._chosen[at] if at < len(self._chosen) else None
        if single and before is not None and len(before) == len(ids):
            if self._many or before.shape[1] == self._top_k:
                return  # the choice stands; this call only looks at it
            ids = torch.cat([before, ids.masked_fill((before == ids).any(1, keepdim=True), -1)], dim=1)
        self._many = not single
        self._chosen[at:] = [ids]

    def leave(self, output: Any) -> None:
        """Measure the pass."""
        if not self._logits:
            self._logits = [logits for each in self._returned if (logits := self._columns(each)) is not None]
        for i, logits_TE in enumerate(self._logits):
            ids = self._chosen[i] if i < len(self._chosen) else None
            if ids is None or len(ids) != len(logits_TE):
                ids = self._integers(i, len(logits_TE))
            if self._by_experts:
                ids = None  # experts choose their tokens: each has as many
            elif ids is None and self._top_k is not None:
                ids = logits_TE.topk(min(self._top_k, self.n_experts), dim=-1).indices
            self.add(self.statistics(logits_TE, ids, None, self._padding.real(len(logits_TE))))
        self.enter()

    def _columns(self, output: Any) -> Tensor | None:
        parts = output if isinstance(output, (tuple, list)) else (getattr(output, "logits", output),)
        for part in parts:
            tensor = first_tensor(part)
            if tensor is not None and tensor.shape[-1:] == (self.n_experts,) and tensor.ndim > 1:
                return tensor.reshape(-1, self.n_experts)
        return None

    def _integers(self, i: int, tokens: int) -> Tensor | None:
        output = self._returned[i] if i < len(self._returned) else None
        for part in output if isinstance(output, (tuple, list)) else ():
            if isinstance(part, Tensor) and part.dtype in (torch.int64, torch.int32) and part.ndim > 1:
                ids = whole(part.detach()).flatten(0, -2)
                if len(ids) == tokens:
                    return ids
        return None


def _whole_weight(weight: Any, n_experts: int) -> Tensor | None:
    """[E, d] from a weight that is stored as it is or turned; None if it is of another form, or sharded."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or is_sharded(weight) or n_experts not in weight.shape:
        return None
    return weight if weight.shape[0] == n_experts else weight.t()


def _n_experts(module: nn.Module, label: str) -> int:
    n_experts, weight = getattr(module, "n_experts", None), getattr(module, "weight", None)
    if isinstance(n_experts, int):
        return n_experts
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    found = f"{type(module).__name__} without a number of experts"
    expected = "an integer attribute n_experts, or a weight [n_experts, width]"
    raise value_error(f"router {label}", found=found, expected=expected, do="Give it one of them.")
