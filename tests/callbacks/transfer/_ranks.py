"""What test_transfer_distributed.py runs under torchrun, on two CPU processes that see the same batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from helpers.sharded_models import ShardedLanguageModel
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_mue.callbacks import TransferMonitor

STEPS = 5


def fit(path, strategy, devices):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "context_length": 12, "width": 16, "n_heads": 2, "depth": 2, "n_experts": 3}
    model = ShardedLanguageModel(**sizes, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    data = torch.randint(0, 17, (4 * STEPS, 13), generator=torch.Generator().manual_seed(0))
    # Half of the steps are sampled.
    monitor, calls = TransferMonitor(record=path, points=2), []
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    gather = trainer.strategy.all_gather
    trainer.strategy.all_gather = lambda *args, **kwargs: (calls.append(trainer.global_step), gather(*args, **kwargs))[
        1
    ]
    trainer.fit(model, DataLoader([{"tokens": row[:-1], "targets": row[1:]} for row in data], batch_size=4))
    return calls, isinstance(model.transformer.embedding.weight, DTensor)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    seen = {
        "ddp": fit(folder / "ddp.json", DDPStrategy(process_group_backend="gloo"), 2),
        "fsdp2": fit(folder / "fsdp2.json", sharded, 2),
    }
    torch.save(seen, folder / f"rank{rank}.pt")
