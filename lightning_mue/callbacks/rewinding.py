"""Checkpoints that are saved between two optimizer steps count to the last step, so that a resumed run loses no gradient."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.checks import listed, mismatch
from lightning_mue.contract import REWOUND, counts_batches


def rewind_to_step(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Takes the micro-batches of an unfinished accumulation out of a checkpoint's counts; the resumed run repeats them.

    Their gradients are not in a checkpoint. Lightning counts them as trained, so that the resumed run would step without them.
    For `on_save_checkpoint`; a second call changes nothing.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress")
    if progress is None or trainer.accumulate_grad_batches <= 1:
        return
    processed = progress["current"]["processed"]
    open_batches = 0 if processed >= trainer.num_training_batches else processed % trainer.accumulate_grad_batches
    if open_batches == 0:
        return
    states = loop.get("state_dict", {}).get("combined_loader", [])
    loaders = [each for each in _loaders(trainer) if hasattr(each, "state_dict")] if states else []
    if foreign := [type(loader).__name__ for loader in loaders if not counts_batches(loader)]:
        _warn(open_batches, foreign)
        return
    for state in states:
        state["step"] -= open_batches
    for counts in (progress["current"], progress["total"]):
        step_ended = counts["processed"] - open_batches
        counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), step_ended))
    checkpoint[REWOUND] = open_batches


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return combined.flattened if combined is not None else []


def _warn(open_batches: int, foreign: list[str]) -> None:
    rank_zero_warn(
        mismatch(
            "checkpoint",
            found=f"{open_batches} micro-batch(es) since the last optimizer step, and training data of {listed(foreign)}, whose "
            "saved state cannot be taken back",
            expected="a checkpoint that is saved right after an optimizer step",
            do="A run resumed from this one steps once without their gradients. Save by steps (every_n_train_steps), not by time; "
            "or give the loader the attribute mue_counts_batches (docs/extending.md).",
        )
    )
