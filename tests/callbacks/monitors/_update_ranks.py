"""What test_updates_distributed.py runs under torchrun, on two CPU processes that share out the samples."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from callbacks.conftest import MemoryLogger, make_trainer
from callbacks.monitors.test_updates import Regression, language_model, regression_data
from helpers.sharded_models import ShardedLanguageModel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

from lightning_mue.callbacks import SpectralMonitor, UpdateMonitor

WORLD = 2


def loader(samples, devices):
    """Batches of 4 samples in all; rank r has every so many-th sample from the r-th on."""
    rank = int(os.environ.get("RANK", "0"))
    return DataLoader(Subset(samples, range(rank, len(samples), devices)), batch_size=4 // devices)


def fit(strategy, devices):
    """Trains on batches of 4 samples in all; returns the logged (step, metrics) of the two monitors."""
    # Without the balance loss, which is not linear in the batch.
    optimizer = lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9)  # noqa: E731
    model = language_model(optimizer, cls=ShardedLanguageModel, balance="none")
    tokens = torch.randint(0, 11, (4 * 2 * 3, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"tokens": row[:-1], "targets": row[1:]} for row in tokens]
    logger, calls = MemoryLogger(), []
    options = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    options["use_distributed_sampler"] = False
    trainer = make_trainer([UpdateMonitor(), SpectralMonitor(iterations=30)], logger, **options)
    gather = trainer.strategy.all_gather
    trainer.strategy.all_gather = lambda x, *args, **kw: (calls.append(trainer.global_step), gather(x, *args, **kw))[1]
    trainer.fit(model, loader(rows, devices))
    records = [(step, metrics) for step, metrics in logger.records if "train/loss" not in metrics]
    return {"records": records, "calls": calls, "sharded": isinstance(model.transformer.embedding.weight, DTensor)}


def fit_regression(strategy, devices):
    """Returns the logged noise scales, and the gradients of this rank's samples, one tensor a batch."""
    torch.manual_seed(0)
    model, logger = Regression(), MemoryLogger()
    trainer = make_trainer([UpdateMonitor()], logger, strategy=strategy, devices=devices, use_distributed_sampler=False)
    trainer.fit(model, loader(regression_data(4 * 40), devices))
    tag = "updates/gradient_noise_scale/all"
    return {"noise": list(zip(logger.steps(tag), logger.values(tag), strict=True)), "gradients": model.per_sample}


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    sharded = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo")
    seen = {
        "ddp": fit(DDPStrategy(process_group_backend="gloo"), WORLD),
        "regression": fit_regression(DDPStrategy(process_group_backend="gloo"), WORLD),
        "fsdp2": fit(sharded, WORLD),
    }
    torch.save(seen, folder / f"rank{rank}.pt")
