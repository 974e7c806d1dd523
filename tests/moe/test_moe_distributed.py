"""LossFreeBalance on two ranks, each with half of the batch, against one process with all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning_mue.moe import MoELayer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

class Data(LightningDataModule):
    def train_dataloader(self):
        data = TensorDataset(*torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)))
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // ranks, sampler=sampler)

def bias_after_fit(ranks):
    torch.manual_seed(1)
    layer = MoELayer(8, 4, 6, 2, balance="bias", bias_update_rate=0.1, router_init_std=1.0,
                     optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    Trainer(accelerator="cpu", devices=ranks, strategy="auto" if ranks == 1 else "ddp_fork", max_epochs=1,
            accumulate_grad_batches=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            use_distributed_sampler=False).fit(layer, datamodule=Data())
    return layer.router.balance_bias

torch.set_num_threads(1)
alone, together = bias_after_fit(1), bias_after_fit(2)
assert alone.abs().max() > 0.01, alone
assert torch.equal(alone, together), (alone, together)
"""


@pytest.mark.slow
def test_counts_are_summed_over_ranks(tmp_path):
    done = subprocess.run(  # a fresh process: forking one whose OpenMP threads run is not safe
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
