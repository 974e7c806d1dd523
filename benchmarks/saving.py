"""How long a training stands still for a checkpoint: SafeCheckpoint against a save that is waited for, of the same state.

The state is that of 63 M parameters in float32 with AdamW's two moments (0.76 GB). "Pause" is the time inside of the callback's
hook; "waited for" is the same save, with the wait for the disk and the sums; the third is Trainer.save_checkpoint, Lightning's own
file without sums. The first save pays for new memory and is left out. Steps that are computed while a checkpoint is written share
the processor with the thread that writes: the last rows say how much slower they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from common import Claim, parse, result_name, save
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mue import SafeCheckpoint


class Layers(LightningModule):
    """15 layers of 2048 x 2048, on a batch of 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(15)])

    def training_step(self, batch, batch_idx):
        """A loss."""
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        """The same batch again and again."""
        return torch.utils.data.DataLoader([torch.randn(8, 2048)] * 10_000, batch_size=None)


class Timed(Callback):
    """Alternates the three saves, and notes the seconds of saves and of steps."""

    def __init__(self, where: Path, rounds: int) -> None:
        self.where, self.rounds, self.start = where, rounds, 0.0
        self.safe = SafeCheckpoint(where / "safe", every_n_train_steps=10**9, keep_last=1)
        self.seconds: dict[str, list[float]] = {
            "pause": [],
            "waited for": [],
            "Lightning": [],
            "plain": [],
            "beside": [],
        }

    def setup(self, trainer, pl_module, stage):
        """The saver's, which is called by hand here."""
        self.safe.dirpath = self.where / "safe"

    def on_train_batch_start(self, trainer, *_):
        """Notes the time, and whether a write is under way."""
        self.beside, self.start = self.safe._writer.busy, time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Saves every 8 steps; those between are timed."""
        if batch_idx >= 8:
            kind = "beside" if self.beside and self.safe._writer.busy else "plain"
            self.seconds[kind].append(time.perf_counter() - self.start)
        if batch_idx % 8 or not batch_idx:
            return
        self.safe._writer.wait()
        for name, act in {"pause": self._pause, "waited for": self._wait, "Lightning": self._lightning}.items():
            start = time.perf_counter()
            act(trainer)
            self.seconds[name].append(time.perf_counter() - start)
            self.safe._writer.wait()
        os.sync()  # Lightning's file, which would be written beside the steps that follow
        self._pause(trainer)
        trainer.should_stop = batch_idx // 8 > self.rounds

    def _pause(self, trainer) -> None:
        self.safe._step += 1
        self.safe._save(trainer)

    def _wait(self, trainer) -> None:
        self._pause(trainer)
        self.safe._writer.wait()

    def _lightning(self, trainer) -> None:
        trainer.save_checkpoint(self.where / "lightning.ckpt")


def measure(rounds: int, where: Path) -> list[dict[str, object]]:
    """Medians."""
    timed = Timed(where, rounds)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timed],
    )
    trainer.fit(Layers())
    timed.safe._writer.wait()
    error = timed.safe._writer.error()
    if error is not None:
        raise error
    saves = {name: statistics.median(timed.seconds[name][1:]) for name in ("pause", "waited for", "Lightning")}
    steps = {name: statistics.median(timed.seconds[name]) for name in ("plain", "beside")}
    rows = [
        {"what": f"save: {name}", "ms": 1e3 * each, "ratio": each / saves["waited for"]} for name, each in saves.items()
    ]
    return rows + [
        {"what": f"step: {name}", "ms": 1e3 * each, "ratio": each / steps["plain"]} for name, each in steps.items()
    ]


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """The pause is short."""
    ms = {str(row["what"]): float(str(row["ms"])) for row in rows}
    return [
        Claim("pause / the same save waited for", "at most", 0.10, ms["save: pause"] / ms["save: waited for"]),
        Claim("pause / Trainer.save_checkpoint", "at most", 0.10, ms["save: pause"] / ms["save: Lightning"]),
    ]


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--where", help="folder on the disk to write to")
    args = parse(parser)
    warnings.simplefilter("ignore")
    where = Path(tempfile.mkdtemp(dir=args.where))
    try:
        save(result_name("saving"), measure(args.rounds, where), claims, part=["what"], strict=args.strict)
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
