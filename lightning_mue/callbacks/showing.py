"""Text and pictures for loggers: on the pages of TensorBoard and W&B, and as files in the folders of all that have one."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray

from lightning_mue.namespaces import is_lightning


def folder_of(logger: Logger) -> Path | None:
    """Where a logger keeps the files of its run; None if nowhere."""
    folder = logger.experiment.dir if is_lightning(logger, "WandbLogger") else getattr(logger, "log_dir", None)  # type: ignore[attr-defined]
    return Path(folder) if isinstance(folder, str) else None


def show_text(logger: Logger, name: str, text: str, step: int) -> None:
    """Shows Markdown: in TensorBoard's TEXT tab, in W&B's workspace; nothing with another logger."""
    if is_lightning(logger, "TensorBoardLogger"):
        logger.experiment.add_text(name, text, step)  # type: ignore[attr-defined]
    elif is_lightning(logger, "WandbLogger"):
        import wandb

        page: Any = wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')
        logger.log_metrics({name: page}, step)


def shows_images(logger: Logger) -> bool:
    """Whether `show_image` has a page to show an image on."""
    return is_lightning(logger, "TensorBoardLogger") or is_lightning(logger, "WandbLogger")


def show_image(logger: Logger, name: str, pixels_HWC: NDArray[Any], step: int) -> None:
    """Shows an image, uint8 [H, W, C]: in TensorBoard's IMAGES tab, in W&B's workspace; nothing with another logger."""
    if is_lightning(logger, "TensorBoardLogger"):
        logger.experiment.add_image(name, pixels_HWC, step, dataformats="HWC")  # type: ignore[attr-defined]
    elif is_lightning(logger, "WandbLogger"):
        logger.log_image(name, [pixels_HWC], step)  # type: ignore[attr-defined]
