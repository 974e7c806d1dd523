"""Matches the target with its base: roles, counterparts and sizes, declared by the modules or inferred from both together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_mue.checks import listed, value_error
from lightning_mue.parameterizations.planning.counterparts import match_parameters
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.reading.record import ModelRecord
from lightning_mue.parameterizations.reading.roles.ffn_roles import (
    ffn_roles,
    named_roles,
    refuse_unnamed_experts,
    undecided,
)
from lightning_mue.parameterizations.reading.roles.folding import attention_of, mark_folds, scaled_attentions
from lightning_mue.parameterizations.reading.roles.role_names import output_layer, routers_by_shape
from lightning_mue.parameterizations.reading.size_inference import infer_sizes, orient, residual_widths
from lightning_mue.parameterizations.reading.stacks import Stacks, stack_depths, unclear_lists
from lightning_mue.parameterizations.reading.weight_parts import refuse_parts
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.roles import Role


class Pair:
    """A target and its base, matched; ``run`` holds ``tokens`` and ``batch_tokens`` of the target, None where they do not count.

    Attributes:
        target: The target as it was read.
        notes: Warnings for people.
        infos: The target's parameters, each with its role.
        matched: Target name -> the base's parameter.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
        same_shapes: True if both models have the same shapes and sizes; their runs may differ.

    Raises:
        ValueError: If a parameter has no role, a size cannot be inferred, or only one side knows a size of the run.
    """

    def __init__(self, target: ModelRecord, base: ModelRecord, run: Mapping[str, float | None]) -> None:
        for key, value in run.items():
            _check_run(key, value, base.run)
        self.target = target
        self.notes: list[str] = []
        same = [(info.name, info.shape) for info in target.parameters] == [(i.name, i.shape) for i in base.parameters]
        if not same:
            both = {info.name: info for info in (*base.parameters, *target.parameters) if info.part and info.trainable}
            refuse_parts((info.name, info.part) for info in both.values())
        mine, theirs = _with_roles(target, base)
        if scopes := [s for s in undecided(target.parameters, mine) if s in undecided(base.parameters, theirs)]:
            self.notes.append(
                f"the shapes of w1, w2 and w3 in {listed(scopes, limit=2)} do not tell which is the down matrix; w2 is taken "
                "for it. If it is w3: roles: {'w3\\.weight': ffn_down, 'w[12]\\.weight': ffn_up} (expert_... for experts)"
            )
        self.axes, mine = _sizes(target, mine)
        self.base_axes, theirs = _sizes(base, theirs)
        # Matched again, now that all roles are known: parameters without a counterpart by name are matched by role.
        self.matched = match_parameters(mine, theirs)
        infos = mark_folds(mine)
        #: Paths of the attentions whose logits a module of the target scales.
        self.scaled_attentions = scaled_attentions(
            infos, [site.path.rpartition(".")[0] for site in target.sites if site.kind == "attention"]
        )
        self.infos = [
            replace(info, folds=info.folds - {"attention"}) if attention_of(info) in self.scaled_attentions else info
            for info in infos
        ]
        if self.axes.width is None or self.base_axes.width is None:
            width, base_width = self._widths()
            self.axes, self.base_axes = replace(self.axes, width=width), replace(self.base_axes, width=base_width)
        if not (target.sizes and base.sizes):
            self._note_stacks(theirs)
        if not ("depth" in target.sizes and "depth" in base.sizes):
            _refuse_unclear_lists(mine, theirs)
        self.same_shapes = same and not self.axes.changed(self.base_axes)
        self.axes = replace(self.axes, **run)
        self.base_axes = replace(self.base_axes, **{key: base.run.get(key) for key in run})

    def _widths(self) -> tuple[float, float]:
        """(target's, base's) residual width, or their ratio and 1 where only that is known.

        Raises:
            ValueError: If only the sides of matrices show it, and they grow by different ratios.
        """
        pairs = self._residual_sides()
        if not pairs:  # no norm, embedding or head: only the sides of the matrices are left
            ratios = sorted({new / old for new, old in self._grown_sides()})
            if len(ratios) > 1:
                raise value_error(
                    "base",
                    found=f"matrices whose sides grow by different ratios ({_listed(ratios)})",
                    expected="one ratio, from which the width ratio can be inferred",
                    do="Give the module a method `mue_axes()` that returns its sizes, e.g. "
                    "{'width': ..., 'depth': ..., 'ffn_width': ...}.",
                )
            return (ratios[0], 1.0) if ratios else (1.0, 1.0)
        # A part may keep its size, e.g. a table of positions.
        grown = [pair for pair in pairs if pair[0] != pair[1]] or pairs
        counts = Counter(new / old for new, old in grown)
        ratio = counts.most_common(1)[0][0]
        if len(counts) > 1:
            self.notes.append(
                f"parts of the model grow by different ratios ({_listed(counts)}); matrices scale by their own fan-in, and the "
                f"width ratio of other parameters is taken as {ratio:g}. Declare mue_axes() on the module to change it"
            )
        return Counter(pair for pair in grown if pair[0] / pair[1] == ratio).most_common(1)[0][0]

    def _residual_sides(self) -> list[tuple[float, float]]:
        """(target's, base's) size of each parameter that has the residual width: norms, else embeddings and heads."""
        found: dict[str, list[tuple[float, float]]] = {"norm": [], "other": []}
        for info in self.infos:
            old = self.matched.get(info.name)
            if old is None:
                continue
            if info.role in (Role.NORM, Role.FINAL_NORM) and len(info.shape) == 1:
                found["norm"].append((info.shape[0], old.shape[0]))
            elif info.role in (Role.EMBEDDING, Role.UNEMBEDDING):
                found["other"].append((_stream_side(info), _stream_side(old)))
        grown = [pairs for pairs in found.values() if any(new != old for new, old in pairs)]
        return grown[0] if grown else found["norm"] or found["other"]

    def _note_stacks(self, base_infos: list[ParameterInfo]) -> None:
        mine, theirs = stack_depths(self.infos), stack_depths(base_infos)
        ratios = {mine[stack] / theirs[stack] for stack in mine if stack in theirs}
        if len(ratios) > 1:
            self.notes.append(
                f"stacks of layers grow by different ratios ({_listed(ratios)}); the depth ratio is taken as "
                f"{(self.axes.depth or 1) / (self.base_axes.depth or 1):g}. Declare mue_axes() on the module to change it"
            )

    def _grown_sides(self) -> list[tuple[int, int]]:
        return [
            (new, was)
            for info in self.infos
            # The router's rows are experts; they do not grow with the width.
            if info.name in self.matched and len(info.shape) >= 2 and info.role is not Role.ROUTER
            for new, was in zip(info.fans, self.matched[info.name].fans, strict=True)
            if new != was
        ]


def _check_run(key: str, value: float | None, base_run: Mapping[str, float]) -> None:
    if (value is None) == (key not in base_run):
        return
    given, missing = (f"base.{key}", f"`{key}`") if value is None else (f"`{key}`", f"base.{key}")
    raise value_error(
        key,
        found=f"{given} without {missing}, so there is no ratio to scale by",
        expected="both or neither",
        do=f"Give both, e.g. {key}: 4e9 and base: {{..., {key}: 1e9}}, or neither.",
    )


def _refuse_unclear_lists(mine: list[ParameterInfo], theirs: list[ParameterInfo]) -> None:
    """Raises where a list inside a layer grows, and its elements may follow one another or stand side by side."""
    lists = unclear_lists(mine, theirs)
    if lists:
        name = next(iter(lists)).split(".")[-2]
        raise value_error(
            "mue_axes",
            found="; ".join(f"{old} -> {new} modules in {element}" for element, (new, old) in lists.items())
            + ", which may follow one another (depth) or stand side by side (branches, experts)",
            expected="a number of layers that is certain",
            do="Give the module a method `mue_axes()` that returns its depth, e.g. {'depth': ...}. If they are experts, also "
            f"name them by pattern, e.g. roles: {{'{name}.*up.*weight': expert_up, '{name}.*down.*weight': expert_down}}, "
            "and return n_experts, top_k, expert_width and active_width.",
        )


def _with_roles(target: ModelRecord, base: ModelRecord) -> tuple[list[ParameterInfo], list[ParameterInfo]]:
    """(target's, base's) parameters with roles, inferred from their shapes, positions and growth.

    First what shapes show, then what the other model knows, then positions, and names last.
    """
    mine, theirs = list(target.parameters), list(base.parameters)
    matched = match_parameters(mine, theirs)
    back = {matched[info.name].name: info for info in reversed(mine) if info.name in matched}
    mine, theirs = ffn_roles(mine, matched), ffn_roles(theirs, back)
    known, by_base = ({info.name: info.role for info in infos} for infos in (theirs, mine))
    mine = [replace(i, role=i.role or known.get(matched[i.name].name) if i.name in matched else i.role) for i in mine]
    theirs = [replace(i, role=i.role or by_base.get(back[i.name].name) if i.name in back else i.role) for i in theirs]
    mine, theirs = (routers_by_shape(ffn_roles(infos, guess=True)) for infos in (mine, theirs))
    for infos in (mine, theirs):
        refuse_unnamed_experts(infos)
    mine, theirs = named_roles(mine), named_roles(theirs)
    mine = _infer_roles(mine, match_parameters(mine, theirs))
    by_target = {info.name: info.role for info in mine}
    return mine, [
        replace(i, role=i.role or by_target.get(back[i.name].name) if i.name in back else i.role) for i in theirs
    ]


def _infer_roles(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> list[ParameterInfo]:
    """Gives roles to layers without one by the sides that grow between base and target, as the package `mup` does.

    Both sides grow: hidden. Only the input side: unembedding. Only the output side: embedding (an input layer). Neither side:
    hidden, or bias for a vector; their cells are then 1 in width.

    Raises:
        ValueError: If a trainable parameter of another form has no role, listing all of them. (Frozen ones are left out.)
    """
    result, unknown = [], []
    inner, width = _before_growing(infos, base), residual_widths(infos).get("norms")
    output = output_layer(infos, base)
    for info in infos:
        role = info.role or _role_by_growth(info, base.get(info.name))
        if info.role is None and role is Role.HIDDEN and _enters(info, base.get(info.name), width):
            role = Role.EMBEDDING
        if info.role is None and role is Role.HIDDEN and info.name == output:
            role = Role.UNEMBEDDING
        if info.role is None and role is Role.UNEMBEDDING and info.name in inner:
            role = Role.HIDDEN  # as many outputs as at the base, which a later matrix of the same layer reads
        if role is not None:
            result.append(replace(info, role=role))
        elif info.trainable:
            unknown.append(info)
    if unknown:
        raise value_error(
            "roles",
            found=f"no role for {some(unknown)}",
            expected=f"one of {', '.join(r.value for r in Role)} for each",
            do=f"Name one by pattern, e.g. roles: {{'{unknown[0].name}': hidden}}, or declare `mue_roles` on the module that "
            "holds the parameter.",
        )
    return result


def _enters(info: ParameterInfo, old: ParameterInfo | None, width: int | None) -> bool:
    """True for a matrix outside the layers that leads from another number of channels to a residual width like the base's."""
    if old is None or old.shape != info.shape:
        return False
    inputs = info.shape[1] * info.groups if info.form == "conv" else info.fans[0]
    return (
        info.position[1] < 0
        and width is not None
        and inputs < width == info.fans[1]
        and info.form in ("linear", "conv")
    )


def _before_growing(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> set[str]:
    """Names of the matrices in numbered layers in front of one of the same layer whose outputs grow."""
    stacks, grown, found = Stacks(infos), set[str](), set[str]()
    for info in reversed(infos):
        old = base.get(info.name)
        if len(info.shape) < 2 or old is None or not (layer := stacks.layer(info.name)):
            continue
        if layer in grown:
            found.add(info.name)
        if info.fans[1] > old.fans[1]:
            grown.add(layer)
    return found


def _role_by_growth(info: ParameterInfo, old: ParameterInfo | None) -> Role | None:
    if len(info.shape) <= 1:
        return Role.BIAS if info.shape else Role.SCALAR
    if info.part:
        return Role.HIDDEN  # nothing scales it: only models of the base's size may have parts of weights
    if old is None or info.form not in ("linear", "conv"):
        return None
    grouped = info.groups != old.groups and info.fans[0] == old.fans[0]
    if grouped:
        return Role.NORM  # more groups of the same size: as many inputs as at the base, like a gain of each channel
    grows_in, grows_out = (new != was for new, was in zip(info.fans, old.fans, strict=True))
    return {(True, False): Role.UNEMBEDDING, (False, True): Role.EMBEDDING}.get((grows_in, grows_out), Role.HIDDEN)


def _sizes(record: ModelRecord, infos: list[ParameterInfo]) -> tuple[Axes, list[ParameterInfo]]:
    """(sizes that a model declares or its parameters show, parameters with the fans of transposed expert stacks swapped)."""
    seen = set(residual_widths(infos).values())
    width = record.sizes.get("width") or (seen.pop() if len(seen) == 1 else None)
    infos = orient(infos, width)
    return Axes(**{**infer_sizes(infos, {**record.inferred, **record.sizes}), **record.sizes}), infos


def _listed(ratios: Iterable[float]) -> str:
    return ", ".join(f"{ratio:g}" for ratio in sorted(ratios))


def _stream_side(info: ParameterInfo) -> int:
    """The side of an embedding or a head that is the residual width."""
    if info.role is Role.UNEMBEDDING:
        return info.fans[0]
    return info.shape[-1] if info.form in ("embedding", "raw") else info.fans[1]
