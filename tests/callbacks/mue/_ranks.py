"""What test_distributed.py runs under torchrun, on two CPU processes: one launch, many fits.

Every rank writes what it saw to ``<folder>/rank<r>.pt``; the test asserts.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.cli.lightning_cli import MuECLI
from lightning_mue.data import TextDataModule
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.parameterizations.reading.sites import read_multipliers

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}
# 3 experts and 257 tokens do not divide by two ranks.
SIZES = {"vocab_size": 257, "context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 3}
STEPS, STOP = 6, 3


class Sharded(MoELanguageModel):
    """Shards itself where there is a mesh, block by block, one of them by columns."""

    def configure_model(self):
        if self.device_mesh is None or isinstance(self.transformer.embedding.weight, DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for i, block in enumerate(self.transformer.blocks):
            by_columns = (lambda p: Shard(p.ndim - 1)) if i else None
            fully_shard(block, mesh=mesh, shard_placement_fn=by_columns)
        fully_shard(self.transformer, mesh=mesh)


def make_optimizer(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def make_model(**kwargs):
    """Every rank starts from other weights: none of them must matter."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    torch.rand(100 * int(os.environ.get("RANK", 0)))
    return Sharded(**{**SIZES, **kwargs}, optimizer=make_optimizer)


def whole(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().cpu()
        for name, p in model.named_parameters()
    }


class Record(Callback):
    """Weights, checkpoint path and number of drawn weights at the hooks of a fit."""

    def __init__(self):
        self.at = {}

    def note(self, hook, trainer, model):
        self.at[hook] = {
            "weights": whole(model),
            "ckpt_path": trainer.ckpt_path is not None,
            "sharded": isinstance(next(model.parameters()), DTensor),
            "optimizers": len(trainer.optimizers),
        }

    def on_fit_start(self, trainer, pl_module):
        self.note("on_fit_start", trainer, pl_module)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.at["on_load_checkpoint after on_fit_start"] = "on_fit_start" in self.at

    def on_train_start(self, trainer, pl_module):
        self.note("on_train_start", trainer, pl_module)


def strategy(name):
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=name == "fsdp2",
        process_group_backend="gloo",
    )


def fit(folder, name, model, max_steps, *, mue=True, base=BASE, ckpt_path=None, save=None, **kwargs):
    record = Record()
    callback = MuECallback(base=base, verbose=False, **kwargs)
    saver = ModelCheckpoint(dirpath=save, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(name),
        max_steps=max_steps,
        accumulate_grad_batches=2,
        callbacks=[*([callback] if mue else []), record, *([saver] if save else [])],
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    data = TextDataModule(folder / "corpus.txt", context_length=16, batch_size=4, cache_dir=folder / "cache")
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return callback, record


def message_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def digest(path):
    """Of a checkpoint's file, or of all files in its folder."""
    files = sorted(p for p in [path, *path.rglob("*")] if p.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def strategies(folder, name):
    """A whole run, the same run resumed in the middle, a second fit, and two refused resumes."""
    model = make_model()
    callback, record = fit(folder, name, model, STEPS, save=folder / name)
    end, multipliers = whole(model), read_multipliers(model)
    ckpt = folder / name / f"step={STOP}.ckpt"
    again = make_model()
    _, resumed = fit(folder, name, again, STEPS, ckpt_path=ckpt)
    _, second = fit(folder, name, again, 1)
    unplanned = folder / f"{name}-unplanned"
    fit(folder, name, make_model(), STOP, save=unplanned, mue=False)
    before = digest(ckpt)
    mismatch = message_of(fit, folder, name, make_model(), STEPS, base={**BASE, "width": 16}, ckpt_path=ckpt)
    torch.load(ckpt / "meta.pt" if ckpt.is_dir() else ckpt, weights_only=True)
    return {
        "plan": callback.plan.to_dict(),
        "first": record.at,
        "end": end,
        "resumed": resumed.at,
        "resumed multipliers": read_multipliers(again) == multipliers,
        # The second fit starts from where the resumed one ended.
        "resumed end": second.at["on_fit_start"]["weights"],
        "second fit": second.at,
        "mismatch": mismatch,
        "unchanged": digest(ckpt) == before,
        "missing": message_of(fit, folder, name, make_model(), STEPS, ckpt_path=unplanned / f"step={STOP}.ckpt"),
    }


def in_float64(folder, name):
    """The weights that a fit in float64 ends with: there, rounding is too small for Adam to turn it into steps."""
    model = make_model().double()
    fit(folder, name, model, STEPS)
    return whole(model)


def run_sizes(folder):
    """Replicas count under FSDP2: 4 x 16 tokens, 2 accumulated batches, 2 ranks, 6 steps."""
    callback, _ = fit(folder, "fsdp2", make_model(), STEPS, base={**BASE, "tokens": 768.0, "batch_tokens": 64.0})
    return dict(callback.plan.axes)


def cli(folder):
    """LightningCLI with FSDP2: the optimizer is made after the parameters are sharded, and trains them."""
    config = folder / f"cli{os.environ['RANK']}.yaml"
    config.write_text(f"""
seed_everything: 0
model:
  class_path: callbacks.mue._ranks.Sharded
  init_args: {{{", ".join(f"{key}: {value}" for key, value in SIZES.items())}}}
data:
  class_path: lightning_mue.data.TextDataModule
  init_args: {{path: {folder}/corpus.txt, context_length: 16, batch_size: 4, cache_dir: {folder}/cache}}
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 3
  limit_val_batches: 0
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {{data_parallel_size: 2, tensor_parallel_size: 1, process_group_backend: gloo}}
  callbacks:
    - class_path: lightning_mue.callbacks.MuECallback
      init_args: {{base: {{width: 32, n_heads: 2, n_experts: 0}}, verbose: false}}
    - class_path: callbacks.mue._ranks.Record
""")
    made = MuECLI(["fit", "--config", str(config)])
    record = next(c for c in made.trainer.callbacks if isinstance(c, Record))
    return {"start": record.at["on_train_start"]["weights"], "end": whole(made.model)}


class Early(Sharded):
    """Makes its optimizer before its parameters are sharded, as LightningCLI's automatic one is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.early = [torch.optim.AdamW(self.parameters(), lr=1e-2)]

    def configure_optimizers(self):
        return self.early[0]


def process_groups(folder):
    """Whether MuECallback gave all ranks' group to the optimizer."""
    given = {}
    for name in ("ddp", "ddp, ignoring", "fsdp2"):
        model, made = make_model(), []
        model.optimizer = lambda params, made=made: made.append(HyperSphereOptimizer(params, lr=0.01)) or made[0]
        if "ignoring" in name:
            model._ddp_params_and_buffers_to_ignore = ["transformer.unembedding.weight"]
        fit(folder, name.partition(",")[0], model, 1, rule="hyperp")
        given[name] = made[0].process_group is torch.distributed.group.WORLD
        assert given[name] or made[0].process_group is None
    return given


def main(folder):
    torch.set_num_threads(1)
    seen = {name: strategies(folder, name) for name in ("ddp", "fsdp2", "fsdp2-full")}
    seen["float64"] = {name: in_float64(folder, name) for name in ("ddp", "fsdp2")}
    seen["early"] = message_of(fit, folder, "fsdp2", Early(**SIZES), 1)
    seen["process groups"] = process_groups(folder)
    seen["run sizes"] = run_sizes(folder)
    seen["cli"] = cli(folder)
    torch.save(seen, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    # The CLI names this module's classes: they must be those of the module, not of __main__.
    from callbacks.mue import _ranks

    _ranks.main(Path(sys.argv[1]))
