"""Lightning's finetuning callbacks on HyperSphereOptimizer: one group, the callback's rates, and an exact resume."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_mue import HyperSphereOptimizer, MuECallback, QKClip
from lightning_mue.models.transformer import Attention, RotaryEmbedding

EPOCHS, UNFROZEN = 4, 1
DATA = torch.randint(0, 9, (8, 6), generator=torch.Generator().manual_seed(1))


class Backbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.attention = Attention(width, width // 4, width // 4, 4, qk_norm=False, scale=0.5, init_std=None)
        self.rotary = RotaryEmbedding(4, 6)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.norm(x + self.attention(x, self.rotary))


class Net(LightningModule):
    """A backbone to be unfrozen, and a head that is trained from the start."""

    def __init__(self, width=8, names=True, adamw_lr=0.5):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.backbone = Backbone(width)
        self.head = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, 9))

    def training_step(self, tokens):
        logits = self.head(self.backbone(tokens))
        return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens * 3 + 1).flatten() % 9)

    def configure_optimizers(self):
        held = self.head.named_parameters("head")
        options = {"lr": 0.02, "adamw_lr": self.hparams.adamw_lr, "compute_dtype": "float32"}
        optimizer = HyperSphereOptimizer(held, **options)
        if self.hparams.names:
            optimizer.note_names(self)
        return optimizer


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Gradual(BaseFinetuning):
    """Thaws norm and attention in one epoch, the embedding in the next, as users write it."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        parts = {1: [pl_module.backbone.attention, pl_module.backbone.norm], 2: pl_module.backbone.embedding}
        if epoch in parts:
            self.unfreeze_and_add_param_group(parts[epoch], optimizer, lr=0.004 / epoch)


def backbone_finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=UNFROZEN, lambda_func=lambda epoch: 1.5)


def fit(folder, model, callbacks, epochs=EPOCHS, ckpt_path=None):
    saves = ModelCheckpoint(dirpath=folder, filename=f"{epochs}", save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*callbacks, LearningRateMonitor(), saves],
    )
    trainer.fit(model, DataLoader(DATA, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def beside(case, width):
    """The callbacks of a case, made anew."""
    finetuning = Gradual() if case == "gradual" else backbone_finetuning()
    others = {
        "mue": [MuECallback("hyperp", base={"width": 8}, verify=False, verbose=False)],
        "qk_clip": [QKClip(threshold=0.2)],
    }
    return [*others.get(case, []), finetuning]


CASES = {"plain": {}, "nameless": {"names": False}, "gradual": {}, "mue": {"width": 16, "names": False}, "qk_clip": {}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_a_finetuning_callback_resumes_exactly(case, stop, tmp_path):
    options = CASES[case]
    whole, rates = Net(**options), Rates()
    callbacks = [*beside(case, whole.hparams.width), rates]
    trainer = fit(tmp_path / "whole", whole, callbacks)
    fit(tmp_path / "short", Net(**options), beside(case, whole.hparams.width), epochs=stop)
    resumed, again = Net(**options), Rates()
    path = str(tmp_path / "short" / f"{stop}.ckpt")
    after = fit(tmp_path / "resumed", resumed, [*beside(case, 0), again], ckpt_path=path)
    for name, p in whole.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name
    assert again.seen == rates.seen[2 * stop :]
    assert len(trainer.optimizers[0].param_groups) == len(after.optimizers[0].param_groups) == 3 + (case == "gradual")
    fresh = Net(**options)
    moved = {n: float((p - fresh.state_dict()[n]).abs().max()) for n, p in whole.state_dict().items() if "rotary" not in n}
    assert min(moved.values()) > 1e-4, moved
