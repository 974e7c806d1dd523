"""The indicators of a run's health: which tags they are, where they are healthy, what they mean and what to do.

The one table of these facts: the verdict card, the report and the reference bands of the charts are made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from lightning_mue.health.losses import is_loss


@dataclass(frozen=True)
class Indicator:
    """One indicator, in the tags ``<tag>/<where>/<layer>``, ``<tag>/<where>`` and ``<tag>/<where>_mean`` (``_max``, ``_min``).

    Attributes:
        name: What people call it.
        tag: Regular expression of the tag in front of role or layer.
        means: What a bad value says, in one clause.
        do: What to do about it.
        watch: Values at or beyond which a run deserves a look, whatever it was before (`act`: needs one).
        act: See ``watch``.
        factor: How many times its own recent median a value must be (or be 1 / factor of it) before it counts as a departure.
        linear: Differences count, not ratios: an entropy or a share, which may be zero; ``factor`` is then in its unit.
        falls: A fall is the bad direction (an entropy); else a rise is.
        both: Both directions are.
        keeps: Both are against healthy runs, whose schedules fall as the run's own does.
        hold: Samples in a row that must be out of range.
        at_once: How many times the least departure from the own history counts although it is one sample.
        steady: The optimizer, the balance loss, the data or arithmetic set it, not what a seed happens to learn: healthy runs
            agree, and how well they do says what matters (`departures.Healthy`), not the factor, which is made for other models.
        floor: Smaller values count as this one: their ratios say nothing.
    """

    name: str
    tag: str
    means: str
    do: str
    watch: float | None = None
    act: float | None = None
    factor: float = 2.0
    linear: bool = False
    falls: bool = False
    both: bool = False
    keeps: bool = False
    hold: int = 3
    at_once: float = 3.0
    steady: bool = False
    floor: float = 1e-12


_LOWER = "Lower the learning rate of the role, or clip its gradient"
INDICATORS: tuple[Indicator, ...] = (
    Indicator(
        "loss",
        "loss",
        "training goes backwards",
        "Look at the data of these steps; skip them (StabilityGuard) or lower the learning rate.",
        factor=1.15,
        steady=True,
    ),
    Indicator(
        "gradient norm",
        "guard/gradient_norm|grad_norm|gradients?/norm|updates/gradient_norm(?=/all)",
        "a gradient far larger than those before it",
        "Clip gradients; look at the data of these steps.",
        factor=4.0,
    ),
    Indicator(
        "Z-value",
        "stability/z",
        "logits drift away from normalized log-probabilities",
        "Add a z-loss or QK-norm, or lower the learning rate of what makes these logits.",
        factor=4.0,  # a square: 2 in the logits
    ),
    Indicator(
        "largest logit",
        "stability/max_logit",
        "softmax saturates, and 16-bit logits lose their digits",
        "Use QK-norm or QKClip for attention, a z-loss for the head or the router.",
        watch=100.0,
        act=1000.0,
        factor=2.5,
    ),
    Indicator(
        "attention error",
        "stability/attention_error",
        "attention is computed less exactly than before",
        "Look at what was changed in kernel, precision and QK-norm; compute the softmax in float32.",
        watch=0.03,  # bfloat16 has 0.002 to 0.01, float32 1e-7 to 1e-5
        factor=4.0,
        floor=1e-4,  # less than any 16-bit format
        steady=True,
    ),
    Indicator(
        "attention bias",
        "stability/attention_bias",
        "the errors of attention have a sign, and add up over layers and steps",
        "Look at what rounds in attention; it must round to nearest.",
        watch=0.01,
        linear=True,
        factor=0.01,
        steady=True,
    ),
    Indicator(
        "sequence entropy",
        "data/sequence_entropy(?=_max|_mean)",
        "sequences hold other tokens than before: noise has the highest entropy, padding the lowest",
        "Look at the sequences of these steps and at the shard that they come from.",
        linear=True,
        factor=1.0,
        at_once=1.0,  # one sequence is enough, and comes alone where a shard begins
        steady=True,
    ),
    Indicator(
        "attention entropy",
        "stability/entropy",
        "attention collapses onto single tokens",
        "Use QK-norm or QKClip; lower the learning rate of queries and keys.",
        watch=0.1,
        factor=2.0,
        linear=True,
        falls=True,
    ),
    Indicator(
        "output RMS",
        "stability/rms",
        "a branch writes much more (or less) into the residual stream than before",
        f"{_LOWER}; check its forward multiplier.",
        factor=2.0,
        both=True,
    ),
    Indicator(
        "max / RMS",
        "stability/max_over_rms",
        "a few activations grow out of scale",
        "Look at the channels; use norms before the branch, or a gated attention.",
        factor=2.5,
    ),
    Indicator(
        "outliers (%)",
        "stability/outlier_percent",
        "outlier features grow",
        "Look at the channels; weight decay or a smaller learning rate help.",
        watch=2.0,
        factor=1.0,
        linear=True,
    ),
    Indicator(
        "kurtosis",
        "stability/kurtosis",
        "the activations' tails grow heavy",
        "Look at the channels; weight decay or a smaller learning rate help.",
        factor=16.0,  # a fourth power: 2 in the activations
    ),
    Indicator(
        "MaxVio",
        "routing/max_violation",
        "some experts get far more tokens than others",
        "Raise aux_loss_coef or the bias update rate; lower the router's learning rate.",
        factor=2.5,
        floor=0.5,  # half more than the mean load harms nothing
        steady=True,
    ),
    Indicator(
        "dead experts",
        "routing/dead_experts",
        "experts without a token do not learn",
        "Raise aux_loss_coef or the bias update rate; lower the router's learning rate.",
        watch=1.0,
        hold=10,  # in a small batch an expert may get nothing by chance
        at_once=float("inf"),
        linear=True,
        factor=1.0,
    ),
    Indicator(
        "router entropy",
        "routing/token_entropy",
        "the router grows too certain too early",
        "Lower the router's learning rate, or add a router z-loss.",
        factor=0.5,
        linear=True,
        falls=True,
    ),
    Indicator(
        "load entropy",
        "routing/load_entropy",
        "few experts take most of the tokens",
        "Raise aux_loss_coef or the bias update rate; lower the router's learning rate.",
        factor=0.3,
        linear=True,
        falls=True,
        steady=True,
    ),
    Indicator(
        "largest load",
        "routing/load_max_fraction",
        "one expert takes most of the tokens",
        "Raise aux_loss_coef or the bias update rate; lower the router's learning rate.",
        factor=2.0,
        steady=True,
    ),
    Indicator(
        "update ratio",
        "updates/update_ratio",
        "the weights of the role move much further in a step than they should (or, by healthy runs, much less)",
        "Check the learning rate of the role, Adam's betas and eps, and gradient clipping.",
        factor=2.5,
        keeps=True,
        steady=True,
    ),
    Indicator(
        "angular step",
        "updates/angular_step",
        "the weights of the role turn much further in a step than they should (or, by healthy runs, much less)",
        "Check the learning rate of the role.",
        factor=2.5,
        keeps=True,
        steady=True,
    ),
    Indicator(
        "weight RMS",
        "updates/weight_rms",
        "the weights of the role grow",
        "Use weight decay or HyperSphereOptimizer; lower the learning rate of the role.",
        factor=1.5,
    ),
    Indicator(
        "gradient RMS",
        "updates/gradient_rms",
        "the gradient of the role grows",
        "Look at what the role feeds; clip gradients.",
        factor=4.0,
    ),
    Indicator(
        "transfer ratio",
        "transfer/(update|reach|rms|z)",
        "the run leaves what its base predicts",
        "Compare with the base's plan: `lightning-mue explain`.",
        watch=2.0,
        factor=2.0,
        both=True,
    ),
)


@lru_cache(maxsize=1 << 14)
def indicator_of(tag: str) -> tuple[Indicator, str, str] | None:
    """(indicator, where, layer) of a tag, or None for one that is no indicator.

    ``where`` is a role or a kind of branch; empty for one that has none. ``layer`` is ``mean``, ``max`` or ``min`` for values
    over layers.

    Example:
        >>> indicator, where, layer = indicator_of("stability/z/attention/03")
        >>> indicator.name, where, layer
        ('Z-value', 'attention', '03')
        >>> indicator_of("routing/max_violation_max")[1:]
        ('router', 'max')
    """
    if is_loss(tag):
        return INDICATORS[0], tag, ""
    for indicator in INDICATORS[1:]:
        match = re.fullmatch(rf"(?:{indicator.tag})(?P<rest>(_mean|_max|_min)?(/.+)?)", tag)
        if match is not None:
            return (indicator, *_place(match["rest"], _OWNERS.get(tag.partition("/")[0], "")))
    return None


#: First part of a tag -> what all of its tags are about.
_OWNERS = {"routing": "router", "data": "data"}


def _place(rest: str, owner: str) -> tuple[str, str]:
    """(where, layer) from what follows an indicator's tag; ``owner`` is what all of its tags are about, if one thing is."""
    reduced = re.fullmatch(r"/?(.*?)_?(mean|max|min)", rest)
    if reduced is not None:
        return owner or reduced[1], reduced[2]
    where, _, layer = rest.strip("/").partition("/")
    return (owner, "/".join(filter(None, (where, layer)))) if owner else (where, layer)
