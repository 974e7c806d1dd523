"""Fused matrices in parts: where a matrix is cut, and its parts as matrices of their own, whole or sharded.

Each part is orthogonalized and has a radius of its own, so that a fused matrix is stepped exactly as its parts would be as
separate parameters (docs/derivations/hypersphere.md, "Fused matrices").

Shape legend:
    E  matrices (experts) in one stacked parameter      P  parts of a matrix
    out, in (o, i)  rows and columns
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_mue.checks import listed, type_error, value_error
from lightning_mue.contract import declared_split, note_split
from lightning_mue.names import clean_name, plain_name
from lightning_mue.optim.matrices import Matrix
from lightning_mue.parameterizations.reading.parameters import list_parameters, named_tensors
from lightning_mue.parameterizations.reading.roles.queries import FUSED_QUERIES, read_queries
from lightning_mue.parameterizations.reading.roles.role_names import name_roles

#: Names of matrices that may hold several: queries, keys, values; gate and up.
_FUSED = re.compile(
    r"(to_|w_?|in_)?q?_?kv(_(a_|b_)?proj|_lin(ear)?)?(_with_mqa)?|kv_[ab]_proj(_with_mqa)?|(query_)?key_value|in_proj|attn"
    r"|queries_keys_values|keys_values|gate_?up(_proj)?|gate_and_up(_proj)?|up_?gate(_proj)?|w_?13|w_?12",
    re.IGNORECASE,
)
#: Packages of whose layers `read_queries` knows the order of q, k and v.
_READ = ("torch.nn.", "transformers.models.", "litgpt.", "lightning_mue.")
_FORMS = (
    '"auto", a number of equal parts, a list of sizes, or one of {"rows": ...}, {"columns": ...}, {"heads": number}'
)


class PartBounds(NamedTuple):
    """Where a matrix is cut: the side (0 rows, 1 columns), and where each part starts and ends."""

    side: int
    bounds: tuple[tuple[int, int], ...]

    @property
    def equal(self) -> bool:
        """Whether all parts have one shape."""
        return len({stop - start for start, stop in self.bounds}) == 1


def checked_split(split: Any) -> Any:
    """Return a `split` in the form that a state dict should hold: None, "auto", an integer, a list, or {"columns": ...}.

    Raises:
        TypeError: If it has none of the forms.
        ValueError: If a number is below 1.
    """
    if split is None or split == "auto":
        return split
    side, parts = "rows", split
    if isinstance(split, Mapping):
        if len(split) != 1 or not set(split) <= {"rows", "columns", "heads"}:
            raise value_error("split", found=repr(split), expected=_FORMS)
        ((side, parts),) = split.items()
    numbers = list(parts) if isinstance(parts, Sequence) and not isinstance(parts, str) and side != "heads" else [parts]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise type_error("split", found=repr(split), expected=_FORMS)
    if min(numbers) < 1:
        raise value_error("split", found=repr(split), expected="numbers of at least 1")
    plain = numbers if isinstance(parts, Sequence) else numbers[0]
    return {"columns": plain} if side == "columns" else plain


def cut_of(split: Any, shape: Sequence[int], what: str = "parameter") -> PartBounds | None:
    """Return where a `split` (checked, not "auto") cuts the matrices of a parameter; None if it leaves them whole.

    Raises:
        ValueError: If the parts are not the whole side.
    """
    if split is None or split == 1:
        return None
    side, parts = (1, split["columns"]) if isinstance(split, Mapping) else (0, split)
    return _cut(side, parts if isinstance(parts, int) else tuple(parts), tuple(shape), what)


@lru_cache(maxsize=4096)
def _cut(side: int, parts: int | tuple[int, ...], shape: tuple[int, ...], what: str) -> PartBounds:
    size = shape[part_dim(side, len(shape))]
    sides = ("rows", "columns")[side]
    if side == 1 and len(shape) > 3:
        raise value_error(f"split of {what}", found="columns of a convolution", expected="rows, its output channels")
    sizes = (size // parts,) * parts if isinstance(parts, int) else parts
    if sum(sizes) != size or 0 in sizes:
        do = "Put parameters that are cut otherwise in a group of their own."
        found = f"{parts} for {size} {sides} of shape {list(shape)}"
        expected = f"equal parts of the {sides}, or sizes that add up to them"
        raise value_error(f"split of {what}", found=found, expected=expected, do=do)
    return PartBounds(side, tuple(pairwise(accumulate(sizes, initial=0))))


def part_dim(side: int, ndim: int) -> int:
    """The dimension of a parameter that is the rows (side 0) or columns (1) of its matrices."""
    return side + 1 if ndim == 3 else side


def pieces(x: Tensor, cut: PartBounds) -> list[Tensor]:
    """Views of the parts of a parameter, or of a tensor of its shape."""
    dim = part_dim(cut.side, x.ndim)
    return [x.narrow(dim, start, stop - start) for start, stop in cut.bounds]


def whole_parts(item: Matrix, cut: PartBounds | None) -> list[Matrix]:
    """The parts of a parameter that is whole here, as views; equal ones as one stack, which is worked on in a batch."""
    if cut is None:
        return [item]
    tensors = (item.weight, item.grad, item.momentum)
    if not cut.equal or not all(_can_stack(x, cut) for x in tensors):
        return part_views(item, cut)
    weight, grad, momentum = (_stack(x, cut) for x in tensors)
    radius = None if item.radius is None else item.radius.reshape(-1)
    rows = None if item.rows is None else item.rows.reshape(-1, item.rows.shape[-1] // len(cut.bounds))
    return [Matrix(weight, grad, momentum, radius, rows)]


def _can_stack(x: Tensor, cut: PartBounds) -> bool:
    # Two dimensions of a stack, experts and parts, are one in a view only if they follow each other in memory.
    if x.ndim == 3:
        return cut.side == 0 and x.is_contiguous()
    return x.ndim == 2


def _stack(x: Tensor, cut: PartBounds) -> Tensor:
    parts = len(cut.bounds)
    if x.ndim == 3:
        return x.view(-1, x.shape[1] // parts, x.shape[2])
    return x.unflatten(cut.side, (parts, -1)).movedim(cut.side, 0)


def part_views(item: Matrix, cut: PartBounds) -> list[Matrix]:
    """The parts of a parameter, or of this rank's piece of one, as views."""
    radii = [None] * len(cut.bounds) if item.radius is None else item.radius.unbind(-1)
    rows = [None] * len(cut.bounds) if item.rows is None else [item.rows[..., a:b] for a, b in cut.bounds]
    columns = (pieces(x, cut) for x in (item.weight, item.grad, item.momentum))
    return [Matrix(*each) for each in zip(*columns, radii, rows, strict=True)]


def infer_split(name: str | None, param: Tensor, shapes: Mapping[str, Sequence[int]]) -> tuple[Any, str | None]:
    """Decide how a matrix is split with `split="auto"`: by its attribute `mue_split`, else by a name with one known layout.

    A wrong cut is worse than none and cannot be seen, so a name that models use for several layouts is left whole: `qkv`
    with rows [3 d] may be q, k, v in turn, head by head, or of grouped queries.

    Args:
        name: The parameter's dotted name, or None.
        param: The parameter.
        shapes: Shapes of all parameters, by name; the layer down of a stack of experts tells rows from columns.

    Returns:
        The split or None, and why a matrix whose name says that it may be fused is left whole.

    Raises:
        ValueError: If `mue_split` is "auto", or a number below 1.
        TypeError: If `mue_split` has none of the forms of a split.
    """
    if (given := declared_split(param)) is not None:
        if given == "auto":
            raise value_error(f"mue_split of {name!r}", found='"auto"', expected="a split", do="Give its sizes.")
        return (None if given == 1 else checked_split(given)), None
    if name is None:
        return None, "they have no name"
    layer, leaf = _layer_and_leaf(name)
    shape = tuple(param.shape)
    if leaf == "in_proj_weight" and len(shape) == 2 and shape[0] == 3 * shape[1]:  # nn.MultiheadAttention
        return 3, None
    if leaf == "c_attn" and len(shape) == 2 and shape[1] == 3 * shape[0]:  # GPT-2's Conv1D, [in, out]
        return {"columns": 3}, None
    if leaf == "gate_up_proj":
        return _split_gate_up(layer, shape, shapes)
    if _FUSED.fullmatch(leaf) or FUSED_QUERIES.fullmatch(leaf):
        square = len(shape) == 2 and shape[0] == shape[1]  # as of a layer that is not fused
        return None, None if square else "models differ in the order and the sizes of the parts under these names"
    return None, None


def _layer_and_leaf(name: str) -> tuple[str, str]:
    path = re.sub(r"\.weight$", "", plain_name(name)) if name else ""
    layer, _, leaf = path.rpartition(".")
    return layer, leaf


def _split_gate_up(layer: str, shape: tuple[int, ...], shapes: Mapping[str, Sequence[int]]) -> tuple[Any, str | None]:
    if len(shape) == 2:
        return (2, None) if shape[0] % 2 == 0 else (None, "its number of rows is odd")
    down = next((tuple(shapes[key]) for key in _down_names(layer) if key in shapes), None)
    if len(shape) == 3 and down is not None and shape[1:] == (2 * down[2], down[1]):
        return 2, None  # [E, 2 h, d] beside [E, d, h]
    return (
        None,
        "a stack [E, d, 2 h] may hold gate and up in turns, and no layer down beside it shows that it is [E, 2 h, d]",
    )


def _down_names(layer: str) -> list[str]:
    return [f"{layer}.{leaf}" if layer else leaf for leaf in ("down_proj", "w_down", "w2", "down")]


def describe_split(split: Any) -> str:
    """Return a split in words, for tables."""
    side, parts = ("columns", split["columns"]) if isinstance(split, Mapping) else ("rows", split)
    return f"split in {parts} parts by {side}" if isinstance(parts, int) else f"split by {side} {list(parts)}"


def by_split(
    pairs: Sequence[tuple[str | None, Tensor]], split: Any, shapes: Mapping[str, Sequence[int]]
) -> list[tuple[Any, list[tuple[str | None, Tensor]]]]:
    """Divide (name, matrix) pairs by how each is split; those that are left whole come first. "auto" is decided here.

    Raises:
        ValueError: If a given split does not fit a matrix.
    """
    found: dict[str, tuple[Any, list[tuple[str | None, Tensor]]]] = {}
    doubts: dict[str, list[str]] = {}
    for name, param in pairs:
        each, doubt = infer_split(name, param, shapes) if split == "auto" else (split, None)
        cut_of(each, param.shape, repr(name) if name else "an unnamed parameter")
        found.setdefault(repr(each), (each, []))[1].append((name, param))
        if doubt:
            doubts.setdefault(doubt, []).append(f"{name} {list(param.shape)}")
    for doubt, names in doubts.items():
        warnings.warn(
            f'split: found {listed(names)}, which "auto" leaves whole although they may be fused: {doubt}. Give such matrices '
            "in a group of their own with split=[q, k, v] (rows of each), split=2 (gate, up) or split=None (whole); or set "
            "the tensor's `mue_split` to that before (1: whole); note_splits(model) sets it in layers of transformers and litgpt.",
            stacklevel=5,
        )
    return sorted(found.values(), key=lambda item: item[0] is not None)


def warn_of_other_splits(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Warn where a checkpoint's groups are split otherwise: its radii fit its own splits only, with which training goes on."""
    for own, other in zip(groups, saved, strict=False):
        theirs, ours = (group.get("splits", group.get("split")) for group in (other, own))
        if theirs != ours:
            warnings.warn(
                f"split: found {theirs!r} in the checkpoint, expected {ours!r} in group {own.get('name')!r}. Training goes on as "
                "in the checkpoint, whose radii are for its own parts. For the other "
                "split load the model's weights only.",
                stacklevel=3,
            )


def note_splits(model: nn.Module) -> dict[str, Any]:
    """Note on a model's fused matrices of queries, keys and values how they are split, for `split="auto"`.

    Only in layers whose order of q, k and v is known, those of torch, transformers and litgpt, and only where q, k and v
    follow each other as wholes; the sizes of grouped queries come from the layers' own attributes or their configuration. The
    note is the attribute `mue_split` of the tensor: wrap or shard the model before, as this makes new tensors.

    Returns:
        Name -> split of each that was noted.
    """
    noted: dict[str, Any] = {}
    tensors = named_tensors(model)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    for info in read_queries(model, name_roles(list_parameters(model))):
        query, path = info.query, clean_name(info.name)
        if query is None or not query.fused or query.rows is None or len(info.shape) != 2:
            continue
        attention = modules.get(path.removesuffix(".weight").rpartition(".")[0])
        if attention is None or not _is_read(type(attention)):
            continue
        dim, rows, period = query.rows
        rest = info.shape[dim] - rows
        if period == info.shape[dim] and rest % 2 == 0 and rest:
            sizes = [rows, rest // 2, rest // 2]
            noted[info.name] = {"columns": sizes} if dim == 1 else sizes
            note_split(tensors[info.name], noted[info.name])
    return noted


def _is_read(cls: type) -> bool:
    """Whether a layer computes as a class of the packages read here does: the class or the base that has its forward."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    return f"{owner.__module__}.".startswith(_READ)
