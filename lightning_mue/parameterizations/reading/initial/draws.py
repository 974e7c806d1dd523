"""Records how the tensors of a module are drawn while it is built: the distribution itself, not a sample of it.

Below autograd every way to draw (``torch.nn.init``, ``Tensor.normal_``, ``torch.randn(...) * std``, a library's own functions) is
one of a few operators, and what follows them (a factor, a clamp, ``erfinv``) acts on each entry alone. So a distribution is
followed through them as a table of its quantiles: the operator that acts on the tensor acts on the table, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mue.parameterizations.reading.initial.initializer import KEEP, Init, recognise
from lightning_mue.sharded import is_sharded, local

#: Quantiles in a table; those of a normal distribution give its std to 3e-4, and the result is rounded to the exact one.
POINTS = 1 << 14


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the entries of a tensor come from.

    Attributes:
        random: Whether random numbers went into them.
        table: Quantiles of the distribution of each entry [POINTS]; one number for a constant; None where the entries are not
            drawn alike and independently, or that is not known.
        mixed: Parts of the tensor have different origins.
    """

    random: bool
    table: Tensor | None = None
    mixed: bool = False

    def same(self, other: Origin) -> bool:
        """Whether two origins are the same distribution or constant."""
        if self.table is None or other.table is None:
            return False
        return self.table.shape == other.table.shape and torch.equal(self.table, other.table)


#: Made without random numbers, or by something that is not seen here: loaded, computed, drawn by NumPy.
UNKNOWN = Origin(False)


def _constant(value: float) -> Origin:
    return Origin(False, torch.tensor([value], dtype=torch.float64))


def _uniform(low: float = 0.0, high: float = 1.0) -> Origin:
    return Origin(True, low + (high - low) * (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)


def _normal(mean: float = 0.0, std: float = 1.0) -> Origin:
    table = _STANDARD_NORMAL * std + mean
    return Origin(std != 0, table if std else table[:1])


def _cut_normal(mean: float, std: float, low: float, high: float) -> Origin:
    """The normal distribution between two ends."""
    cdf = [0.5 * math.erfc(-(end - mean) / (std * 2**0.5)) for end in (low, high)]
    return Origin(True, mean + std * torch.special.ndtri(_uniform(*cdf).table))  # type: ignore[arg-type]


_STANDARD_NORMAL = torch.special.ndtri(_uniform().table)  # type: ignore[arg-type]
_STANDARD_NORMAL /= _STANDARD_NORMAL.square().mean().sqrt()  # the tails between two quantiles count, too


class _Stored:
    """What is known of one storage; the reference keeps its address from being used again."""

    def __init__(self, storage: Any, origin: Origin) -> None:
        self.storage, self.origins = storage, [origin]
        self.labels: Tensor | None = None  # of each entry; None: all have the first origin


class DrawRecorder(TorchDispatchMode):
    """While active, follows where the entries of tensors come from; afterwards :meth:`init_of` tells how one was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._stored: dict[int, _Stored] = {}

    def __enter__(self) -> Any:
        # torch draws by rejection, which no table follows.
        self._truncated: Any = getattr(torch.nn.init, "_no_grad_trunc_normal_", None)
        if self._truncated is not None:
            torch.nn.init._no_grad_trunc_normal_ = self._draw_truncated  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._truncated is not None:
            torch.nn.init._no_grad_trunc_normal_ = self._truncated

    def _draw_truncated(self, tensor: Tensor, mean: float, std: float, a: float, b: float, **options: Any) -> Any:
        result = self._truncated(tensor, mean, std, a, b, **options)
        if not is_sharded(tensor) and std > 0:
            self._write(tensor, _cut_normal(mean, std, a, b))
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_sharded(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented if any(t is not Tensor for t in types) else func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = [self.origin(tensor) for tensor in given]
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        written = _written(func, args, kwargs)
        if not written:
            old = {_key(tensor) for tensor in given}
            outputs = [tensor for tensor in outputs if _key(tensor) not in old]  # not the views
        if written or outputs:
            origin = self._origin_of(func, args, kwargs, given, before)
            for tensor in written or outputs:
                self._write(tensor, origin)
            if len(outputs) == 1 and not written and func._schema.name in _COPIES:
                self._copy_labels(given[0], outputs[0])
        return out

    def _origin_of(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], before: list[Origin]) -> Origin:
        name = func._schema.name
        if draw := _DRAWS.get(name):
            bound = _bound(func, args, kwargs)
            numbers = [bound[key] for key in draw[1] if key in bound]
            return draw[0](*numbers) if all(isinstance(n, (int, float)) for n in numbers) else Origin(True)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return Origin(True)
        if name in _CONSTANTS:
            value: Any = _CONSTANTS[name]
            value = _bound(func, args, kwargs).get(value) if isinstance(value, str) else value
            value = float(value) if isinstance(value, Tensor) and not value.is_meta else value
            return _constant(value) if isinstance(value, (int, float)) else UNKNOWN
        if name in _COPIES:
            return before[-1]
        if name in _JOINS:
            return _merge(before)
        if torch.Tag.pointwise in func.tags:
            return _pointwise(func, args, kwargs, given, before)
        return Origin(any(origin.random for origin in before))

    def origin(self, tensor: Tensor, without_row: int | None = None) -> Origin:
        """Where the entries of a tensor come from, those of one row left out."""
        stored = self._stored.get(_key(tensor))
        if stored is None:
            if tensor.numel() == 1 and not (tensor.is_meta or tensor.requires_grad or tensor.is_complex()):
                return _constant(float(tensor))  # a number in the form of a tensor
            return UNKNOWN
        if stored.labels is None:
            return stored.origins[0]
        labels = _view(stored.labels, tensor)
        if without_row is not None:
            labels = torch.cat([labels[:without_row], labels[without_row + 1 :]])
        return _merge([stored.origins[i] for i in labels.unique().tolist()])

    def _write(self, tensor: Tensor, origin: Origin) -> None:
        if tensor.numel() == 0:
            return
        key, storage = _key(tensor), tensor.untyped_storage()
        stored = self._stored.get(key)
        entries = storage.nbytes() // tensor.element_size()
        if stored is None or tensor.numel() >= entries:
            before, self._stored[key] = stored, _Stored(storage, origin)
            if tensor.numel() >= entries:
                return
            stored = before or _Stored(storage, UNKNOWN)
            self._stored[key] = stored
        if tensor.is_meta or len(stored.origins) > 250:  # no memory for a large target's labels
            stored.origins, stored.labels = [Origin(True, mixed=True)], None
            return
        if stored.labels is None:
            stored.labels = torch.zeros(entries, dtype=torch.uint8, device="cpu")
        index = next((i for i, known in enumerate(stored.origins) if known.same(origin)), len(stored.origins))
        stored.origins += [origin] if index == len(stored.origins) else []
        _view(stored.labels, tensor).fill_(index)

    def _copy_labels(self, source: Tensor, copy: Tensor) -> None:
        """A copy of a tensor whose parts differ has the same parts."""
        stored = self._stored.get(_key(source))
        if stored is None or stored.labels is None or not copy.is_contiguous() or copy.shape != source.shape:
            return
        labels = _view(stored.labels, source)
        new = _Stored(copy.untyped_storage(), UNKNOWN)
        new.origins, new.labels = list(stored.origins), labels.flatten().clone()
        self._stored[_key(copy)] = new

    def init_of(self, tensor: Tensor, padding_row: int | None = None) -> Init | None:
        """How a parameter was drawn; None where its values have to tell.

        Args:
            tensor: A tensor that was made while this was active; of a DTensor this rank's part is looked at.
            padding_row: Row of an embedding that its module sets to zero.
        """
        part = local(tensor).detach() if is_sharded(tensor) else tensor.detach()
        origin = self.origin(part, padding_row if not is_sharded(tensor) else None)
        if origin.table is not None:
            if not origin.random:
                return Init("constant", float(origin.table[0]))
            return recognise(origin.table, tensor.dim())
        if origin.mixed:
            return Init("scaled", self._rms(part)) if origin.random and tensor.dim() > 1 else KEEP
        return None

    def _rms(self, tensor: Tensor) -> float:
        """Root mean square of a tensor of several parts: of their distributions, else of its own values."""
        stored, total = self._stored[_key(tensor)], 0.0
        if stored.labels is None:
            return float(tensor.float().square().mean().sqrt())
        counts = _view(stored.labels, tensor).flatten().long().bincount().tolist()
        for count, origin in zip(counts, stored.origins, strict=False):
            if count and origin.table is None:
                return float(tensor.float().square().mean().sqrt())
            total += count * float(origin.table.square().mean()) if origin.table is not None else 0.0
        return float((total / tensor.numel()) ** 0.5)


_DRAWS: dict[str, tuple[Callable[..., Origin], tuple[str, ...]]] = {
    "aten::normal_": (_normal, ("mean", "std")),
    "aten::uniform_": (_uniform, ("from", "to")),
    **{f"aten::{name}": (_normal, ()) for name in ("randn", "randn_like")},
    **{f"aten::{name}": (_uniform, ()) for name in ("rand", "rand_like")},
    "aten::normal": (_normal, ("mean", "std")),
}
#: Operator -> the constant, or the name of the argument that holds it.
_CONSTANTS: dict[str, float | str] = {
    **{f"aten::{name}": 0.0 for name in ("zero_", "zeros", "zeros_like", "new_zeros")},
    **{f"aten::{name}": 1.0 for name in ("ones", "ones_like", "new_ones")},
    **{f"aten::{name}": "value" for name in ("fill_", "fill")},
    **{f"aten::{name}": "fill_value" for name in ("full", "full_like", "new_full")},
}
_COPIES = {"aten::clone", "aten::_to_copy", "aten::copy_", "aten::lift_fresh", "aten::lift_fresh_copy"}
_JOINS = {"aten::cat", "aten::stack", "aten::concat"}


def _merge(origins: list[Origin]) -> Origin:
    if origins and all(origins[0] is other or origins[0].same(other) for other in origins):
        return origins[0]
    return Origin(any(origin.random for origin in origins), mixed=True)


def _pointwise(func: Any, args: Any, kwargs: Any, given: list[Tensor], before: list[Origin]) -> Origin:
    """The distribution of what an operator makes of each entry; of two draws together none is made."""
    draws = [origin for origin in before if origin.random]
    if len(draws) > 1 or any(origin.table is None for origin in before) or "out" in kwargs:
        return Origin(bool(draws))
    tables = {id(tensor): origin.table for tensor, origin in zip(given, before, strict=True)}

    def table_of(leaf: Any) -> Any:
        return tables[id(leaf)].clone() if isinstance(leaf, Tensor) else leaf  # type: ignore[union-attr]

    try:
        result = func(*tree_map(table_of, args), **tree_map(table_of, kwargs))
    except (RuntimeError, TypeError, ValueError):
        return Origin(bool(draws))
    if not isinstance(result, Tensor) or result.is_complex() or result.shape not in ((POINTS,), (1,)):
        return Origin(bool(draws))
    result = result.double()
    equal = bool((result == result[0]).all())
    finite = bool(result.isfinite().all())
    return Origin(not equal, result[:1] if equal else result) if finite else Origin(bool(draws))


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Argument's name -> value, defaults included."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator overwrites."""
    writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if not writes:
        return []
    found = [value for name, value in _bound(func, args, kwargs).items() if name in writes]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _view(labels: Tensor, tensor: Tensor) -> Tensor:
    """The labels of a tensor's entries, from those of its storage."""
    return torch.as_strided(labels, tensor.size(), tensor.stride(), tensor.storage_offset())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
