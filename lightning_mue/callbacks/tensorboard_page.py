"""One TensorBoard page of custom scalars that answers "is this run healthy?", shared by all callbacks.

Callbacks `register` their charts (in ``setup`` or ``on_fit_start``) and call `write` when they have logged. The page has the
charts that have something to show by then; it is written again when there are more, since TensorBoard keeps only the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_mue.checks import value_error
from lightning_mue.health.losses import LOSS_TAGS
from lightning_mue.namespaces import is_lightning

#: category -> chart title -> regexes of tags
Charts = dict[str, dict[str, list[str]]]

#: Shown for every run. `Trainer` appends "_step" to a metric logged both by step and by epoch.
TRAINING_CHARTS: Mapping[str, Sequence[str]] = {
    "Loss": [LOSS_TAGS],
    "Bits per byte": [r"(train|val)/bits_per_byte(_step|_epoch)?"],
    "Tokens per second": [r"train/tokens_per_second"],
    "Learning rate": [r"lr(-.*)?"],
}

_registered: WeakKeyDictionary[Trainer, Charts] = WeakKeyDictionary()
_written: WeakKeyDictionary[Logger, dict[str, Any]] = WeakKeyDictionary()
#: Tags that were logged, and the regexes that match one of them.
_tags: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
_matched: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


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


def write(trainer: Trainer, tags: Iterable[str] = ()) -> None:
    """Writes the page to each TensorBoardLogger, on rank zero, unless it is there; charts without a tag are left out.

    Args:
        trainer: A trainer that has begun to train.
        tags: Tags that the caller has written straight to the loggers; those of the Trainer's own metrics are known.
    """
    registered = _registered.get(trainer)
    boards = [logger for logger in trainer.loggers if is_lightning(logger, "TensorBoardLogger")]
    if registered is None or not boards or not trainer.is_global_zero:
        return
    known = _tags.setdefault(trainer, set())
    known.update(tags, trainer.callback_metrics, trainer.logged_metrics)
    shown = _with_tags(registered, known, _matched.setdefault(trainer, set()))
    for logger in boards if shown else ():
        if _written.get(logger) != (page := _page(shown, logger._prefix)):  # type: ignore[attr-defined]
            logger.experiment.add_custom_scalars(page)  # type: ignore[attr-defined]
            _written[logger] = page


def _with_tags(registered: Charts, known: set[str], matched: set[str]) -> Charts:
    """The charts, and of their regexes those, that match a known tag; notes the regexes in ``matched``, which stay so."""
    regexes = {regex for charts in registered.values() for tags in charts.values() for regex in tags}
    matched |= {regex for regex in regexes - matched if any(re.fullmatch(regex, tag) for tag in known)}
    found = {
        category: {title: kept for title, tags in charts.items() if (kept := [tag for tag in tags if tag in matched])}
        for category, charts in registered.items()
    }
    return {category: charts for category, charts in found.items() if charts}


def _page(charts_of: Charts, prefix: str) -> dict[str, Any]:
    """The charts in the form of ``SummaryWriter.add_custom_scalars``.

    TensorBoard anchors a regex at the start only: without the ``$``, ``z/router`` would also draw ``z/router_max``.
    """
    start = re.escape(f"{prefix}-") if prefix else ""
    return {
        category: {title: ["Multiline", [f"{start}({tag})$" for tag in tags]] for title, tags in charts.items()}
        for category, charts in charts_of.items()
    }


def _valid(tag: str, title: str) -> str:
    try:
        re.compile(tag)
    except re.error as error:
        found = f"the tag {tag!r}, which is not a valid regular expression ({error})"
        do = "Pass a literal tag through re.escape."
        raise value_error(f"charts[{title!r}]", found=found, expected="regular expressions", do=do) from error
    return tag
