"""Reads a module tree: which parameters there are, what each one does, and which parameter of the base it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_mue.parameterizations.roles import Role

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")
_NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

#: Where a role may take its base values from if the base has none of its own, best first.
_RELATED: Mapping[Role, Sequence[Role]] = {
    Role.EXPERT_UP: (Role.FFN_UP, Role.SHARED_UP),
    Role.EXPERT_DOWN: (Role.FFN_DOWN, Role.SHARED_DOWN),
    Role.SHARED_UP: (Role.FFN_UP, Role.EXPERT_UP),
    Role.SHARED_DOWN: (Role.FFN_DOWN, Role.EXPERT_DOWN),
    Role.FFN_UP: (Role.EXPERT_UP, Role.SHARED_UP),
    Role.FFN_DOWN: (Role.EXPERT_DOWN, Role.SHARED_DOWN),
}


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of a module tree.

    Attributes:
        name: Fully qualified name, ``_orig_mod.`` (torch.compile) and ``_fsdp_wrapped_module.`` removed.
        tensor: The parameter itself.
        role: Its role, or None while unknown.
        owner: The module that holds it.
        branch: The enclosing FFN or MoE branch (a module with ``mue_branch = "ffn"``), if any.
        tied: True if an embedding and an unembedding share it.
    """

    name: str
    tensor: Tensor
    role: Role | None
    owner: nn.Module
    branch: nn.Module | None = None
    tied: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as a plain tuple."""
        return tuple(self.tensor.shape)

    @property
    def fans(self) -> tuple[int, int]:
        """(fan-in, fan-out) of one matrix: [out, in], a stack [E, out, in], or a convolution [out, in, *kernel]."""
        shape = self.shape
        if len(shape) < 2:
            return 1, shape[0] if shape else 1
        if isinstance(self.owner, nn.modules.conv._ConvNd):
            return self.tensor[0].numel(), shape[0]
        return shape[-1], shape[-2]

    @property
    def position(self) -> tuple[str, int]:
        """(name with its first layer index replaced by ``*``, that index; -1 if there is none)."""
        return split_layer(self.name)


def branch_sizes(branch: nn.Module) -> dict[str, float]:
    """The sizes of one FFN or MoE branch, by the tables' symbols; a dense FFN is the MoE of one expert.

    Args:
        branch: A module with ``active_width`` and, for an MoE, ``n_experts``, ``top_k`` and ``expert_width``.
    """
    active = float(branch.active_width)  # type: ignore[arg-type]
    read = {"E": ("n_experts", 1.0), "a": ("top_k", 1.0), "h": ("expert_width", active)}
    return {"A": active, **{symbol: float(getattr(branch, name, other)) for symbol, (name, other) in read.items()}}


def branch_ratios(branch: nn.Module | None, base: nn.Module | None) -> dict[str, float]:
    """Ratios target/base of a branch's own sizes; empty where one side is not known. Blocks of a model may differ."""
    if not hasattr(branch, "active_width") or not hasattr(base, "active_width"):
        return {}
    assert branch is not None
    assert base is not None
    mine, theirs = branch_sizes(branch), branch_sizes(base)
    ratios = {symbol: mine[symbol] / theirs[symbol] for symbol in mine}
    return {**ratios, "kappa": ratios["a"] / ratios["E"]}


def clean_name(name: str) -> str:
    """Removes what wrappers put into a qualified name.

    Example:
        >>> clean_name("_orig_mod.blocks.0._fsdp_wrapped_module.w")
        'blocks.0.w'
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module"))


def split_layer(name: str) -> tuple[str, int]:
    """Splits off the first layer index of a qualified name.

    Example:
        >>> split_layer("blocks.3.ffn.w_up")
        ('blocks.*.ffn.w_up', 3)
    """
    match = _LAYER.search(name)
    if match is None:
        return name, -1
    return f"{name[: match.start()]}*{name[match.end() :]}", int(match[1])


def list_parameters(module: nn.Module, roles: Mapping[str, str] | None = None) -> list[ParameterInfo]:
    """Lists the parameters with the roles that are declared, matched by pattern, or plain from the type.

    Args:
        module: Any module.
        roles: Regular expression -> role name; the first that is found in a qualified name wins over declarations.

    Returns:
        One entry a parameter, in ``named_parameters`` order; frozen ones too, since they may be unfrozen later.

    Raises:
        ValueError: For a pattern that matches no parameter or an unknown role name.
    """
    patterns = [(re.compile(pattern), _role(pattern, role)) for pattern, role in (roles or {}).items()]
    used: set[str] = set()
    found: dict[int, ParameterInfo] = {}
    for prefix, owner, branch in _walk(module):
        for leaf, tensor in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = clean_name(f"{prefix}.{leaf}" if prefix else leaf)
            role = _declared_role(owner, leaf)
            for pattern, wanted in patterns:
                if pattern.search(name):
                    role = wanted
                    used.add(pattern.pattern)
                    break
            first = found.get(id(tensor))
            if first is None:
                found[id(tensor)] = ParameterInfo(name, tensor, role, owner, branch)
            elif _are_tied(first, owner, role):
                found[id(tensor)] = replace(first, role=Role.UNEMBEDDING, tied=True)
    unused = [pattern.pattern for pattern, _ in patterns if pattern.pattern not in used]
    if unused:
        raise ValueError(
            f"roles: the pattern(s) {unused} match no parameter. Parameters: {_some(found.values())}. "
            "Correct or remove them."
        )
    return list(found.values())


def _are_tied(first: ParameterInfo, owner: nn.Module, role: Role | None) -> bool:
    """True if one tensor is an embedding here and an unembedding there; a linear layer on an embedding is one."""
    roles = {first.role, role}
    if roles == {Role.EMBEDDING, Role.UNEMBEDDING}:
        return True
    return roles == {Role.EMBEDDING, None} and any(isinstance(o, nn.Linear) for o in (owner, first.owner))


def _walk(module: nn.Module) -> Iterable[tuple[str, nn.Module, nn.Module | None]]:
    """Yields (qualified name, module, enclosing FFN branch) for every module, shared modules once per name."""

    def visit(
        prefix: str, current: nn.Module, branch: nn.Module | None
    ) -> Iterable[tuple[str, nn.Module, nn.Module | None]]:
        if getattr(current, "mue_branch", None) == "ffn" and branch is None:
            branch = current
        yield prefix, current, branch
        for name, child in current.named_children():
            yield from visit(f"{prefix}.{name}" if prefix else name, child, branch)

    return visit("", module, None)


def _role(pattern: str, role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ValueError(
            f"roles: the pattern {pattern!r} names the role {role!r}; expected one of {', '.join(r.value for r in Role)}."
        ) from None


def _declared_role(owner: nn.Module, leaf: str) -> Role | None:
    """The role that the owner declares, or the one that its type and the parameter's form leave no doubt about."""
    declared = getattr(owner, "mue_roles", {})
    if leaf in declared:
        return Role(declared[leaf])
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING
    if isinstance(owner, _NORM_TYPES):
        return Role.NORM
    if leaf == "bias":
        return Role.BIAS
    return None


def tag_roles(module: nn.Module) -> None:
    """Notes the declared roles on the parameters themselves (``mue_role``), for optimizers that see only those."""
    for info in list_parameters(module):
        if info.role is not None:
            info.tensor.mue_role = Role.EMBEDDING if info.tied else info.role  # type: ignore[attr-defined]


def infer_roles(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> list[ParameterInfo]:
    """Gives roles to linear layers that have none, by which of their sides grow between base and target (mup's idea).

    Both sides grow: hidden. Only the input side: unembedding. Only the output side: embedding (an input layer). A
    matrix neither side of which grows is hidden, and a vector a bias: their cells are then 1 in width.

    Args:
        infos: The target's parameters.
        base: Target name -> matched parameter of the base.

    Raises:
        ValueError: If a trainable parameter of another form has no role, listing all of them. (Frozen ones are left out.)
    """
    result, unknown = [], []
    for info in infos:
        role = info.role
        if role is None:
            old = base.get(info.name)
            if old is not None and isinstance(info.owner, (nn.Linear, nn.modules.conv._ConvNd)):
                grows_in, grows_out = (new != was for new, was in zip(info.fans, old.fans, strict=True))
                role = {(True, False): Role.UNEMBEDDING, (False, True): Role.EMBEDDING}.get(
                    (grows_in, grows_out), Role.HIDDEN
                )
            elif len(info.shape) <= 1:
                role = Role.SCALAR if not info.shape else Role.BIAS
        if role is None and info.tensor.requires_grad:
            unknown.append(info)
        if role is not None:
            result.append(replace(info, role=role))
    if unknown:
        raise ValueError(
            f"roles: no role is known for {_some(unknown)}. Name one by pattern, e.g. roles: {{'{unknown[0].name}': hidden}}"
            f" (roles: {', '.join(r.value for r in Role)}), or declare `mue_roles` on the module that holds the parameter."
        )
    return result


class BaseIndex:
    """Finds, for a parameter or module name of the target, its counterpart in the base.

    Layers are matched by relative position: layer i of L is matched with layer ``i * L_base // L``.
    """

    def __init__(
        self, names: Iterable[str], target_names: Iterable[str], base_names: Iterable[str] | None = None
    ) -> None:
        """Indexes ``names``; ``base_names`` are all of the base's, by which its depth is counted (default: the same)."""
        names = set(names)
        self.by_template: dict[str, list[int]] = {}
        for name in names:
            template, layer = split_layer(name)
            self.by_template.setdefault(template, []).append(layer)
        self.base_depth = self._depths(names if base_names is None else base_names)
        self.depth = self._depths(target_names)

    @staticmethod
    def _depths(names: Iterable[str]) -> dict[str, int]:
        depths: dict[str, int] = {}
        for name in names:
            template, layer = split_layer(name)
            prefix = template.split("*")[0]
            depths[prefix] = max(depths.get(prefix, 0), layer + 1)
        return depths

    def layer(self, name: str) -> int:
        """The base layer at the relative position of a target name (-1 outside the layers)."""
        template, layer = split_layer(name)
        prefix = template.split("*")[0]
        if layer < 0 or prefix not in self.base_depth:
            return layer
        return layer * self.base_depth[prefix] // self.depth[prefix]

    def match(self, name: str) -> str | None:
        """The base's name for a target name: same path, at the nearest layer that has it."""
        template, _ = split_layer(name)
        layers = self.by_template.get(template)
        if not layers:
            return None
        wanted = self.layer(name)
        nearest = min(layers, key=lambda layer: (abs(layer - wanted), layer))
        return template.replace("*", str(nearest), 1) if nearest >= 0 else template


def match_parameters(target: list[ParameterInfo], base: list[ParameterInfo]) -> dict[str, ParameterInfo]:
    """Maps target names to base parameters, by path, else by role (an expert's up matrix comes from the FFN's).

    A parameter without a counterpart (the router of an MoE whose base is dense) is left out.
    """
    by_name = {info.name: info for info in base}
    index = BaseIndex(by_name, [info.name for info in target])
    matched: dict[str, ParameterInfo] = {}
    for info in target:
        name = index.match(info.name)
        old = by_name[name] if name is not None else None
        if old is None or (info.role is not None and old.role is not None and old.role is not info.role):
            old = _by_role(info, base, index.layer(info.name)) or (old if old and old.role is None else None)
        if old is not None:
            matched[info.name] = old
    return matched


def _by_role(info: ParameterInfo, base: list[ParameterInfo], layer: int) -> ParameterInfo | None:
    if info.role is None:
        return None
    leaf = info.name.rsplit(".", 1)[-1]
    for role in (info.role, *_RELATED.get(info.role, ())):
        candidates = [b for b in base if b.role is role]
        if candidates:
            same_leaf = [b for b in candidates if b.name.rsplit(".", 1)[-1] == leaf] or candidates
            return min(same_leaf, key=lambda b: (abs(b.position[1] - layer), b.name))
    return None


def _some(infos: Iterable[ParameterInfo], limit: int = 8) -> str:
    listed = [f"{info.name} {list(info.shape)}" for info in infos]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
