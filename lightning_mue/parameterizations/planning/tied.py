"""A tied head: one weight is embedding and unembedding (docs/theory.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.reading.record import ModelRecord
from lightning_mue.parameterizations.reading.sites import Site
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, not_covered

#: What to do where no norm can carry the multiplier on the logits.
HEAD_REMEDY = (
    "Name the norm right before the head by pattern, roles: {'<that norm>': final_norm}. Or multiply "
    "the head's input yourself, in __init__: head.logit_factor = 1.0; head.register_forward_pre_hook(lambda head, args: "
    "(head.logit_factor * args[0],)), and name that factor: multipliers: {output: 'logit_factor$'}. Or untie the weights."
)


@dataclass(frozen=True)
class TiedHead:
    """What a rule does to the logits of tied heads.

    Attributes:
        value: Factor on the logits over the base's, beyond what the model's own code does.
        table_factor: Factor that goes into the table, so that its rows act like the base's where the model scales them.
        tied: Names of the tied weights, as embedding and as head.
        untied: Names of the heads that are not tied.
    """

    value: float
    table_factor: float
    tied: tuple[str, ...]
    untied: tuple[str, ...]

    @classmethod
    def of(cls, rule: Parameterization, pair: Pair, base: ModelRecord, alpha: float) -> TiedHead | None:
        """The tied heads of a target, or None if it has none.

        Raises:
            ValueError: If only one of target and base is tied, or if the rule says nothing about tied weights of another width.
        """
        tied = [info for info in pair.infos if info.tied]
        untied = [info for info in pair.infos if info.role is Role.UNEMBEDDING and not info.tied]
        _check_both(tied, [info for info in base.parameters if info.tied], pair, base)
        if not tied:
            return None
        ratios = {info.fans[0] / pair.matched[info.name].fans[0] for info in tied if info.name in pair.matched}
        if len(ratios) > 1:
            found = f"tied weights that grow by different ratios: {some(tied)}"
            raise value_error("base", found=found, expected="one ratio for all", do="Untie them.")
        width = ratios.pop() if ratios else 1.0
        if rule.tied_output is None and width != 1.0:
            raise not_covered(
                found=f"{rule.name!r}, which says nothing about tied embeddings, and {some(tied)}, whose width moves",
                expected="a rule with a cell for the multiplier on the logits",
                do="Give the rule one, e.g. tied_output='d^-1', or untie the weights.",
            )
        cell = parse(rule.tied_output or "1")
        value, scales = cell.evaluate({**pair.axes.ratios(pair.base_axes), "d": width}, alpha), (base, pair.target)
        rows, logits = (_growth(*scales, name) for name in ("embedding_scale", "logit_scale"))
        if rule.tied_output is None or not cell.powers:  # the rule leaves the width alone
            rows = logits = 1.0
        names = tuple(name for info in tied for name in (info.name, *info.also))
        return cls(value * rows / logits, 1 / rows, names, tuple(info.name for info in untied))

    def serves(self, site: Site) -> bool:
        """Whether a site's module holds a tied head, or no head at all (a pattern named it)."""
        prefix = site.path.rpartition(".")[0]
        tied, untied = (
            any(name.startswith(f"{prefix}.") or not prefix for name in n) for n in (self.tied, self.untied)
        )
        return tied or not untied

    def refuse_unless_foldable(self, rule: Parameterization, infos: list[ParameterInfo], value: float) -> None:
        """Refuses a multiplier that no module exposes and no norm can carry."""
        gains = [info for info in infos if "output" in info.folds and not info.name.endswith("bias")]
        weights = [info for info in infos if info.tied]
        if len(gains) < len({info.name for info in weights}):
            raise not_covered(
                found=f"{rule.name!r}, which multiplies the logits of tied embeddings ({some(weights)}) by {value:g}",
                expected="a module that exposes that multiplier, or one norm with a gain right before the head to fold it into",
                do=HEAD_REMEDY,
            )


def _growth(base: ModelRecord, target: ModelRecord, name: str) -> float:
    return target.inferred.get(name, 1.0) / base.inferred.get(name, 1.0)


def _check_both(tied: list[ParameterInfo], base_tied: list[ParameterInfo], pair: Pair, base: ModelRecord) -> None:
    """Refuses a target and a base of which one alone is tied: one weight cannot be drawn like two."""
    if bool(tied) == bool(base_tied):
        return
    who, weights = ("the target", tied) if tied else ("the base", base_tied)
    untied = base.parameters if tied else pair.infos
    if not any(info.role is Role.UNEMBEDDING for info in untied):
        return  # without a head, there is nothing to compare
    raise value_error(
        "base",
        found=f"embedding and unembedding tied in {who} alone: {some(weights)}",
        expected="both models tied, or both untied: a tied weight learns from both of its uses",
        do="Tie or untie them in both, e.g. base: {tie_embeddings: ...} with the target's value.",
    )
