"""Balance on two ranks, each with half of the batch, against one process with all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning_mue.moe import MoELayer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

class Data(LightningDataModule):
    def train_dataloader(self):
        data = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(*data.roll(-24 if self.trainer.ckpt_path else 0, 1))  # a resumed run begins its loader anew
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // ranks, sampler=sampler)

class Save(Callback):
    # In the middle of the second optimizer step's micro-batches.

    def on_train_batch_end(self, trainer, *args):
        if args[-1] == 2:
            trainer.save_checkpoint("middle.ckpt")

def bias_after_fit(ranks, *callbacks, ckpt_path=None):
    torch.manual_seed(1)
    layer = MoELayer(8, 4, 6, 2, balance="bias", bias_update_rate=0.1, router_init_std=1.0,
                     optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    Trainer(accelerator="cpu", devices=ranks, strategy="auto" if ranks == 1 else "ddp_fork", max_epochs=1,
            accumulate_grad_batches=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            use_distributed_sampler=False, callbacks=list(callbacks)).fit(layer, datamodule=Data(), ckpt_path=ckpt_path)
    return layer.router.balance_bias

torch.set_num_threads(1)
alone, together = bias_after_fit(1), bias_after_fit(2, Save())
assert alone.abs().max() > 0.01, alone
assert torch.equal(alone, together), (alone, together)
saved = torch.load("middle.ckpt", weights_only=False)
(counts,) = saved["lightning_mue_pending_counts"].values()
assert counts.sum() == 16  # one micro-batch of both ranks, two experts a token
assert torch.equal(alone, bias_after_fit(2, ckpt_path="middle.ckpt"))
counts.zero_()  # negative control
torch.save(saved, "without.ckpt")
assert not torch.equal(alone, bias_after_fit(2, ckpt_path="without.ckpt"))
"""


@pytest.mark.slow
def test_counts_are_summed_over_ranks_and_a_resumed_run_is_exact(tmp_path):
    done = subprocess.run(  # a fresh process: forking one whose OpenMP threads run is not safe
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


GLOBAL = """
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_mue.moe import MoELayer

def layer():
    torch.manual_seed(1)
    return MoELayer(8, 4, 6, 2, balance_scope="global", aux_loss_coef=1.0, router_init_std=1.0).double()

x = torch.randn(2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
x[1] += 1  # the halves differ
mask = torch.arange(20).expand(2, 20) < torch.tensor([[20], [5]])  # and so do their lengths

def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = layer()
    mine(x[rank], mask[rank])
    mine.aux_loss.backward()
    result = torch.cat([mine.aux_loss.detach()[None], mine.router.weight.grad.flatten()])
    dist.all_reduce(result)
    if rank == 0:
        torch.save(result / 2, f"{folder}/mean.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank_main, (os.getcwd(),), nprocs=2)  # absolute: file://./store is /store, which other runs use too
    alone = layer()
    alone(x, mask)
    alone.aux_loss.backward()
    expected = torch.cat([alone.aux_loss.detach()[None], alone.router.weight.grad.flatten()])
    torch.testing.assert_close(torch.load("mean.pt"), expected, rtol=1e-12, atol=1e-14)
    local = [layer() for _ in x]  # negative control: each rank's own load gives another loss
    for one, x_rank, mask_rank in zip(local, x, mask):
        one.balance_scope = "local"
        one(x_rank, mask_rank)
    assert abs(sum(one.aux_loss for one in local) / 2 - expected[0]) > 1e-3
"""


@pytest.mark.slow
def test_global_switch_loss_is_that_of_all_tokens(tmp_path):
    (tmp_path / "script.py").write_text(GLOBAL)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
