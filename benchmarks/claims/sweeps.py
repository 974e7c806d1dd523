"""Reads a claim's YAML and runs its sweeps, with the functions of `lightning-mue sweep`."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import controls  # noqa: F401 - registers rules
import optuna
import yaml
from rich.console import Console
from warm import WarmRunner

from lightning_mue.analysis.sweep.config import get, resolve_key
from lightning_mue.analysis.sweep.loop import Sweep
from lightning_mue.analysis.sweep.plan import SweepPlan
from lightning_mue.analysis.sweep.progress import ConsoleWatcher
from lightning_mue.analysis.sweep.storage import SweepStorage, refuse_other, to_trials
from lightning_mue.analysis.trials import Trial, Value
from lightning_mue.cli.lightning_cli import MuECLI
from lightning_mue.cli.sweep import read_plan, resources
from lightning_mue.cli.sweep_check import check_builds

HERE = Path(__file__).parent
#: What every claim trains, but for its own changes.
CONFIG = HERE / "lm.yaml"
SCALES = ("cpu", "quick", "gpu")


@dataclass(frozen=True)
class SweepOf:
    """One sweep of a claim.

    Attributes:
        options: As of `lightning-mue sweep`.
        config: What it changes in `CONFIG`.
        certified: Whether its trials are part of the claim's certificate.
        base_of: Sweep with the base's runs: there no rule changes anything, so they are not repeated for each rule.
    """

    options: str
    config: Mapping[str, Any]
    certified: bool = True
    base_of: str = ""


@dataclass(frozen=True)
class ClaimFile:
    """What the YAML of a claim says, at one scale.

    Attributes:
        name: Of the file.
        base: Size of the tuned model.
        sweeps: Name -> sweep.
        targets: As `scores.claims_of` takes them.
    """

    name: str
    base: Mapping[str, Value]
    sweeps: Mapping[str, SweepOf]
    targets: Sequence[Mapping[str, Any]]


def claims() -> list[str]:
    """The names of all claims: files that hold sweeps."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if "sweeps" in yaml.safe_load(path.read_text()))


def read_claim(name: str, scale: str = "cpu") -> ClaimFile:
    """Reads a claim; ``quick`` and ``gpu`` in it replace sweeps and base, and change the config further."""
    told: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    other = told[scale] if scale != "cpu" else {}
    config = merged(told.get("config", {}), other.get("config", {}))
    sweeps = {}
    for title, sweep in other.get("sweeps", told["sweeps"]).items():
        sweep = {"options": sweep} if isinstance(sweep, str) else sweep
        sweeps[title] = SweepOf(**{**sweep, "config": merged(config, sweep.get("config", {}))})
    return ClaimFile(name, other.get("base", told["base"]), sweeps, told["targets"])


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, of which the second one's values win."""
    both = dict(first)
    for key, value in second.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def plan_of(sweep: SweepOf) -> SweepPlan:
    """The plan of a sweep."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(merged(yaml.safe_load(CONFIG.read_text()), sweep.config)))
        return read_plan(["--config", str(config), *shlex.split(sweep.options)])[1]


def run_sweep(plan: SweepPlan, folder: Path, jobs: int | None) -> list[Trial]:
    """Runs what is missing of a sweep, and returns all its trials."""
    check_builds(plan, MuECLI)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "sweep.json"
    if record.exists():
        refuse_other(str(folder), json.loads(record.read_text()), plan.to_dict(), do="Give another --runs.")
    record.write_text(json.dumps(plan.to_dict(), indent=1))
    storage = SweepStorage(str(folder / "journal.log"), "sweep", plan)
    jobs, threads, devices = resources(plan.config, jobs)
    with ConsoleWatcher(Console(), jobs) as watcher:
        entries = Sweep(storage, WarmRunner(plan.metric, threads, devices), folder, jobs, watcher).run()
    return to_trials(entries)


def with_sizes(trials: list[Trial], plan: SweepPlan, names: set[str]) -> list[Trial]:
    """The trials with the sizes that other sweeps of the claim vary, which here are the config's."""
    fixed = {name: get(plan.config, resolve_key(plan.config, "--axis", name)) for name in names}
    return [replace(trial, size={**fixed, **trial.size}) for trial in trials]
