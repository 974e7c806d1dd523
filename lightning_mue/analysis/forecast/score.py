"""A forecast against the run that it was made for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from lightning_mue.analysis.forecast.record import config_hash
from lightning_mue.checks import listed, value_error
from lightning_mue.health.series import Run, Series

HEADERS = ("run", "what", "predicted", "interval", "measured", "off by", "inside")


def score(record: Mapping[str, Any], name: str, folder: Path, metrics: Run) -> list[tuple[str, ...]]:
    """Lines of a table: the loss as predicted and measured, and the rate as predicted and used.

    Args:
        record: A forecast, as `read_record` gives it.
        name: Of the run, for the table.
        folder: Of the run, with Lightning's ``config.yaml``.
        metrics: What it logged.

    Raises:
        ValueError: If the run started before the forecast was made, is of another config, has not logged the forecast's metric,
            or has not ended.
    """
    made = datetime.fromisoformat(record["made"])
    started = start_of(folder)
    if started < made:
        found = f"{name}, started {started:%Y-%m-%d %H:%M:%S}"
        raise value_error(
            "--forecast", found=found, expected=f"a run that started after the forecast, {made:%Y-%m-%d %H:%M:%S}"
        )
    config = _config_of(folder) if record["config"] else None
    if config is not None and config_hash(config, record["config"]["lr_key"]) != record["config"]["sha256"]:
        do = "A forecast counts for its own config only, in all but seed, rate, loggers and monitors: make one for this config."
        raise value_error(
            "--forecast", found=f"{name}, of another config", expected="the config of the forecast", do=do
        )
    measured, loss = _final(record, name, metrics), record["loss"]
    row = _row(name, record["metric"], loss, measured, f"{100 * (measured / loss['value'] - 1):+.2f} %")
    if config is None:
        return [row, (name, "config", *["-"] * 4, "not checked: the forecast names none")]
    used: Any = config
    for part in record["config"]["lr_key"].split("."):
        used = used[part]
    octaves = math.log2(float(used) / record["rate"]["value"])
    return [row, _row(name, "rate used", record["rate"], float(used), f"{octaves:+.2f} octaves")]


def _row(name: str, what: str, predicted: Mapping[str, Any], measured: float, off: str) -> tuple[str, ...]:
    low = -math.inf if predicted["low"] is None else predicted["low"]
    high = math.inf if predicted["high"] is None else predicted["high"]
    inside = "yes" if low <= measured <= high else "no"
    return name, what, f"{predicted['value']:.4g}", f"{low:.4g} to {high:.4g}", f"{measured:.4g}", off, inside


def start_of(folder: Path) -> datetime:
    """When a run started: by the names of its event files, else by its oldest file."""
    stamps = [
        re.match(r"events\.out\.tfevents\.(\d{9,11})\.", path.name) for path in folder.glob("events.out.tfevents*")
    ]
    named = [int(match[1]) for match in stamps if match]
    seconds = min(named) if named else min(path.stat().st_mtime for path in folder.iterdir() if path.is_file())
    return datetime.fromtimestamp(math.ceil(seconds), timezone.utc)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        do = "LightningCLI writes it; a run of another kind cannot be compared."
        raise value_error("RUN_DIR", found=f"{folder} without config.yaml", expected="the run's resolved config", do=do)
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def _final(record: Mapping[str, Any], name: str, metrics: Run) -> float:
    metric, steps = record["metric"], record["target"].get("steps")
    if metric not in metrics:
        found = f"{name} without {metric} (it logged {listed(sorted(metrics))})"
        raise value_error("--forecast", found=found, expected=f"the forecast's metric, {metric}")
    series = metrics[metric]
    if steps and not _ended(series, steps):
        found = f"{name}, whose last {metric} is of step {series.steps[-1]}"
        raise value_error("--forecast", found=found, expected=f"a run of {steps:g} steps that has ended")
    return float(series.values[-1])


def _ended(series: Series, steps: float) -> bool:
    """The last sample is of the last step, or another one was not due."""
    last = float(series.steps[-1])
    every = float(series.steps[-1] - series.steps[-2]) if len(series.steps) > 1 else 0.0
    return last + every > steps - 1 or last >= steps - 1
