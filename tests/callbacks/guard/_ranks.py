"""What test_distributed.py runs under torchrun on two CPU processes: every fault on one rank, under DDP and FSDP2."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import torch
from helpers.guarded import Fault, Regression, batches, rank, train, weights
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_mue import MoELanguageModel, StabilityGuard

STRATEGIES = ("ddp", "fsdp2")
CASES = list(itertools.product(("loss", "gradient"), (math.nan, math.inf), (False, True), (1, 2)))


def strategy(name):
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def options(name, clip, accumulate):
    return {
        "strategy": strategy(name),
        "devices": 2,
        "gradient_clip_val": 0.1 if clip else None,
        "accumulate_grad_batches": accumulate,
    }


def fault(where, value, accumulate):
    """On rank 1 alone, in the first micro-batch of the fourth step: the window is spoilt before it is complete."""
    return Fault(where, value, (3 * accumulate,), rank=1)


def window(accumulate):
    return tuple(range(3 * accumulate, 4 * accumulate))


def one(name, where, value, clip, accumulate):
    model, guard = Regression(fault(where, value, accumulate)), StabilityGuard()
    train(model, guard, batches(6 * accumulate), **options(name, clip, accumulate))
    return {"weights": weights(model), "skipped": guard.skipped_steps, "decisions": guard.decisions}


def reference(name, clip, accumulate):
    model = Regression()
    train(model, None, batches(6 * accumulate, without=window(accumulate)), **options(name, clip, accumulate))
    return weights(model)


def rollback(name):
    """A loss that rank 1 alone sees explode."""
    model = Regression(scale={30: 100.0} if rank() else None)
    guard = StabilityGuard(spike="rollback", drift=None, min_history=16, window=32, every_n_steps=10, dirpath=name)
    trainer = train(model, guard, batches(60), **options(name, False, 1))
    path = guard.acting.folder / "skipped_samples.jsonl"
    trainer.strategy.barrier()
    return {
        "weights": weights(model),
        "decisions": guard.decisions,
        "samples": path.read_text() if rank() == 0 else "",
    }


class Experts(MoELanguageModel):
    """Its loss is NaN at one step, on one rank only."""

    bad = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + math.nan if batch_idx == self.bad and rank() == 1 else loss


def experts(bad, without=()):
    """Expert parallel: each rank holds half of the experts, and clips what lies on both."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "context_length": 8, "width": 16, "depth": 1, "n_heads": 2, "n_experts": 4}
    model, guard = Experts(**sizes, balance="bias"), StabilityGuard()
    model.bad = bad
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, 11, (2, 9), generator=generator) for _ in range(6)]
    made = [{"tokens": t[:, :-1], "targets": t[:, 1:]} for i, t in enumerate(tokens) if i not in without]
    parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, process_group_backend="gloo")
    train(
        model,
        guard,
        torch.utils.data.DataLoader(made, batch_size=None),
        strategy=parallel,
        devices=2,
        gradient_clip_val=0.1,
    )
    found = {**weights(model), "bias": model.moe_layers[0].router.balance_bias.clone().double()}
    return {"weights": found, "skipped": guard.skipped_steps}


def main(folder):
    torch.set_num_threads(1)
    report = {}
    for name in STRATEGIES:
        for clip, accumulate in itertools.product((False, True), (1, 2)):
            report[name, "reference", clip, accumulate] = reference(name, clip, accumulate)
        for case in CASES:
            report[(name, *map(str, case))] = one(name, *case)
        report[name, "rollback"] = rollback(name)
    report["experts"], report["experts, never seen"] = experts(3), experts(None, without=(3,))
    model = Regression(fault("gradient", math.nan, 1))
    train(model, None, batches(6), **options("fsdp2", True, 1))
    report["without"] = weights(model)
    torch.save(report, Path(folder) / f"rank{rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
