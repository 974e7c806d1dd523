"""The summary that ``lightning-mue fit`` prints at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.panel import Panel
from rich.text import Text

from lightning_mue.callbacks import MuECallback
from lightning_mue.console import wide_console
from lightning_mue.data.base import LanguageDataModule
from lightning_mue.sharded import is_sharded


def summarize(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Prints the parameterization, the results, the paths of checkpoint and logs, and a text sample after fit."""
    console = wide_console()
    callback = next((c for c in trainer.callbacks if isinstance(c, MuECallback)), None)  # type: ignore[attr-defined]
    if callback is not None and callback.plan is not None:
        console.print(callback.plan)
    console.print(Panel(Text("\n".join(_results(trainer))), title="lightning-mue", title_align="left"))
    if sample := _sample(model, datamodule):
        prompt, continuation = sample
        console.print(Panel(Text.assemble((prompt, "dim"), continuation), title="text sample", title_align="left"))


def _results(trainer: Trainer) -> Iterator[str]:
    """Lines with the final metrics and where to find checkpoint and logs."""
    for name in ("val/bits_per_byte", "val/loss"):
        if name in trainer.callback_metrics:
            yield f"{name}: {float(trainer.callback_metrics[name]):.4f}"
    yield f"steps: {trainer.global_step}"
    if best := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        yield f"checkpoint: {_relative(best)}"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield f"logs: {_relative(logger.log_dir)}"
            yield f"to view them: tensorboard --logdir {_relative(logger.root_dir)}"
            yield "  (tab TEXT: is the run healthy, and the parameterization; tab CUSTOM SCALARS: the charts)"


def _sample(model: LightningModule, datamodule: LightningDataModule | None) -> tuple[str, str] | None:
    """(prompt from the validation data, the model's continuation), for byte-level models that can generate."""
    generate = getattr(model, "generate", None)
    if any(is_sharded(p) for p in model.parameters()):
        return None  # the other ranks do not take part, so their shards are not available
    of_bytes = getattr(model, "vocab_size", None) == 256
    if not isinstance(datamodule, LanguageDataModule) or not callable(generate) or not of_bytes:
        return None
    batch = next(iter(datamodule.val_dataloader()), None)
    if batch is None:
        return None
    prompt = batch["tokens"][0, :96].to(model.device)
    tokens = generate(prompt, 240, temperature=0.7, seed=0).tolist()
    return _decode(tokens[: len(prompt)]), _decode(tokens[len(prompt) :])


def _decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def _relative(path: str | Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
