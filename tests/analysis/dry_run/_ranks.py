"""Trainings on real ranks for the dry run to be compared with: `_ranks.py part rank world_size folder` runs `PARTS`."""

from __future__ import annotations

import os
import sys

import torch
from helpers.processes import main
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.analysis.dry_run.recording import Collectives
from lightning_mue.optim import HyperSphereOptimizer, step
from lightning_mue.optim.distributed import update
from lightning_mue.sharded import local

SEQUENCES, LENGTH, VOCABULARY = 3, 8, 67  # a vocabulary that four ranks cannot divide evenly
ALL = {"n_experts": 4, "top_k": 4}  # so that every rank gets equally many tokens
#: Name -> data-parallel size (0: DDP), tensor-parallel size, arguments of the model, of the trainer, of the optimizer.
CASES = {
    "fsdp": (4, 1, {"n_experts": 0}, {"gradient_clip_val": 1.0}, None),
    "experts": (1, 4, {**ALL, "balance": "bias"}, {"gradient_clip_val": 1.0}, None),
    "both": (2, 2, {**ALL, "shared_width": 6}, {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}, {}),
    "rows": (2, 2, {"n_experts": 4, "balance": "bias", "tie_embeddings": True}, {}, {"normalize": "neuron"}),
    "global": (2, 2, {**ALL, "balance": "switch", "balance_scope": "global"}, {}, {"state_dtype": "bfloat16"}),
    "ddp": (0, 1, {**ALL, "tie_embeddings": True}, {"gradient_clip_val": 0.5}, {}),
}


def optimizer_of(options):
    if options is None:
        return lambda params: torch.optim.AdamW(params, lr=1e-3)
    return lambda params: HyperSphereOptimizer(params, lr=1e-2, compute_dtype="bfloat16", **options)


def model_of(case):
    _, _, sizes, _, options = CASES[case]
    torch.manual_seed(0)
    return MoELanguageModel(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        width=24,
        depth=3,
        n_heads=2,
        expert_width=10,
        optimizer=optimizer_of(options),
        **sizes,
    )


class _Products:
    """Counts the FLOPs of Newton-Schulz: `m n^2` multiplications for XX^T and for its product with X, `n^3` for its square."""

    def __init__(self):
        self.flops, self.chunk = 0, step.orthogonalize_chunk
        step.orthogonalize_chunk = update.orthogonalize_chunk = self

    def __call__(self, u_Boi, schedule, *args, **kwargs):
        n, m = sorted(u_Boi.shape[1:])
        self.flops += 2 * len(u_Boi) * len(schedule.steps) * (2 * m * n**2 + n**3)
        return self.chunk(u_Boi, schedule, *args, **kwargs)

    def stop(self):
        step.orthogonalize_chunk = update.orthogonalize_chunk = self.chunk


class _Watch(Callback):
    """Records the second optimizer step: the first one sends more, to create state."""

    def __init__(self, micro_batches):
        self.micro_batches, self.rows, self.seen, self.products = micro_batches, [], None, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.micro_batches:
            self.products, self.seen = _Products(), Collectives()
            self.seen.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2 * self.micro_batches - 1:
            self.seen.__exit__(None, None, None)
            self.rows = self.seen.rows("step")
            self.products.stop()


def tokens_of(batch):
    tokens = torch.stack([each for (each,) in batch])
    return {"tokens": tokens, "targets": tokens.roll(-1, 1)}


def train(case, rank):
    data, experts, _, options, _ = CASES[case]
    micro_batches = options.get("accumulate_grad_batches", 1)
    watch, model = _Watch(micro_batches), model_of(case)
    os.environ.update(WORLD_SIZE="4", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="4")
    os.environ.update(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", GROUP_RANK="0")
    parallel = {"data_parallel_size": data, "tensor_parallel_size": experts}
    strategy = ModelParallelStrategy(**parallel, process_group_backend="gloo") if data else DDPStrategy()
    trainer = Trainer(
        accelerator="cpu",
        devices=4,
        strategy=strategy,
        max_steps=2,
        callbacks=[watch, *([] if data else [MuECallback(rule="sp")])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    tokens = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    trainer.fit(model, DataLoader(TensorDataset(tokens), batch_size=SEQUENCES, collate_fn=tokens_of))
    states = [each for state in trainer.optimizers[0].state.values() for each in state.values()]
    held = {
        "weights": model.parameters(),
        "optimizer state": filter(torch.is_tensor, states),
        "buffers": model.buffers(),
    }
    return {
        "traffic": {row.collective: (row.number, row.sent) for row in watch.rows},
        "flops": watch.products.flops,
        "held": {kind: sum(local(each).nbytes for each in tensors) for kind, tensors in held.items()},
    }


PARTS = {"four": lambda rank, folder: {case: train(case, rank) for case in CASES}}

if __name__ == "__main__":
    main(PARTS, *sys.argv[1:])
