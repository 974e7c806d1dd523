"""The optimizer inside torch's and Lightning's machinery: closures, schedulers, Trainer."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue.optim import HyperSphereOptimizer


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([torch.sin(x[:, 0]) * x[:, 1], x[:, 2]], dim=1)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x, y = batch(seed)
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_it_learns(compute_dtype):
    model = mlp()
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.03, adamw_lr=0.01, compute_dtype=compute_dtype)
    before = loss_of(model, 999).item()
    for step in range(150):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert loss_of(model, 999).item() < 0.5 * before


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    closed, manual = mlp(), mlp()
    optimizer = HyperSphereOptimizer(closed.named_parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(closed, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    other = HyperSphereOptimizer(manual.named_parameters())
    expected = loss_of(manual, 0)
    expected.backward()
    assert other.step() is None
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(closed.parameters(), manual.parameters(), strict=True))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 3)),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=8),
        lambda optimizer: OneCycleLR(
            optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=12, cycle_momentum=False
        ),
    ],
    ids=["lambda from zero", "cosine", "one cycle"],
)
def test_schedulers_set_every_group_and_the_step_obeys(schedule):
    model = mlp()
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.04, adamw_lr=0.01)
    scheduler = schedule(optimizer)
    sphere = optimizer.param_groups[0]
    assert sphere["kind"] == "sphere"
    rates = []
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        start = [p.detach().clone() for p in sphere["params"]]
        optimizer.step()
        turned = max((p - w).norm() / w.norm() for p, w in zip(sphere["params"], start, strict=True)).item()
        rates.append(sphere["lr"])
        assert turned <= 1.05 * sphere["lr"]  # a chord of an angle of about lr
        assert turned >= 0.5 * sphere["lr"]
        assert optimizer.param_groups[1]["lr"] == pytest.approx(sphere["lr"] / 4, rel=1e-12)
        scheduler.step()
    assert len(set(rates)) > 3


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def configure_optimizers(self) -> dict:
        optimizer = HyperSphereOptimizer(self.named_parameters(), lr=0.03)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 20), "interval": "step"},
        }


def fit(tmp_path: Path, resume: Path | None = None) -> tuple[L.Trainer, Regression]:
    """Twelve steps; every batch holds the same rows, so that a resumed loader, which starts over, sees no others."""
    trainer = L.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[
            LearningRateMonitor("step"),
            ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1),
        ],
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model = Regression()
    x, y = batch(0)
    loader = DataLoader(TensorDataset(x[:8].repeat(24, 1), y[:8].repeat(24, 1)), batch_size=8)
    trainer.fit(model, loader, ckpt_path=resume)
    return trainer, model


def test_lightning_trains_clips_saves_and_resumes_exactly(tmp_path):
    trainer, whole = fit(tmp_path)
    (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, LearningRateMonitor))
    assert set(monitor.lrs) == {"lr-HyperSphereOptimizer/sphere", "lr-HyperSphereOptimizer/adamw"}
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    trainer, resumed = fit(tmp_path / "resumed", resume=tmp_path / "step=5.ckpt")
    assert trainer.global_step == 12
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
        assert not torch.equal(weight, saved["state_dict"][name])
