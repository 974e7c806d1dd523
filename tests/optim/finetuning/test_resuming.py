"""Lightning's finetuning callbacks on HyperSphereOptimizer: one group, the callback's rates, and an exact resume."""

from __future__ import annotations

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
NAMES = ["sphere", "adamw", "mixed"]
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


def fit(folder, model, callbacks, epochs=EPOCHS, ckpt_path=None):
    saves = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=False)
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


def callbacks_of(case):
    """The callbacks of a case, made anew."""
    before = {"mue": [MuECallback("hyperp", base={"width": 8}, verify=False, verbose=False)], "qk_clip": [QKClip(0.2)]}
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=UNFROZEN, lambda_func=lambda epoch: 1.5)
    return [*before.get(case, []), Gradual() if case == "gradual" else finetuning, Rates()]


def resume(case, folder, stop, whole, rates):
    """Resume a run from its checkpoint after so many epochs, and hold it against the whole run."""
    resumed, callbacks = Net(**CASES[case]), callbacks_of(case)
    fit(folder / f"resumed-{stop}", resumed, callbacks, ckpt_path=str(folder / f"{stop - 1}.ckpt"))
    for name, p in whole.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), (stop, name)
    assert callbacks[-1].seen == rates.seen[2 * stop :]


CASES = {"plain": {}, "nameless": {"names": False}, "gradual": {}, "mue": {"width": 16, "names": False}, "qk_clip": {}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_runs_with_finetuning_callbacks_resume_exactly(case, tmp_path):
    """From before and after the epochs in which layers are thawed; every layer moves, in one group for each call."""
    whole, callbacks = Net(**CASES[case]), callbacks_of(case)
    trainer = fit(tmp_path, whole, callbacks)
    (optimizer,) = trainer.optimizers
    for stop in (1, 2, 3):
        resume(case, tmp_path, stop, whole, callbacks[-1])
    assert [group["name"] for group in optimizer.param_groups] == [*NAMES, *(["adamw-2"] if case == "gradual" else [])]
    fresh = Net(**CASES[case]).state_dict()
    moved = {n: float((p - fresh[n]).abs().max()) for n, p in whole.state_dict().items() if "rotary" not in n}
    assert min(moved.values()) > 1e-4, moved
    group = optimizer.param_groups[2]
    kinds = dict(zip(group["params"], group["kinds"], strict=True))
    backbone = whole.backbone
    if case != "gradual":
        assert kinds[backbone.embedding.weight] == ("sphere" if case == "nameless" else "adamw")
        assert callbacks[-1].seen[2::2] == [[0.02, 0.5, pytest.approx(0.002 * 1.5**epoch)] for epoch in range(3)]
    assert kinds[backbone.attention.w_q] == "sphere"
    if case == "qk_clip":
        assert callbacks[0].clipped > 0


def test_one_run_resumes_exactly_and_says_what_it_thawed(tmp_path):
    whole, callbacks = Net(), callbacks_of("plain")
    fit(tmp_path, whole, callbacks, epochs=3)
    resumed, again = Net(), callbacks_of("plain")
    with pytest.warns(
        UserWarning, match=r"requires_grad: found 7 frozen parameters .*'backbone.*expected them trainable"
    ):
        fit(tmp_path, resumed, again, epochs=3, ckpt_path=str(tmp_path / "1.ckpt"))
    assert all(torch.equal(p, resumed.state_dict()[name]) for name, p in whole.state_dict().items())
    assert again[-1].seen == callbacks[-1].seen[4:]
