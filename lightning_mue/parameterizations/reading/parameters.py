"""Lists the parameters of a module tree: shapes, forms, and the roles that are declared or given by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from lightning_mue.checks import listed, require_choice, value_error
from lightning_mue.contract import branch_kind, branch_sizes, declared_roles, note_role
from lightning_mue.names import clean_name, split_layer
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
        ValueError: For a pattern that matches no parameter or an unknown role name.
    """
    patterns = role_patterns(roles)
    used: set[str] = set()
    found: dict[int, ParameterInfo] = {}
    for name, tensor, owner, branch in _walk(module):
        leaf = name.rsplit(".", 1)[-1]
        role = _declared_role(owner, leaf, tensor.dim())
        for pattern, wanted in patterns:
            if pattern.search(name):
                role = wanted
                used.add(pattern.pattern)
                break
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            found_lazy = f"{name} without a shape, because it belongs to a lazy layer"
            do = "Run one batch through the model first."
            raise value_error("model", found=found_lazy, expected="parameters that have shapes", do=do)
        form, first = module_form(owner), found.get(id(tensor))
        if first is None:
            fans = _fans(tuple(tensor.shape), owner)
            # A table that is said to be the unembedding is both: its look-up is what the module does.
            tied = form == "embedding" and role is Role.UNEMBEDDING
            info = ParameterInfo(name, tuple(tensor.shape), fans, form, role, branch, tied, tensor.requires_grad)
            found[id(tensor)] = info
        else:
            tied = first.tied or _are_tied(first, form, role)
            role = Role.UNEMBEDDING if tied else first.role
            found[id(tensor)] = replace(first, role=role, tied=tied, also=(*first.also, name))
    unused = [pattern.pattern for pattern, _ in patterns if pattern.pattern not in used]
    if unused:
        raise value_error(
            "roles",
            found=f"pattern(s) {unused}, which match no parameter",
            expected=f"patterns on names of parameters: {some(found.values())}",
            do="Correct or remove them.",
        )
    return list(found.values())


def role_patterns(roles: Mapping[str, str] | None) -> list[tuple[re.Pattern[str], Role]]:
    """Compiled patterns with their roles.

    Raises:
        ValueError: For an unreadable pattern or an unknown role.
    """
    patterns = []
    for pattern, role in (roles or {}).items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            found = f"{pattern!r} ({error})"
            raise value_error("roles", found=found, expected="a regular expression", do="Correct it.") from error
        require_choice(f"roles[{pattern!r}]", role, [known.value for known in Role])
        patterns.append((compiled, Role(role)))
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
    """(fan-in, fan-out): [out, in], a stack [E, out, in], a convolution [out, in, *kernel] or transposed forms of them."""
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return shape[0], prod(shape[1:])
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
