"""Training runs of a sweep as a table: what was run, at which rate, and the loss it ended with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lightning_mue.checks import value_error
from lightning_mue.files import whole_file

#: What an axis or a searched setting may be.
Value: TypeAlias = int | float | str | bool | None
_FIXED = ("rule", "seed", "lr", "loss", "tokens", "compute")


@dataclass(frozen=True)
class Trial:
    """One finished training run.

    Attributes:
        rule: Rule of the run; "none" without MuECallback.
        size: Values of the axes, e.g. {"width": 128, "n_experts": 8}.
        seed: Of weights and data. Runs of one seed see the same batches at every rate.
        lr: Base learning rate: the one given to the optimizer, before the rule scales it.
        loss: Final loss (validation, nats unless the module logs another unit); not finite where the run diverged.
        tokens: Tokens (or samples) trained on; NaN if unknown.
        compute: Training FLOPs: those that the model declares, else 6 x active parameters x tokens; NaN if unknown.
        settings: Other searched config keys and their values.
    """

    rule: str
    size: Mapping[str, Value]
    seed: int
    lr: float
    loss: float
    tokens: float = float("nan")
    compute: float = float("nan")
    settings: Mapping[str, Value] = field(default_factory=dict)


def write_trials(path: str | Path, trials: Iterable[Trial]) -> None:
    """Writes a CSV table: a column for each axis (``size.NAME``) and each setting (``settings.KEY``); other cells are JSON."""
    trials = list(trials)
    sizes = sorted({name for t in trials for name in t.size})
    settings = sorted({key for t in trials for key in t.settings})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIXED, *(f"size.{name}" for name in sizes), *(f"settings.{key}" for key in settings)])
    for t in trials:
        row = [t.rule, t.seed, *(repr(float(number)) for number in (t.lr, t.loss, t.tokens, t.compute))]
        row += [json.dumps(t.size[name]) if name in t.size else "" for name in sizes]
        row += [json.dumps(t.settings[key]) if key in t.settings else "" for key in settings]
        writer.writerow(row)
    with whole_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_trials(path: str | Path) -> list[Trial]:
    """Reads what ``write_trials`` wrote.

    Raises:
        ValueError: If the file is not such a table.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [_trial(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        expected = f"a table with the columns {', '.join(_FIXED)} and size.NAME"
        raise value_error(str(path), found=f"{type(error).__name__}: {error}", expected=expected) from error


def _trial(row: Mapping[str, str]) -> Trial:
    numbers = {name: float(row[name]) for name in ("lr", "loss", "tokens", "compute")}
    return Trial(row["rule"], _values(row, "size."), int(row["seed"]), **numbers, settings=_values(row, "settings."))


def _values(row: Mapping[str, str], prefix: str) -> dict[str, Value]:
    return {
        name.removeprefix(prefix): json.loads(cell) for name, cell in row.items() if name.startswith(prefix) and cell
    }
