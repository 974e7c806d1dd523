"""Recording a base run: the length of the run, and its fingerprint's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mue.callbacks.mue.run import steps
from lightning_mue.callbacks.transfer.expectation import classes_of
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.callbacks.transfer.layers import Layers
from lightning_mue.checks import value_error
from lightning_mue.parameterizations import ScalingPlan


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the run, of which the progress is a fraction.

    Raises:
        ValueError: If they are not known.
    """
    try:
        return steps(trainer)
    except LookupError:
        raise value_error(
            "max_steps",
            found=f"{trainer.max_steps} with max_epochs={trainer.max_epochs}, so the length of this run is not known",
            expected="a known length, of which TransferMonitor's progress is a fraction",
            do="Set max_steps of the Trainer.",
        ) from None


def make_folder(path: str | Path) -> None:
    """Makes the folder to record in, before anything is trained.

    Raises:
        ValueError: If the path is that of a folder itself.
    """
    if Path(path).is_dir():
        raise value_error(
            "record", found=f"{str(path)!r}, which is a folder", expected="a file's name", do="Give e.g. base.json."
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_fingerprint(
    path: str | Path, total: int, points: Mapping[int, Mapping[str, float]], layers: Layers, plan: ScalingPlan
) -> None:
    """Writes what was recorded; warns where it cannot be written.

    Args:
        path: The file.
        total: Optimizer steps of the whole run.
        points: Zero-based optimizer step -> key -> value.
        layers: The model's layers.
        plan: The plan in force.
    """
    about = {
        "depths": layers.depths,
        "classes": classes_of(plan.parameters),
        "rule": f"{plan.rule} ({plan.family})",
        "axes": plan.axes,
    }
    try:
        Fingerprint.of_points(total, points, **about).save(path)
    except OSError as error:  # neither hides the exception that ended the run, nor makes a finished run fail
        rank_zero_warn(f"TransferMonitor: the fingerprint could not be written to {str(path)!r}: {error}")
        return
    rank_zero_info(f"TransferMonitor: wrote {len(points)} points of {total} steps to {path}.")
