"""Which tags are losses, and which of them are those of training."""

from __future__ import annotations

import re

#: First parts of the tags that this package's callbacks log.
FAMILIES = ("data", "stability", "routing", "updates", "spectral", "transfer", "guard", "mue")
#: Regular expression of the whole tags of losses, under whatever usual name; parts of a loss (``aux_loss``) are none.
LOSS_TAGS = (
    rf"(?!({'|'.join(FAMILIES)}|final)/)(?!.*(aux|z_?loss|balanc|load))"
    r"(.*[/_.-])?(loss|nll|cross_entropy)([/_.-].*)?"
)


def is_loss(tag: str) -> bool:
    """Whether a tag is a loss that the user logs, under whatever usual name; parts of a loss (``aux_loss``) are not.

    Example:
        >>> [is_loss(tag) for tag in ("train/loss", "loss", "val_loss_step", "train/aux_loss", "stability/rms/ffn/00")]
        [True, True, True, False, False]
    """
    return bool(re.fullmatch(LOSS_TAGS, tag))


def is_training_loss(tag: str) -> bool:
    """Whether a loss is that of training, not of validation or test."""
    return is_loss(tag) and not re.search(r"(^|[/_.-])(val|valid|validation|eval|test|dev)([/_.-]|$)", tag)
