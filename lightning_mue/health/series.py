"""Reads the metrics of a run from what its loggers wrote: TensorBoard event files and Lightning's ``metrics.csv``.

Shape legend: n samples of one tag.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_mue.checks import value_error
from lightning_mue.health.losses import FAMILIES


class Series(NamedTuple):
    """The samples of one tag: steps, int64 [n], ascending; values, float64 [n]."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


Run = Mapping[str, Series]


def series_of(points: Iterable[tuple[int, float]]) -> Series:
    """A series from (step, value) pairs in any order; of several values at one step the last counts."""
    by_step = dict(points)
    steps = sorted(by_step)
    return Series(np.array(steps, dtype=np.int64), np.array([by_step[s] for s in steps], dtype=np.float64))


def find_runs(folder: str | Path, key: str = "RUN_DIR") -> list[Path]:
    """The folders in (and including) a folder that hold event files or a ``metrics.csv``, in order of their names.

    ``key`` is what the folder was given as, for the error.

    Raises:
        ValueError: If there is none.
    """
    root = Path(folder)
    found = sorted({path.parent for pattern in ("events.out.tfevents*", "metrics.csv") for path in root.rglob(pattern)})
    # TensorBoard's writer keeps what it logs for hyperparameters in folders of their own inside the run.
    runs = [path for path in found if not any(other != path and other in path.parents for other in found)]
    if not runs:
        expected = "a folder with TensorBoard event files or a metrics.csv, or one that holds such folders"
        found_what = f"{root} with neither" if root.is_dir() else f"{root}, which is no folder"
        raise value_error(
            key, found=found_what, expected=expected, do="Give a logger's log_dir, such as logs/quickstart."
        )
    return runs


def read_run(folder: str | Path, key: str = "RUN_DIR") -> Run:
    """Tag -> series of a run, without the logger's prefix; event files count before a ``metrics.csv``.

    Raises:
        ValueError: If the folder holds no metrics that can be read.
    """
    folder = Path(folder)
    run = _from_events(folder) if list(folder.glob("events.out.tfevents*")) else {}
    if not run and (folder / "metrics.csv").exists():
        run = _from_csv(folder / "metrics.csv")
    if not run:
        raise value_error(key, found=f"{folder} without a scalar", expected="at least one logged metric")
    return without_prefix(run)


def _from_events(folder: Path) -> dict[str, Series]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 0})
    events.Reload()
    found = {tag: series_of((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["tensors"]:  # scalars of newer writers
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            pairs = ((e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag))
            found[tag] = series_of(pairs)
    found.pop("epoch", None)
    found.pop("hp_metric", None)
    return found


def _from_csv(path: Path) -> dict[str, Series]:
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                step = int(float(row["step"]))
            except (KeyError, TypeError, ValueError):
                continue  # a line that was being written when the run ended
            for tag, text in row.items():
                if tag not in ("step", "epoch") and isinstance(tag, str) and text and _is_number(text):
                    points[tag].append((step, float(text)))
    return {tag: series_of(pairs) for tag, pairs in points.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def without_prefix(run: Run) -> dict[str, Series]:
    """The run without the ``prefix-`` that a logger puts in front of every tag."""
    families = "|".join(FAMILIES)
    prefixes = {match[1] for tag in run if (match := re.match(rf"(.+?-)(?:{families})/", tag))}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return {tag.removeprefix(prefix): series for tag, series in run.items()}
