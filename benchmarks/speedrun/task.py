"""The task: one byte language model on the standard library's sources, trained for a number of steps; its validation loss.

Everything here is fixed for all entries: sizes, data, batch, schedule's shape, validation set. An entry chooses optimizer, initial
draws and warm-up.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from entries import Entry
from lightning.pytorch import Callback

from lightning_mue import MoELanguageModel, MuECallback, TextDataModule
from lightning_mue.optim.schedule import WarmupDecay

#: Loss of a run that diverged, nats: above that of a uniform guess, ln 256.
DIVERGED = 9.9


@dataclass(frozen=True)
class Task:
    """Sizes of model and data.

    Attributes:
        base: Model that entries are tuned on.
        columns: What each column changes in it.
        context, batch: Bytes of a sequence, sequences of a batch.
        val_batches: Batches of the validation set, the same in every run.
        target: Validation loss to reach, nats per byte.
        start: First length of run that is tried, in steps; the others are factors of 2^(1/2) away.
        seeds: Of a length that counts.
        curve_seeds: Of lengths on both sides of the target.
        transfer_seeds: Of each run of a transfer.
    """

    base: dict[str, Any] = field(default_factory=lambda: {"width": 128, "depth": 4, "n_heads": 2, "n_experts": 0})
    columns: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "dense": {},
            "moe": {"n_experts": 8, "top_k": 2},
            "width x 2": {"width": 256, "n_heads": 4},
        }
    )
    context: int = 128
    batch: int = 8
    val_batches: int = 32
    target: float = 2.2
    start: int = 64
    seeds: int = 10
    curve_seeds: int = 3
    transfer_seeds: int = 2

    def sizes(self, column: str) -> dict[str, Any]:
        """Sizes of a column's model."""
        return self.base | self.columns[column]


class _StopDiverged(Callback):
    def on_train_batch_end(self, trainer, module, outputs, *_):
        loss = float(outputs["loss"])
        if not loss < 100.0:
            trainer.should_stop = True


def train(task: Task, entry: Entry, column: str, steps: int, seed: int, rule: str = "sp") -> float:
    """Validation loss in nats per byte after the last step; `DIVERGED` at most.

    Args:
        task: Sizes and data.
        entry: What trains.
        column: Which model.
        steps: Optimizer steps; the rate is zero after them.
        seed: Of initial draws and batches: runs of a seed see the same batches.
        rule: Transfers the entry from the base to the column's sizes; ``sp``: not at all.
    """
    for name in ("lightning.pytorch", "lightning_mue"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    model = MoELanguageModel(
        context_length=task.context,
        **task.sizes(column),
        **entry.settings.get("model", {}),
        optimizer=entry.optimizer,
        scheduler=lambda optimizer: WarmupDecay(optimizer, warmup=entry.settings["warmup"]),
    )
    data = TextDataModule(context_length=task.context, batch_size=task.batch, val_batches=task.val_batches, seed=seed)
    plan = MuECallback(rule=rule, base=task.base, seed=seed, verbose=False, verify=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[_StopDiverged(), *([] if rule == "sp" else [plan])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    loss = float(trainer.callback_metrics.get("val/loss", math.inf))
    return loss if loss < DIVERGED and trainer.global_step >= steps else DIVERGED
