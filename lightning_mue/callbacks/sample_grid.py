"""SampleGrid: what a generator of images makes, as a picture and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.steps import steps_done
from lightning_mue.checks import require_positive, type_error
from lightning_mue.files import whole_file
from lightning_mue.namespaces import is_lightning

_ACCURACY, _REAL = "val/sample_accuracy", "val/real_accuracy"


class SampleGrid(Callback):
    """Samples every class after a validation, from the same noise each time.

    - A grid with one row a class: in TensorBoard's IMAGES tab as ``samples``, for other loggers a file ``samples-<step>.png`` in
      their folder. Without a logger that has a folder there is no grid.
    - ``val/sample_accuracy``: how many of the samples the data module's ``classify(images) -> labels`` takes for their class, and
      beside it ``val/real_accuracy``, the same of real images that neither model nor classifier was trained on
      (``real_accuracy()``). Only where the data module has these methods, as `DigitsDataModule` does.

    All ranks sample alike, so sharded models work. Nothing is sampled in the sanity check.

    Args:
        every_n_validations: Validations from one grid to the next; the first is drawn after as many.
        per_class: Samples of each class.
        columns: Those of them that the grid shows.
        steps: Steps of the sampler.
        method: "euler" or "heun".
        guidance: Classifier-free guidance.

    Raises:
        TypeError: If an argument has the wrong type; when fitting begins, if the module has no ``sample`` and ``n_classes``.
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        *,
        per_class: int = 20,
        columns: int = 10,
        steps: int = 20,
        method: str = "heun",
        guidance: float = 1.0,
    ) -> None:
        require_positive(every_n_validations=every_n_validations, per_class=per_class, columns=columns, steps=steps)
        self.every_n_validations, self.per_class, self.columns = every_n_validations, per_class, columns
        self.options: dict[str, Any] = {"steps": steps, "method": method, "guidance": guidance}
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module generates images, and registers the chart."""
        if not callable(getattr(pl_module, "sample", None)) or not hasattr(pl_module, "n_classes"):
            expected = "a module with sample(labels, ...) -> images and n_classes, as FlowMatchingTransformer"
            raise type_error(
                "SampleGrid", found=type(pl_module).__name__, expected=expected, do="Leave the callback out."
            )
        tensorboard_page.register(trainer, "Training", {"Accuracy of samples": [_ACCURACY, _REAL]})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples, when it is time."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        labels = torch.arange(int(pl_module.n_classes)).repeat_interleave(self.per_class)  # type: ignore[arg-type]
        images: Tensor = pl_module.sample(labels, **self.options).cpu()  # type: ignore[operator]
        self._log_accuracy(trainer, pl_module, images, labels)
        if trainer.is_global_zero:
            rows = images.unflatten(0, (-1, self.per_class))[:, : self.columns]
            _show(trainer, as_grid(rows))

    def _log_accuracy(self, trainer: Trainer, pl_module: LightningModule, images: Tensor, labels: Tensor) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not callable(getattr(data, "classify", None)):
            return
        pl_module.log(_ACCURACY, (data.classify(images) == labels).float().mean(), prog_bar=True, sync_dist=True)
        if callable(getattr(data, "real_accuracy", None)):
            pl_module.log(_REAL, float(data.real_accuracy()), sync_dist=True)

    def state_dict(self) -> dict[str, int]:
        """How many validations there were, so that a resumed run samples at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from a checkpoint."""
        self._validations = state_dict["validations"]


def as_grid(images: Tensor) -> Tensor:
    """Images [rows, columns, C, R, R] in [-1, 1] as one of 4 pixels for each, uint8 [C, H, W], with lines between them."""
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    framed = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=128)
    return framed.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _show(trainer: Trainer, grid: Tensor) -> None:
    """Gives the grid to every logger: to TensorBoard as an image, to others as a file in their folder."""
    for logger in trainer.loggers:
        if is_lightning(logger, "TensorBoardLogger"):
            logger.experiment.add_image("samples", grid, steps_done(trainer))  # type: ignore[attr-defined]
        elif (folder := logger.log_dir or logger.save_dir) is not None:
            _write_png(Path(folder) / f"samples-{steps_done(trainer)}.png", grid)


def _write_png(path: Path, grid: Tensor) -> None:
    from matplotlib.image import imsave

    shown = grid.expand(3, -1, -1) if grid.shape[0] == 1 else grid[:3]
    with whole_file(path) as part:
        imsave(part, shown.permute(1, 2, 0).contiguous().numpy(), format="png")
