"""Modules whose optimizers ask the trainer for the length of the run, as schedules do, in commands that train nothing."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_mue.cli.before_fit import stand_in_optimizers


class Scheduled(LightningModule):
    """A warm-up over a tenth of the run."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1.0)
        steps = self.trainer.estimated_stepping_batches
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)))
        assert self.trainer.max_steps == 100
        return [optimizer], [warm_up]


def trainer(**options):
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


def test_the_steps_are_the_runs_and_the_rate_is_the_full_one():
    model = Scheduled()
    (optimizer,) = stand_in_optimizers(model, None, trainer(max_steps=100))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]  # 0.1 in the first step
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = model.trainer


def test_a_run_of_unknown_length_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"configure_optimizers: .*max_epochs=2.*Set max_steps of the Trainer"):
        stand_in_optimizers(Scheduled(), None, trainer(max_epochs=2))


def test_a_family_needs_no_optimizer():
    (optimizer,) = stand_in_optimizers(Scheduled(), "sphere", trainer(max_epochs=2))
    assert optimizer.mue_family == "sphere"
