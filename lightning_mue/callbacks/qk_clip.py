"""QKClip: bounds attention logits by scaling the query and key weights of heads whose logits grew too large.

Shape legend: N query heads, M key heads, k head dimension, d width, B batch, S query positions, T key positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_mue.callbacks.monitors.probes import find_modules, first_tensor
from lightning_mue.checks import listed, require_number
from lightning_mue.contract import is_attention_core
from lightning_mue.diagnostics.zvalue import attention_max_logits
from lightning_mue.moe.passes import records_gradients
from lightning_mue.optim.split import cut_of, pieces
from lightning_mue.parameterizations.rules.kinds import SPHERE_KINDS
from lightning_mue.sharded import is_sharded

#: Names of the query and key weights, or of the linear layers that hold them, beside an attention core.
_PAIRS = (("w_q", "w_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("to_q", "to_k"), ("query", "key"), ("q", "k"))


class _Rows(NamedTuple):
    """Rows of a weight, or of a bias, that make queries or keys."""

    tensor: Tensor
    start: int
    stop: int


class _Head(NamedTuple):
    """The rows of an attention's queries and keys."""

    queries: tuple[_Rows, ...]
    keys: tuple[_Rows, ...]


class _Attention:
    """One attention: its weights, and the largest logit of each query head since the last step."""

    def __init__(self, name: str, module: nn.Module, rows: _Head) -> None:
        self.name, self.module, self.rows = name, module, rows
        self.largest_N: Tensor | None = None
        self.heads = 1  # known from the first forward on
        is_core = is_attention_core(module)
        self.handle = module.register_forward_hook(self._of_core if is_core else self._of_torch, with_kwargs=True)

    def _of_core(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        q, k = (first_tensor(args[i] if len(args) > i else kwargs.get(name)) for i, name in enumerate("qk"))
        if module.training and records_gradients() and q is not None and k is not None:
            self._add(attention_max_logits(q, k, float(module.scale)))

    def _of_torch(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Of nn.MultiheadAttention, whose forward names its arguments."""
        if not module.training or not records_gradients():
            return
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with torch.no_grad(), torch.autocast(given["query"].device.type, enabled=False):
            q, k = _torch_heads(module, given["query"], given["key"])
            mask = _hidden(module, given, q, k)
            self._add(attention_max_logits(q, k, q.shape[-1] ** -0.5, causal=False, hidden=mask))

    def _add(self, largest_N: Tensor) -> None:
        self.heads = len(largest_N)
        self.largest_N = largest_N if self.largest_N is None else torch.maximum(self.largest_N, largest_N)


class QKClip(Callback):
    """After an optimizer step, scales down the queries and keys of heads whose largest logit exceeded a threshold (MuonClip).

    With the largest logit m of a head in the batches of the step and g = min(1, threshold / m), the head's logits are
    multiplied by g: its rows of the key weight by sqrt(g), those of the query weight by sqrt(g). Where query heads share a
    key head, its rows are multiplied by the square root of the smallest g among them, s, and the rows of each query head by
    g / s: the logits of every head change by its own g, and those of a head below the threshold not at all.

    On the sphere the radius follows: it is multiplied by what the weight's norm (that of its part, if it is split) changed by,
    so that the next step does not undo the clip. The angle of a step stays what the learning rate says.

    Logits are those of causal modules with ``mue_attention_core`` beside weights called ``w_q`` and ``w_k`` (or ``q_proj``,
    ``k_proj``, and other usual names), and of ``nn.MultiheadAttention``. They cost a product of queries and keys more a step, in
    blocks. Attentions that normalize their queries or keys are left out, as their logits do not follow the weights; what else is
    left out is named in a warning when training begins. Under DDP the largest logits of all ranks count.

    Metrics, at the Trainer's logging steps: ``qk_clip/clipped``, the heads clipped since the last logged step, and
    ``qk_clip/max_logit``, the largest logit of the last step.

    Source: arXiv:2507.20534, algorithm 1.

    Args:
        threshold: Largest logit that is left alone.

    Raises:
        ValueError: If ``threshold`` is not positive.
        TypeError: If it is not a number.
    """

    def __init__(self, threshold: float = 100.0) -> None:
        require_number("threshold", threshold, above=0)
        self.threshold = float(threshold)
        #: Heads clipped in this fit.
        self.clipped = 0
        self._logged, self._largest = 0, 0.0
        self._attentions: list[_Attention] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attentions and the optimizer that steps them."""
        self._release()
        self.clipped = self._logged = 0
        found, left_out = _find(pl_module)
        for name, module, rows in found:
            holders = [o for o in trainer.optimizers if _holds(o, rows)]
            if len(holders) == 1 and hasattr(holders[0], "register_step_post_hook"):
                attention = _Attention(name, module, rows)
                self._attentions.append(attention)
                self._handles += [attention.handle, holders[0].register_step_post_hook(self._after(attention))]
            else:
                left_out.append(f"{name} (no single optimizer steps its queries and keys)")
        if left_out or not found:
            do = "Their logits are not bounded by this callback." if left_out else "It does nothing."
            rank_zero_warn(f"QKClip leaves out {listed(left_out, 'every module: it found no attention')}. {do}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many heads were clipped."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if self._attentions and every and trainer.global_step % every == 0:
            metrics = {"qk_clip/clipped": float(self.clipped - self._logged), "qk_clip/max_logit": self._largest}
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)
            self._logged = self.clipped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._attentions = [], []

    def _after(self, attention: _Attention) -> Any:
        first = not self._attentions[:-1]

        @torch.no_grad()
        def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._largest = 0.0 if first else self._largest
            self._clip(attention, optimizer)

        return clip

    def _clip(self, attention: _Attention, optimizer: Optimizer) -> None:
        largest_N, attention.largest_N = attention.largest_N, None
        if largest_N is None:  # no training forward on this rank since the last step
            largest_N = torch.zeros(attention.heads, device=attention.rows.queries[0].tensor.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest_N, op=torch.distributed.ReduceOp.MAX)
        top = float(largest_N.max())
        self._largest = max(self._largest, top)
        if not top > self.threshold:  # also where it is NaN
            return
        factor_N = (self.threshold / largest_N.clamp_min(self.threshold)).double()
        keys = attention.rows.keys[0]
        width = (attention.rows.queries[0].stop - attention.rows.queries[0].start) // len(factor_N)
        n_keys = (keys.stop - keys.start) // width
        key_M = factor_N.view(n_keys, -1).amin(-1).sqrt()
        query_N = factor_N / key_M.repeat_interleave(len(factor_N) // n_keys)
        for rows, factors in ((attention.rows.queries, query_N), (attention.rows.keys, key_M)):
            for each in rows:
                _scale(each, factors.repeat_interleave((each.stop - each.start) // len(factors)), optimizer)
        self.clipped += int((factor_N < 1).sum())


def _scale(rows: _Rows, factors: Tensor, optimizer: Optimizer) -> None:
    """Scale rows of a parameter, and its radius by what its norm changed by."""
    tensor, state = rows.tensor, optimizer.state.get(rows.tensor, {})
    spheres = any(tensor is p for group in optimizer.param_groups if group.get("kind") in SPHERE_KINDS for p in group["params"])
    radius = state.get("radius") if spheres else None
    before = None if radius is None else _norms(tensor, optimizer, radius)
    part = tensor.data[rows.start : rows.stop]
    part.mul_(factors.to(part.dtype).view(-1, *[1] * (tensor.ndim - 1)))
    if radius is not None:
        radius.mul_((_norms(tensor, optimizer, radius) / before).to(radius.dtype))


def _norms(tensor: Tensor, optimizer: Optimizer, radius: Tensor) -> Tensor:
    """Return the norms, in float64, of what has a radius of its own."""
    if radius.ndim == 0:
        return torch.linalg.vector_norm(tensor.double())
    split = next(g.get("split") for g in optimizer.param_groups for p in g["params"] if p is tensor)
    cut = cut_of(split, tensor.shape)
    assert cut is not None
    return torch.stack([torch.linalg.vector_norm(part.double()) for part in pieces(tensor, cut)])


def _holds(optimizer: Optimizer, rows: _Head) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(each.tensor) in held for each in (rows.queries[0], rows.keys[0]))


def _find(model: nn.Module) -> tuple[list[tuple[str, nn.Module, _Head]], list[str]]:
    """Return the attentions whose logits can be measured and bounded, and what is left out and why."""
    modules = find_modules(model, lambda _: True)
    found, left_out, seen = [], [], set[str]()
    for name, module in modules.items():
        if is_attention_core(module):
            parent = name.rpartition(".")[0]
            around = modules[parent]
            seen.add(parent)
            rows = _rows_beside(around)
        elif isinstance(module, nn.MultiheadAttention):
            around, rows = module, _rows_of_torch(module)
            seen |= {name, *(f"{name}.{child}" for child, _ in module.named_modules())}
        else:
            continue
        reason = _refusal(around, rows)
        if reason is None and rows is not None:
            found.append((name, module, rows))
        else:
            left_out.append(f"{name} ({reason})")
    others = [n for n, m in modules.items() if _is_other(n, m) and not any(s == n or s.startswith(f"{n}.") for s in seen)]
    return found, left_out + [f"{name} (its logits cannot be seen)" for name in others]


def _is_other(name: str, module: nn.Module) -> bool:
    """Whether a module looks like an attention: by its class, with weights of its own or in its layers."""
    owns = any(p.ndim > 1 for child in (module, *module.children()) for p in child.parameters(recurse=False))
    called = type(module).__name__.lower()
    return owns and ("attention" in called or "attn" in called) and not isinstance(module, nn.MultiheadAttention)


def _refusal(around: nn.Module, rows: _Head | None) -> str | None:
    norms = [n for n, m in around.named_children() if "norm" in n.lower() and not isinstance(m, nn.Identity)]
    if any(n.lower().replace("_", "").startswith(("q", "k", "norm")) and "out" not in n for n in norms):
        return f"normalized by {listed(norms)}, its logits do not follow the weights"
    if rows is None:
        return "no pair of query and key weights was found beside it"
    tensors = [each.tensor for each in (*rows.queries, *rows.keys)]
    if any(is_sharded(tensor) for tensor in tensors):
        return "its weights are sharded over ranks"
    return None if all(tensor.requires_grad for tensor in tensors) else "its weights are not trained"


def _rows_beside(attention: nn.Module) -> _Head | None:
    for names in _PAIRS:
        both = [tuple(_own_rows(getattr(attention, name, None))) for name in names]
        if all(both):
            return _Head(*both)
    return None


def _own_rows(held: Any) -> Iterator[_Rows]:
    """The rows of a weight, or of a linear layer's weight and bias."""
    tensors = [held] if isinstance(held, Tensor) else [held.weight, held.bias] if isinstance(held, nn.Linear) else []
    yield from (_Rows(tensor, 0, len(tensor)) for tensor in tensors if tensor is not None)


def _rows_of_torch(module: nn.MultiheadAttention) -> _Head | None:
    d = module.embed_dim
    if module.bias_k is not None:
        return None  # a key that no weight makes
    biases = [] if module.in_proj_bias is None else [module.in_proj_bias]
    if module.in_proj_weight is not None:
        q, k = ([_Rows(module.in_proj_weight, start, start + d)] for start in (0, d))
    else:
        q, k = ([_Rows(weight, 0, d)] for weight in (module.q_proj_weight, module.k_proj_weight))
    return _Head((*q, *(_Rows(b, 0, d) for b in biases)), (*k, *(_Rows(b, d, 2 * d) for b in biases)))


def _torch_heads(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[B, N, S, k]` and keys `[B, N, T, k]` in float32."""
    rows = _rows_of_torch(module)
    assert rows is not None
    heads = []
    for x, made in ((query, rows.queries), (key, rows.keys)):
        x = x.unsqueeze(0) if x.ndim == 2 else x if module.batch_first else x.transpose(0, 1)
        weight, *bias = (each.tensor.detach()[each.start : each.stop].float() for each in made)
        y = F.linear(x.detach().float(), weight, *bias)
        heads.append(y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    return heads[0], heads[1]


def _hidden(module: Any, given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a query does not see, boolean, of a shape that extends to `[B, N, S, T]`."""
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    hidden = None
    if mask is not None:
        hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
        hidden = hidden.unflatten(0, (q.shape[0], q.shape[1])) if hidden.ndim == 3 else hidden
    if padding is not None:
        padded = (padding if padding.dtype == torch.bool else padding == float("-inf")).view(-1, 1, 1, k.shape[2])
        hidden = padded if hidden is None else hidden | padded
    return hidden
