"""The callbacks under ``pytorch_lightning``, whose classes are not those of ``lightning.pytorch``."""

from __future__ import annotations

import pytest
import torch

from lightning_mue import MuECallback
from lightning_mue.callbacks.mue.run import replicas

pl = pytest.importorskip("pytorch_lightning")


def test_a_fit_and_its_page(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger

    class Net(pl.LightningModule):
        def __init__(self, width=16, batch_size=4, seq_len=8):
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))

        def training_step(self, batch, batch_idx):
            return self.net(batch).mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    logger = TensorBoardLogger(tmp_path)
    mue = MuECallback("complete-p", base={"width": 8, "tokens": 10.0}, verbose=False)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=3, logger=logger, callbacks=[mue], log_every_n_steps=1, **quiet)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.zeros(40, 8), batch_size=4))
    assert mue.plan.axes["tokens"] == 3 * 32
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"custom_scalars__config__" in events
    assert b"parameterization" in events
    assert list(tmp_path.rglob("plan.yaml"))


def test_replicas_of_its_strategies():
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
    assert replicas(pl.Trainer(accelerator="cpu", devices=4, strategy=strategy, logger=False)) == 2
