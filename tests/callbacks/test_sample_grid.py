"""SampleGrid: the picture pixel by pixel, where it goes, when it is drawn, and the accuracy beside it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_mue import SampleGrid
from lightning_mue.callbacks.sample_grid import as_grid
from lightning_mue.data import DigitsDataModule


class Generator(LightningModule):
    """Samples images whose value is its class: class 0 is -1, class 9 is +1."""

    n_classes = 10

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(())), []

    def sample(self, labels, **options):
        self.calls.append(options)
        return (labels / 4.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    def training_step(self, batch, batch_idx):
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ImagesOfOne(DigitsDataModule):
    """Takes every image for a 3 without a look."""

    def classify(self, images):
        return torch.full((len(images),), 3)


def fit(grid, logger=False, data=None, model=None, **options):
    model = model or Generator()
    defaults = {"max_epochs": 4, "limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[grid], **defaults, **quiet, **options)
    trainer.fit(model, datamodule=data or ImagesOfOne(8))
    return model, trainer


def test_grid_has_each_image_at_its_place():
    images = torch.arange(12.0).view(2, 3, 2, 1, 1).expand(2, 3, 2, 2, 2) / 5.5 - 1
    grid = as_grid(images)
    assert (grid.shape, grid.dtype) == ((2, 20, 30), torch.uint8)
    for row in range(2):
        for column in range(3):
            cell = grid[:, row * 10 + 1 : row * 10 + 9, column * 10 + 1 : column * 10 + 9]
            expected = (images[row, column, :, :1, :1] + 1) * 127.5
            assert torch.equal(cell, expected.round().to(torch.uint8).expand(2, 8, 8))
    assert bool((grid[:, [0, 9, 10, 19]] == 128).all())
    assert int(as_grid(torch.full((1, 1, 1, 2, 2), 7.0))[0, 1, 1]) == 255, "beyond the range is its end"


def test_tensorboard_has_the_grid_and_the_figures(tmp_path):
    model, trainer = fit(SampleGrid(2, per_class=3, columns=2, steps=7), TensorBoardLogger(tmp_path))
    assert model.calls == [{"steps": 7, "method": "heun", "guidance": 1.0}] * 2, "every second of four validations"
    events = EventAccumulator(trainer.logger.log_dir, {"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert events.Images("samples")[0].width == 2 * (8 * 4 + 2)
    assert events.Images("samples")[0].height == 10 * (8 * 4 + 2)
    assert float(trainer.callback_metrics["val/sample_accuracy"]) == pytest.approx(0.1)
    assert 0.05 < float(trainer.callback_metrics["val/real_accuracy"]) < 0.2


def test_other_loggers_have_a_file(tmp_path):
    _, trainer = fit(SampleGrid(4, per_class=1), CSVLogger(tmp_path))
    (path,) = tmp_path.rglob("samples-*.png")
    assert str(path).startswith(trainer.logger.log_dir)
    assert path.name == "samples-8.png"
    pixels = imread(path)
    assert pixels.shape[:2] == (340, 34)
    assert pixels[17, 17, 0] == pytest.approx(0.0)
    assert pixels[9 * 34 + 17, 17, 0] == pytest.approx(1.0)


def test_without_a_logger_only_the_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, trainer = fit(SampleGrid(), logger=False)
    assert float(trainer.callback_metrics["val/sample_accuracy"]) == pytest.approx(0.1)
    assert list(tmp_path.rglob("*.png")) == []


def test_data_without_a_classifier_has_no_figures(tmp_path):
    model = Generator()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), max_epochs=1, callbacks=[SampleGrid()], **quiet)
    loader = DataLoader(torch.zeros(2, 1))
    trainer.fit(model, loader, loader)
    assert "val/sample_accuracy" not in trainer.callback_metrics
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_a_resumed_run_draws_at_the_same_validations():
    grid, resumed = SampleGrid(3), SampleGrid(3)
    fit(grid)
    resumed.load_state_dict(grid.state_dict())
    model, _ = fit(resumed)  # validations 5 to 8, of which 6 is drawn
    assert len(model.calls) == 1


def test_a_module_that_does_not_generate_is_refused():
    model = Generator()
    model.sample = None
    with pytest.raises(TypeError, match=r"SampleGrid: found Generator, expected a module with sample"):
        fit(SampleGrid(), model=model)


@pytest.mark.parametrize("name", ["every_n_validations", "per_class", "columns", "steps"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: found 0"):
        SampleGrid(**{name: 0})
