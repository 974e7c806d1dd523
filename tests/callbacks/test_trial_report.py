"""A trial ends with the metric after its last step, whatever the validation interval, and tells its loss on the way."""

import json
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_mue.callbacks.trial_report import TrialReport


class Small(LightningModule):
    """Logs the number of steps taken as the validation loss."""

    def __init__(self, bad_from=10**9, log="val/loss"):
        super().__init__()
        self.layer, self.bad_from, self.log_as, self.validations = torch.nn.Linear(4, 4), bad_from, log, 0

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch.float()).square().mean()
        return loss * math.nan if self.trainer.global_step >= self.bad_from else loss

    def validation_step(self, batch, batch_idx):
        self.log(self.log_as, float(self.trainer.global_step))

    def on_validation_end(self):
        self.validations += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder, module=None, **options):
    module = Small() if module is None else module
    data = DataLoader(torch.randint(9, (24, 4)), batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrialReport(str(folder), "val/loss")],
        **{"num_sanity_val_steps": 0, **options},
    )
    trainer.fit(module, data, data)
    return module, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("options", "steps", "validations"),
    [
        ({"max_steps": 7, "val_check_interval": 5, "check_val_every_n_epoch": None}, 7, 2),
        ({"max_steps": 10, "val_check_interval": 5, "check_val_every_n_epoch": None}, 10, 2),
        ({"max_steps": 7}, 7, 1),  # in the middle of an epoch
        ({"max_epochs": 2, "check_val_every_n_epoch": 5}, 24, 1),
        ({"max_epochs": 2}, 24, 2),
        ({"max_epochs": 1, "accumulate_grad_batches": 5}, 3, 1),
        ({"max_steps": 2, "accumulate_grad_batches": 5}, 2, 1),
    ],
)
def test_the_metric_is_that_after_the_last_step(tmp_path, options, steps, validations):
    module, result = fit(tmp_path, **options)
    assert result["loss"] == steps
    assert module.validations == validations
    batches = 24 if options.get("max_epochs") == 2 else min(12, steps * options.get("accumulate_grad_batches", 1))
    assert result["tokens"] == batches * 2 * 4
    assert result["compute"] == 6 * 20 * result["tokens"]  # 16 weights and 4 biases


def test_a_loss_that_stays_bad_is_told_and_a_single_one_is_not(tmp_path):
    fit(tmp_path, Small(bad_from=12), max_epochs=2)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress == {"part": pytest.approx(20 / 24), "loss": None}
    fit(tmp_path, Small(bad_from=9), max_steps=10)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["part"] == 1.0
    assert math.isfinite(progress["loss"])


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    class Bad(Small):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", math.nan)

    assert fit(tmp_path, Bad(), max_steps=2)[1]["loss"] is None


def test_a_metric_that_is_not_logged_is_refused_with_what_is(tmp_path):
    with pytest.raises(ValueError, match=r"--metric: found val/other, expected val/loss\. Give --metric"):
        fit(tmp_path, Small(log="val/other"), max_steps=2)
    assert not (tmp_path / "result.json").exists()


def test_a_metric_of_an_earlier_step_is_refused(tmp_path):
    class Ends(Small):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.fit_loop.epoch_loop._skip_next_val = self.trainer.global_step == 7

    with pytest.raises(
        ValueError, match="--metric: found val/loss of step 5 of 7, expected a validation after the last"
    ):
        fit(tmp_path, Ends(), max_steps=7, val_check_interval=5, check_val_every_n_epoch=None)
