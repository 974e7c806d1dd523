"""Tells the up and down matrices of FFNs apart by shape and position: the down matrix comes back to the residual width.

Names do not tell: ``w3`` and ``fc_2`` are up matrices in some projects and down matrices in others. An FFN is a module that
holds an up matrix (residual width d -> hidden width H, or 2 H where a gate is fused into it) and a down matrix (H -> d). Sizes are
compared in target and base at once, where the base has counterparts: two widths that are equal in one may differ in the other.
Where H equals d in both, position decides: the down matrix is the last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_mue.checks import listed, value_error
from lightning_mue.names import in_attention
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.roles.role_names import (
    CALLED_DOWN,
    CALLED_UP,
    EXPERTS,
    SHARED,
    in_experts,
    layer_of,
)
from lightning_mue.parameterizations.reading.size_inference import residual_widths
from lightning_mue.parameterizations.rules.roles import Role

_FFN = re.compile(
    r"(^|[._])(ffn?|mlp|feed_?forward\w*|dense_?relu_?dense|channel_mix\w*|swi?glu|geglu|moe|experts?)([._]|$)",
    re.IGNORECASE,
)
#: Last parts of names that only attention has: a module with one of them is no FFN.
_QUERY = re.compile(
    r"(^|[._])(to_)?(q|wq|w_q|q_?proj|q_?lin|query|w?qkv|w_qkv|qkv_?proj|c_attn|query_key_value|in_proj_weight)$"
)

#: A size in the target and, where a counterpart is known, in the base.
Size = tuple[int, ...]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of unknown role: how many inputs and outputs it has, and its place among the parameters."""

    path: str
    fan_in: Size
    fan_out: Size
    place: int

    def turned(self) -> _Matrix:
        """The same for one that is stored as [in, out]."""
        return replace(self, fan_in=self.fan_out, fan_out=self.fan_in)


#: Paths of (up matrices, down matrices).
_Split = tuple[frozenset[str], frozenset[str]]


def ffn_roles(
    infos: list[ParameterInfo], counterparts: Mapping[str, ParameterInfo] | None = None, *, guess: bool = False
) -> list[ParameterInfo]:
    """Gives the matrices of FFNs and experts that have no role yet their roles.

    Args:
        infos: All parameters of a model.
        counterparts: Name -> the other model's parameter. A module of which a matrix has none is judged by its own sizes.
        guess: Also judge modules whose shapes leave the question open, by position and names.
    """
    joint, own = _Sizes(infos, counterparts), _Sizes(infos, None)
    found: dict[str, Role] = {}
    open_ = {m.path: (m, mine) for m, mine in zip(joint.matrices, own.matrices, strict=True)}
    crowded: set[str] = set()
    scopes = _scopes(open_)
    for scope in sorted(scopes, key=lambda scope: -scope.count(".")):
        inside = [path for path in scopes[scope] if path in open_ and not (_is_block(scope) and path in crowded)]
        stacks = [path for path in inside if path in own.stacks]
        inside = stacks or inside  # a matrix beside stacks of experts is their router
        if len(inside) < 2:
            continue
        alone = any(path in joint.alone for path in inside)
        members = [open_[path][alone] for path in inside]
        split = _split(scope, members, own if alone else joint, guess)
        for down, paths in enumerate(split or ()):
            found |= {path: _role(path, down, path in own.stacks) for path in paths}
        if split is not None:
            # Also what lies between them is settled: it belongs to no FFN around this one.
            for path in inside if not _is_block(scope) else [path for path in inside if path in found]:
                open_.pop(path)
        crowded |= set(inside)  # a module that is no FFN does not become one together with others
    return [replace(i, role=found[i.path]) if _is_open(i) and i.path in found else i for i in infos]


def named_roles(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives matrices that are in no FFN of known shape the roles of their names, unless the shape contradicts them."""
    sizes = _Sizes(infos, None)
    found = {m.path: role for m in sizes.matrices if (role := _named(m, sizes)) is not None}
    return [replace(i, role=found[i.path]) if _is_open(i) and i.path in found else i for i in infos]


class _Sizes:
    """The matrices of unknown role, and the residual widths of each layer and of the whole model."""

    def __init__(self, infos: list[ParameterInfo], others: Mapping[str, ParameterInfo] | None) -> None:
        self.stacks = {info.path for info in infos if info.form == "raw" and len(info.shape) == 3}
        flat = {i.path for i in infos if i.form == "raw" and len(i.shape) == 2 and in_experts(i.path)}
        #: Matrices whose names say nothing: convolutions, and stacks of experts in two dimensions.
        self.convolutions = {info.path for info in infos if info.form == "conv"}
        self.unnamed = flat | self.convolutions
        self.matrices: list[_Matrix] = []
        self._norms: dict[str, list[tuple[str, Size]]] = {}
        alone = set()
        for place, info in enumerate(infos):
            old = others.get(info.name) if others is not None else None
            if others is not None and old is None:
                alone.add(info.path)
                old = info
            fans = tuple(zip(info.fans, old.fans if old is not None else info.fans, strict=True))
            fan_in, fan_out = fans if others is not None else ((info.fans[0],), (info.fans[1],))
            if _is_open(info):
                self.matrices.append(_Matrix(info.path, fan_in, fan_out, place))
            elif info.role is Role.NORM and len(info.shape) == 1:
                self._norms.setdefault(layer_of(info.path), []).append((info.path, fan_out))
        mine = set(residual_widths(infos).values())
        theirs = set(residual_widths(others.values()).values()) if others else mine
        self._whole = (*mine, *theirs) if len(mine) == len(theirs) == 1 else None
        if others is None and self._whole is not None:
            self._whole = self._whole[:1]
        self.alone = frozenset(alone)

    def residual(self, scope: str) -> Size | None:
        """The residual width around a module, or None if nothing shows it: that of the norms of its layer, but not its own."""
        norms = self._norms.get(layer_of(scope), [])
        around = [size for path, size in norms if _is_block(scope) or not path.startswith(f"{scope}.")]
        return Counter(around).most_common(1)[0][0] if around else self._whole


def _is_open(info: ParameterInfo) -> bool:
    return info.role is None and len(info.shape) >= 2 and not in_attention(info.path) and info.form != "embedding"


def _scopes(paths: Iterable[str]) -> dict[str, list[str]]:
    """Every module that may be an FFN -> its matrices: those inside a numbered layer, and others that are called so."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts, layer = path.split("."), layer_of(path)
        for end in range(1, len(parts)):
            scope = ".".join(parts[:end])
            inside = bool(layer) and (scope == layer or scope.startswith(f"{layer}."))
            if inside or scope in found or _FFN.search(scope):
                found.setdefault(scope, []).append(path)
    return found


def _is_block(scope: str) -> bool:
    """True for an element of a list of layers, which may hold other things beside its FFN."""
    parts = scope.split(".")
    return parts[-1].isdigit() and not (len(parts) > 1 and "expert" in parts[-2].lower())


def _split(scope: str, members: list[_Matrix], sizes: _Sizes, guess: bool) -> _Split | None:
    if any(_QUERY.search(m.path) for m in members) and not _is_block(scope):
        return None
    members = [m for m in members if not _QUERY.search(m.path)]
    stacked = all(m.path in sizes.stacks for m in members)
    # Convolutions have norms behind them, of their own widths.
    normed = any(m.path in sizes.convolutions for m in members)
    width = None if normed else sizes.residual(scope)
    options: list[_Split] = []
    for turned in (False, True) if stacked else (False,):
        sides = [m.turned() for m in members] if turned else members
        widths = {m.fan_out for m in sides}
        known = {width} & widths if width is not None and not stacked else set()
        if not known and not layer_of(scope) and not stacked:
            return None  # outside the layers only where the residual width is known
        for d in known or widths:
            option = _at_width(sides, d, loose=_is_block(scope))
            options += [option] if option is not None and option not in options else []
    if len(options) <= 1:
        square = not options and len({side for m in members for side in (m.fan_in, m.fan_out)}) == 1
        return options[0] if options else _by_position(scope, members) if square and guess else None
    named = [option for option in options if _agree(*option)]
    last = members[-1].path
    return named[0] if len(named) == 1 else next((option for option in options if last in option[1]), None)


def _at_width(members: list[_Matrix], d: Size, loose: bool) -> _Split | None:
    """(up, down) matrices if d is the residual width; None if the members are no FFN, or shapes cannot tell.

    A member may also be square (a gate on the output, a matrix between up and down). If ``loose``, others may be there too.
    """
    reading = [m for m in members if m.fan_in == d]
    downs, ups = [], []
    for m in members:
        if m.fan_out != d:
            continue
        plain = [up for up in reading if up.fan_out == m.fan_in != d]
        fused = [up for up in reading if up.fan_out == _double(m.fan_in) and up.place < m.place]
        if plain or (fused and (m.fan_in != d or not loose)):
            downs.append(m)
            ups += plain or fused
    wide = [m for m in downs if m.fan_in != d]
    squares = [m for m in downs if m.fan_in == d]
    if squares and not wide:  # the hidden width is d, and a fused up matrix shows it
        downs, ups = [squares[-1]], [up for up in ups if up.fan_out == _double(d)]
    elif squares:
        downs, ups = wide, [up for up in ups if up.fan_out in {s for m in wide for s in (m.fan_in, _double(m.fan_in))}]
    rest = [m for m in members if m not in downs and m not in ups]
    if not downs or (not loose and any(m.fan_in != m.fan_out for m in rest)):
        return None
    return frozenset(m.path for m in ups), frozenset(m.path for m in downs)


def _double(size: Size) -> Size:
    return tuple(2 * side for side in size)


def _by_position(scope: str, members: list[_Matrix]) -> _Split | None:
    """Of square matrices in a module that is called an FFN, the last is the down matrix, unless names say another."""
    if not _FFN.search(scope):
        return None
    paths = [m.path for m in members]
    downs = [path for path in paths if CALLED_DOWN.search(path)]
    ups = [path for path in paths if CALLED_UP.search(path)]
    leaves = {path.rpartition(".")[2] for path in paths}
    agreed = len(downs) == 1 and (len(ups) == len(paths) - 1 or "receptance" in leaves)
    down = downs[0] if agreed else paths[-1]
    others = [path for path in paths if path != down and not path.endswith("receptance")]
    return frozenset(others if len(others) < 3 else others[:1]), frozenset({down})


def undecided(read: Iterable[ParameterInfo], settled: Iterable[ParameterInfo]) -> list[str]:
    """Modules with square matrices w1, w2, w3, of which w2 was taken for the down matrix: in some projects it is w3.

    Args:
        read: A model's parameters as they were read.
        settled: The same with their roles.
    """
    open_ = {info.path for info in read if info.role is None}
    down = (Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN)
    found = [i for i in settled if i.path in open_ and i.role in down and i.fans[0] == i.fans[1]]
    scopes = [info.path.removesuffix(".w2") for info in found if info.path.endswith(".w2")]
    return [scope for scope in scopes if {f"{scope}.w1", f"{scope}.w3"} <= open_]


def _agree(ups: frozenset[str], downs: frozenset[str]) -> bool:
    """True if names confirm an assignment and none contradicts it."""
    return all(CALLED_DOWN.search(path) for path in downs) and not any(CALLED_DOWN.search(path) for path in ups)


def _named(m: _Matrix, sizes: _Sizes) -> Role | None:
    """The role by name alone, inside layers and experts, unless the shape contradicts it."""
    if not (layer_of(m.path) or EXPERTS.search(m.path)) or m.path in sizes.unnamed:
        return None
    down, up = bool(CALLED_DOWN.search(m.path)), bool(CALLED_UP.search(m.path))
    width = sizes.residual(m.path)
    reads, writes = m.fan_in == width != m.fan_out, m.fan_out == width != m.fan_in
    if m.path not in sizes.stacks and ((down and reads) or (up and not down and writes)):
        return None
    return _role(m.path, down, m.path in sizes.stacks) if down or up else None


def _role(path: str, down: bool | int, stacked: bool) -> Role:
    if SHARED.search(path):
        return Role.SHARED_DOWN if down else Role.SHARED_UP
    if EXPERTS.search(path) or stacked:
        return Role.EXPERT_DOWN if down else Role.EXPERT_UP
    return Role.FFN_DOWN if down else Role.FFN_UP


def refuse_unnamed_experts(infos: list[ParameterInfo]) -> None:
    """Refuses a list of equal FFNs beside a matrix with one output for each: a Mixture of Experts that is not called so.

    Raises:
        ValueError: Naming the list and the matrix, or the experts that are attributes of their own.
    """
    loose = {
        m[0]
        for info in infos
        if (m := re.search(r"^(.*\.)?expert_?\d+(?=\.)", info.path)) and not in_experts(m[1] or "")
    }
    if len(loose) > 1:
        raise value_error(
            "model",
            found=f"experts that are numbered attributes: {listed(sorted(loose), limit=4)}",
            expected="experts in one list, whose length is their number",
            do="Hold them in an nn.ModuleList called experts.",
        )
    lists: dict[str, set[str]] = {}
    for info in infos:
        layer = layer_of(info.path)
        inner = re.match(r"((\.[^\d.][^.]*)+)\.(\d+)\.", info.path[len(layer) :]) if layer else None
        if info.role is Role.FFN_DOWN and inner is not None:
            lists.setdefault(layer + inner[1], set()).add(inner[3])
    for path, numbers in lists.items():
        scope = path.rpartition(".")[0]
        beside = [i for i in infos if i.path.startswith(f"{scope}.") and not i.path.startswith(f"{path}.")]
        for info in beside:
            if info.role is None and len(info.shape) == 2 and info.fans[1] == len(numbers) > 1:
                raise value_error(
                    "model",
                    found=f"{len(numbers)} FFNs in {path} beside {info.name} {list(info.shape)}, which has one output for each",
                    expected="experts in a list of that name",
                    do=f"Rename {path.rpartition('.')[2]} to experts.",
                )
