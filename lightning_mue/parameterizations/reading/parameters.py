"""Lists the parameters of a module tree: shapes, forms, and the roles that are declared or given by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from lightning_mue.checks import listed, require_choice, require_pattern, value_error
from lightning_mue.contract import branch_kind, branch_sizes, declared_roles, note_role
from lightning_mue.names import clean_name, split_layer
from lightning_mue.parameterizations.reading.weight_parts import weight_parts
from lightning_mue.parameterizations.rules.roles import Role

_NORM_TYPES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)

#: Kind of the module that holds a parameter, which decides what its sides mean. ``raw``: a module of another type.
Form = Literal["linear", "conv", "embedding", "norm", "raw"]


@dataclass(frozen=True)
class Query:
    """What is known of the attention heads behind a parameter that makes or normalizes queries.

    Attributes:
        head_dim: Size of a head; None while unknown.
        scale: What the module multiplies its logits by; None: not known, taken to be ``head_dim^-1/2``.
        rows: Of a fused matrix: (the dimension that has them, how many of them make queries, after how many that repeats).
        fused: It makes keys and values, too.
        normed: A norm without weights follows, which undoes every factor.
    """

    head_dim: int | None = None
    scale: float | None = None
    rows: tuple[int, int, int] | None = None
    fused: bool = False
    normed: bool = False


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of a module tree, without its values.

    Attributes:
        name: Fully qualified name, without what torch.compile, FSDP and activation checkpointing insert.
        shape: Its (global) shape.
        fans: (fan-in, fan-out) of one matrix.
        form: Kind of the module that holds it.
        role: Its role, or None while unknown.
        branch: Sizes of the enclosing FFN or MoE branch by the tables' symbols (:func:`branch_sizes`), if it declares any.
        tied: True if an embedding and an unembedding share it.
        trainable: False if it is frozen.
        folds: Kinds of forward multipliers that can be folded into it, because it is the last factor of what they multiply (for
            ``attention``, the only one).
        part: What it is a part of, if a module computes its weight from several (weight norm, LoRA).
        groups: Number of groups of a convolution, each of which sees its own share of the inputs.
        query: The heads behind it, if it makes or normalizes the queries of an attention.
        also: Its further names, where it is shared.
    """

    name: str
    shape: tuple[int, ...]
    fans: tuple[int, int]
    form: Form
    role: Role | None
    branch: Mapping[str, float] | None = None
    tied: bool = False
    trainable: bool = True
    folds: frozenset[str] = frozenset()
    part: str = ""
    groups: int = 1
    query: Query | None = None
    also: tuple[str, ...] = ()

    @property
    def position(self) -> tuple[str, int]:
        """(name with its first layer index replaced by ``*``, that index; -1 if there is none)."""
        return split_layer(self.name)

    @property
    def path(self) -> str:
        """Name of the layer that it belongs to, without ``weight`` or ``bias``."""
        return re.sub(r"[._](weight|bias)$", "", self.name)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Qualified name -> parameter, names as in a plan; a shared parameter under its first name."""
    return {clean_name(name): p for name, p in model.named_parameters()}


def padding_rows(model: nn.Module) -> dict[str, int]:
    """Name of an embedding's weight -> its padding row, which the module sets to zero."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return {
        names[id(module.weight)]: module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
        if id(module.weight) in names
    }


def branch_ratios(branch: Mapping[str, float] | None, base: Mapping[str, float] | None) -> dict[str, float]:
    """Ratios target/base of a branch's own sizes; empty where one side is not known. Blocks of a model may differ."""
    if not branch or not base:
        return {}
    ratios = {symbol: branch[symbol] / base[symbol] for symbol in branch}
    return {**ratios, "kappa": ratios["a"] / ratios["E"]}


def list_parameters(module: nn.Module, roles: Mapping[str, str] | None = None) -> list[ParameterInfo]:
    """Lists the parameters with the roles that are declared, matched by pattern, or certain from the type.

    The first pattern (regular expression -> role) that is found in a qualified name wins over declarations.

    Returns:
        One entry a parameter, in ``named_parameters`` order; frozen ones too, since they may be unfrozen later.

    Raises:
        ValueError: For an unreadable pattern, an unknown role name, or a parameter without a shape.
    """
    patterns = role_patterns(roles)
    parts = weight_parts(module)
    found: dict[int, ParameterInfo] = {}
    for name, tensor, owner, branch in _walk(module):
        leaf = name.rsplit(".", 1)[-1]
        given = (wanted for pattern, wanted in patterns if pattern.search(name))
        role = next(given, None) or _declared_role(owner, leaf, tensor.dim())
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            found_lazy = f"{name} without a shape, because it belongs to a lazy layer"
            do = "Run one batch through the model first."
            raise value_error("model", found=found_lazy, expected="parameters that have shapes", do=do)
        form, first = module_form(owner), found.get(id(tensor))
        if first is None:
            fans = _fans(tuple(tensor.shape), owner)
            # A table that is said to be the unembedding is both: its look-up is what the module does.
            tied = form == "embedding" and role is Role.UNEMBEDDING
            groups = int(getattr(owner, "groups", 1)) if form == "conv" else 1
            info = ParameterInfo(name, tuple(tensor.shape), fans, form, role, branch, tied, tensor.requires_grad)
            found[id(tensor)] = replace(info, part=parts.get(name, ""), groups=groups)
        else:
            tied = first.tied or _are_tied(first, form, role)
            role = Role.UNEMBEDDING if tied else first.role
            found[id(tensor)] = replace(first, role=role, tied=tied, also=(*first.also, name))
    return list(found.values())


def role_patterns(roles: Mapping[str, str] | None) -> list[tuple[re.Pattern[str], Role]]:
    """Compiled patterns with their roles.

    Raises:
        ValueError: For an unreadable pattern or an unknown role.
    """
    patterns = []
    for pattern, role in (roles or {}).items():
        require_pattern("roles", pattern)
        require_choice(f"roles[{pattern!r}]", role, [known.value for known in Role])
        patterns.append((re.compile(pattern), Role(role)))
    return patterns


def _are_tied(first: ParameterInfo, form: Form, role: Role | None) -> bool:
    """True if one tensor is an embedding here and an unembedding there; a linear layer on an embedding is one."""
    roles = {first.role, role}
    if roles == {Role.EMBEDDING, Role.UNEMBEDDING}:
        return True
    return roles == {Role.EMBEDDING, None} and "linear" in (form, first.form)


def _walk(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, dict[str, float] | None]]:
    """Yields (clean name, parameter, owner, sizes of its FFN branch); shared parameters once a name."""

    def visit(prefix: str, current: nn.Module, branch: dict[str, float] | None) -> Iterator[Any]:
        if branch is None and branch_kind(current) == "ffn":
            branch = branch_sizes(current)
        for leaf, tensor in current.named_parameters(prefix, recurse=False, remove_duplicate=False):
            yield clean_name(leaf), tensor, current, branch
        for name, child in current.named_children():
            yield from visit(f"{prefix}.{name}" if prefix else name, child, branch)

    return visit("", module, None)


def _declared_role(owner: nn.Module, leaf: str, dim: int) -> Role | None:
    """The role that the owner declares, or the one that follows from its type and the parameter's form."""
    declared = declared_roles(owner)
    if leaf in declared:
        return Role(declared[leaf])
    form = module_form(owner)
    if form == "embedding":
        return Role.EMBEDDING
    if form == "norm" and dim <= 1:
        return Role.NORM
    if leaf.endswith("bias"):
        return Role.BIAS
    if isinstance(owner, nn.modules.conv._ConvNd) and 1 < owner.groups == owner.in_channels:
        return Role.NORM  # depthwise: each channel has its own kernel, as each has its own gain in a norm
    return None


def module_form(owner: nn.Module) -> Form:
    """Kind of the module that holds a parameter, by its type."""
    kind = type(owner)
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "conv"
    # Conv1D is what transformers calls GPT-2's linear layer, of a transposed weight.
    if isinstance(owner, (nn.Linear, nn.MultiheadAttention, nn.RNNBase)) or kind.__name__ == "Conv1D":
        return "linear"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    # Every library has an RMSNorm of its own.
    return "norm" if isinstance(owner, _NORM_TYPES) or kind.__name__.lower().endswith("norm") else "raw"


def _fans(shape: tuple[int, ...], owner: nn.Module) -> tuple[int, int]:
    """(fan-in, fan-out): [out, in], a stack [E, out, in], a convolution [out, in / groups, *kernel] or transposed forms.

    The fan-in of a transposed convolution [in, out / groups, *kernel] counts its whole kernel, though with a stride each output
    sees only a part of it: that part does not depend on the width.
    """
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return shape[0] // owner.groups * prod(shape[2:]), shape[1] * owner.groups
    if isinstance(owner, nn.modules.conv._ConvNd):
        return prod(shape[1:]), shape[0]
    if type(owner).__name__ == "Conv1D":
        return shape[0], shape[1]
    return shape[-1], shape[-2]


def tag_roles(module: nn.Module) -> None:
    """Notes the declared roles on the parameters themselves (``mue_role``), for optimizers that see only those."""
    tensors = named_tensors(module)
    for info in list_parameters(module):
        if info.role is not None:
            note_role(tensors[info.name], Role.EMBEDDING if info.tied else info.role)


def some(infos: Iterable[ParameterInfo], limit: int = 8) -> str:
    """Names and shapes for a message, the first few of them."""
    return listed([f"{info.name} {list(info.shape)}" for info in infos], limit=limit)
