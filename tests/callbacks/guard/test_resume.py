"""An interrupted and resumed guard decides as an undisturbed one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.guarded import Fault, Regression, batches, furthest, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mue import StabilityGuard

pytestmark = pytest.mark.slow
STEPS = 90
DATA = list(batches(STEPS))
OPTIONS = {"min_history": 16, "window": 32, "every_n_steps": 25, "lr_factor": 0.5, "cool_down": 12, "drift": None}


class Numbered(Regression):
    """Looks its batches up by the number of the step, as step-indexed data does, so that a resume sees the right ones."""

    def training_step(self, batch, batch_idx):
        batch = DATA[self.trainer.global_step]
        return self.loss(batch, int(batch["number"]))


def run(folder, stop=None, resume=None, on_device=False, **options):
    model = Numbered(Fault("gradient", math.nan, (22, 61)), scale={44: 100.0, 70: 200.0}, fused=on_device)
    guard = StabilityGuard(**{**OPTIONS, "dirpath": folder / "guard", **options})
    guard.decides_on_device_everywhere = on_device
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    made = trainer([guard, saver], enable_checkpointing=True, max_steps=stop or STEPS, max_epochs=-1)
    made.fit(model, torch.utils.data.DataLoader(torch.zeros(STEPS)), ckpt_path=resume)
    return model, guard


def comparable(guard):
    return [{k: v for k, v in d.items() if k not in ("value", "done")} for d in guard.decisions]


@pytest.mark.parametrize("stop", [10, 20, 50, 80])
@pytest.mark.parametrize(
    "options",
    [
        {"spike": "rollback", "keep": "disk"},
        {"spike": "rollback"},
        {"spike": "lower_lr"},
        {"spike": "skip", "on_device": True},
    ],
    ids=str,
)
def test_resumed_is_undisturbed(tmp_path, stop, options):
    whole_model, whole = run(tmp_path / "whole", **options)
    assert {d["kind"] for d in whole.decisions} == {"nonfinite", "spike"}
    run(tmp_path / "parts", stop=stop, **options)
    model, guard = run(tmp_path / "parts", resume=tmp_path / "parts" / f"step={stop}.ckpt", **options)
    assert comparable(guard) == comparable(whole)
    assert guard.skipped_steps == whole.skipped_steps
    assert furthest(weights(model), weights(whole_model)) == 0
    assert torch.equal(guard._ended["judges"][0]["window"], whole._ended["judges"][0]["window"])
    assert guard._ended["spikes"] == whole._ended["spikes"]


def test_checkpoints_load_with_weights_only(tmp_path):
    run(tmp_path, stop=50, spike="rollback")
    saved = torch.load(tmp_path / "step=50.ckpt", weights_only=True)
    assert saved["callbacks"]["StabilityGuard"]["acting"]["rollbacks"] == 1


def test_a_guard_without_its_state_decides_otherwise(tmp_path):
    """The control: what the checkpoint holds of the guard counts."""
    _, whole = run(tmp_path / "whole", spike="skip")
    run(tmp_path / "parts", stop=40, spike="skip")
    path = tmp_path / "parts" / "step=40.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["StabilityGuard"]
    torch.save(saved, path)
    _, guard = run(tmp_path / "parts", resume=path, spike="skip")
    assert comparable(guard) != comparable(whole)
