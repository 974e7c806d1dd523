"""One TensorBoard page of custom scalars that answers "is this run healthy?", shared by all callbacks.

TensorBoard keeps only the last page that a run writes, so callbacks `register` their charts (in ``setup`` or
``on_fit_start``) and the first of them to reach ``on_train_start`` writes all of them (`write`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_mue.checks import value_error
from lightning_mue.namespaces import is_lightning

#: category -> chart title -> regexes of tags
Charts = dict[str, dict[str, list[str]]]

#: Shown for every run. `Trainer` appends "_step" to a metric logged both by step and by epoch.
TRAINING_CHARTS: Mapping[str, Sequence[str]] = {
    "Loss": [r"(train|val)/loss(_step|_epoch)?"],
    "Bits per byte": [r"(train|val)/bits_per_byte(_step|_epoch)?"],
    "Tokens per second": [r"train/tokens_per_second"],
    "Learning rate": [r"lr(-.*)?"],
}

_registered: WeakKeyDictionary[Trainer, Charts] = WeakKeyDictionary()
_written: WeakKeyDictionary[Logger, dict[str, Any]] = WeakKeyDictionary()


def register(trainer: Trainer, category: str, charts: Mapping[str, Sequence[str]]) -> None:
    r"""Adds charts to the page of ``trainer``; call it before ``on_train_start``.

    Several callbacks may share a category, and even a chart, whose tags are then joined. Registering the same thing
    twice (a second ``fit``) changes nothing.

    Args:
        trainer: The trainer whose loggers will show the page.
        category: Heading, e.g. ``"Stability"``.
        charts: Chart title -> regular expressions, each of which must match a WHOLE tag as it is logged (without the
            logger's prefix), e.g. ``{"MaxVio": [r"routing/max_violation/.*"]}``. Use `re.escape` for a literal tag.

    Raises:
        ValueError: If a tag is not a valid regular expression.
    """
    page = _registered.setdefault(trainer, {"Training": {title: list(tags) for title, tags in TRAINING_CHARTS.items()}})
    for title, tags in charts.items():
        known = page.setdefault(category, {}).setdefault(title, [])
        known.extend(_valid(tag, title) for tag in tags if tag not in known)


def write(trainer: Trainer) -> None:
    """Writes the page of a trainer that has begun to train to each of its TensorBoardLoggers, on rank zero, unless it is there."""
    registered = _registered.get(trainer)
    if registered is None or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if is_lightning(logger, "TensorBoardLogger") and _written.get(logger) != (
            page := _page(registered, logger._prefix)  # type: ignore[attr-defined]
        ):
            logger.experiment.add_custom_scalars(page)  # type: ignore[attr-defined]
            _written[logger] = page


def _page(registered: Charts, prefix: str) -> dict[str, Any]:
    """The charts in the form of ``SummaryWriter.add_custom_scalars``.

    TensorBoard anchors a regex at the start only: without the ``$``, ``z/router`` would also draw ``z/router_max``.
    """
    start = re.escape(f"{prefix}-") if prefix else ""
    return {
        category: {title: ["Multiline", [f"{start}({tag})$" for tag in tags]] for title, tags in charts.items()}
        for category, charts in registered.items()
    }


def _valid(tag: str, title: str) -> str:
    try:
        re.compile(tag)
    except re.error as error:
        found = f"the tag {tag!r}, which is not a valid regular expression ({error})"
        do = "Pass a literal tag through re.escape."
        raise value_error(f"charts[{title!r}]", found=found, expected="regular expressions", do=do) from error
    return tag
