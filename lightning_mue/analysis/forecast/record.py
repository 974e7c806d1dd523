"""The file of a forecast: written once, before the run, with all that says from what and for what it was made."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_mue.analysis.forecast.prediction import Prediction
from lightning_mue.checks import value_error
from lightning_mue.files import whole_file

KIND = "lightning-mue forecast"
#: What a config says of the training itself. Loggers, bars, checkpoints and monitors do not change it.
_OF_TRAINER = (
    *("max_steps", "max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("precision", "devices", "num_nodes", "limit_train_batches", "overfit_batches"),
)
_OF_CONFIG = ("model", "data", "optimizer", "lr_scheduler")
_PACKAGES = ("lightning-mue", "torch", "lightning", "numpy", "scipy")


def config_hash(config: Mapping[str, Any], lr_key: str) -> str:
    """SHA-256 of what a resolved config says of the training, without the seed and without the learning rate at `lr_key`.

    The rate is left out because a forecast names the one to use. Of the callbacks MuECallback counts, which scales the rates.

    Raises:
        ValueError: If there is nothing at `lr_key`.
    """
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    ours = [
        callback.get("init_args")
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if str(callback.get("class_path")).endswith(".MuECallback")
    ]
    kept: dict[str, Any] = {part: config.get(part) for part in _OF_CONFIG}
    kept = json.loads(json.dumps({**kept, "trainer": {key: trainer.get(key) for key in _OF_TRAINER}, "mue": ours}))
    parent: Any = kept
    *path, name = lr_key.split(".")
    for part in path:
        parent = parent.get(part) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or name not in parent:
        do = "Give --lr-key with the config's key of the swept rate."
        raise value_error("--lr-key", found=repr(lr_key), expected="a key of the config", do=do)
    del parent[name]
    _without_seeds(kept)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_seeds(kept: dict[str, Any]) -> None:
    """A seed of data or weights is a draw, not another run."""
    arguments = (kept.get("data") or {}).get("init_args") or kept.get("data") or {}
    for of in [arguments, *(callback or {} for callback in kept["mue"])]:
        of.pop("seed", None)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def to_record(
    prediction: Prediction,
    *,
    target: Mapping[str, float],
    config: Mapping[str, Any] | None,
    tables: Sequence[Path],
    metric: str,
) -> dict[str, Any]:
    """All of a forecast as JSON: values, laws, and where it comes from. `target` holds compute, tokens and steps of the run."""
    p = prediction
    return {
        "what": KIND,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "rule": p.sizes[0].cell.rule,
        "metric": metric,
        "level": p.loss_law.level,
        "target": {key: value if math.isfinite(value) else None for key, value in target.items()},
        "config": config,
        "loss": asdict(p.loss),
        "rate": {**asdict(p.rate), "over": p.rate_over, "moves": p.rate_moves},
        "laws": {
            "loss": {name: asdict(getattr(p.loss_law, name)) for name in ("a", "b", "l0")}
            | {"noise": p.loss_law.noise},
            "rate": {name: asdict(getattr(p.rate_law, name)) for name in ("coefficient", "exponent")}
            | {"residual_octaves": p.rate_law.residual},
        },
        "trials": {
            "tables": {str(path): file_hash(path) for path in tables},
            "count": p.trials,
            "sizes": [
                {
                    "size": dict(o.cell.size),
                    "compute": o.cell.compute,
                    "best_rate": o.rate.value,
                    "losses": o.losses.tolist(),
                }
                for o in p.sizes
            ],
        },
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a forecast.

    Raises:
        ValueError: If the file exists: a forecast is made once.
    """
    if path.exists():
        do = "Give another --output, or remove the file if the run has not started."
        raise value_error("--output", found=f"{path}, which exists", expected="a new file", do=do)
    with whole_file(path) as part:
        part.write_text(json.dumps(_strict(record), indent=1, allow_nan=False), encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a forecast.

    Raises:
        ValueError: If the file is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["what"] != KIND:
            raise KeyError(record["what"])
        datetime.fromisoformat(record["made"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a file that `lightning-mue forecast` wrote"
        raise value_error("--forecast", found=f"{path} ({type(error).__name__})", expected=expected) from error
    return dict(record)


def _strict(value: Any) -> Any:
    """JSON has no infinity: unbounded ends are null."""
    if isinstance(value, Mapping):
        return {key: _strict(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_strict(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Commit of the working folder, and whether tracked files have changed since; None outside a repository."""
    found = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    return {"sha": found[0], "changed": bool(found[1])}
