"""The TensorBoard page, read back from the event file: all that is no layer's is on it, and every chart shows something."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor

CONFIG = "custom_scalars__config__"


def read(logger):
    """The page, as {category: {chart: tags}}, how often it was written, and the tags of all scalars."""
    events = EventAccumulator(logger.log_dir).Reload()
    written = events.Tensors(CONFIG)
    parsed = layout_pb2.Layout.FromString(written[-1].tensor_proto.string_val[0])
    page = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in parsed.category}
    return page, len(written), set(events.Tags()["scalars"])


def run(toy, tmp_path, prefix="", **options):
    class Full(toy.ValidatedToyModel):
        """Logs all that the Training category shows."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"train/bits_per_byte": loss, "train/tokens_per_second": 1.0})
            return loss

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/bits_per_byte", 1.0)

    logger = TensorBoardLogger(tmp_path, name="run", prefix=prefix, default_hp_metric=False)
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor(), LearningRateMonitor("step")]
    trainer = toy.make_trainer(monitors, logger, **options)
    trainer.fit(toy.make_model(cls=Full), toy.tokens(3), toy.tokens(2))
    return trainer, logger


def matches(regex, tags):
    return {tag for tag in tags if re.match(regex, tag)}  # as TensorBoard's plugin does: anchored at the start only


@pytest.mark.parametrize("prefix", ["", "big.run"])
def test_page_and_tags_cover_each_other(toy, tmp_path, prefix):
    _, logger = run(toy, tmp_path, prefix)
    page, _, tags = read(logger)
    start = f"{prefix}-" if prefix else ""
    tags -= {f"{start}epoch"}
    assert len(tags) > 60
    assert all(tag.startswith(start) for tag in tags)
    shown = set()
    for charts in page.values():
        for title, regexes in charts.items():
            for regex in regexes:
                assert matches(regex, tags), (title, regex)
                shown |= matches(regex, tags)
    assert shown == {tag for tag in tags if not re.search(r"/\d+$", tag)} | {
        f"{start}{group}/{i:02d}"
        for group in ("stability/z/attention", "stability/z/router", "routing/max_violation")
        for i in (0, 1)
    } | {f"{start}stability/rms/{kind}/{i:02d}" for kind in ("attention", "ffn") for i in (0, 1)}


def test_page_is_small(toy, tmp_path):
    _, logger = run(toy, tmp_path)
    page, _, _ = read(logger)
    assert list(page) == ["Training", "Stability", "Routing"]
    assert all(len(charts) <= 12 for charts in page.values())


def test_charts_do_not_bleed(toy, tmp_path):
    _, logger = run(toy, tmp_path)
    page, _, tags = read(logger)
    (by_layer,) = page["Stability"]["Z-value by layer"]
    assert matches(by_layer, tags) == {
        f"stability/z/{kind}/{i:02d}" for kind in ("attention", "router") for i in (0, 1)
    }
    (loss,) = page["Training"]["Loss"]
    losses = {"train/loss", "train/loss_step", "val_loss", "loss", "my/train/loss"}
    assert matches(loss, losses | {"train/aux_loss", "stability/z/lm_logits", "closs", "final/train/loss"}) == losses


def test_charts_without_a_tag_are_left_out(toy, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = toy.make_trainer([LogitsZMonitor(), ActivationOutlierMonitor()], logger)
    tensorboard_page.register(trainer, "Other", {"Nothing": ["nobody/logs/.*"]})
    trainer.fit(toy.make_model(), toy.tokens(1))
    page, _, _ = read(logger)
    assert "Other" not in page
    assert "Bits per byte" not in page["Training"]
    assert {"Z-value", "Kurtosis"} <= set(page["Stability"])


def test_prefix_is_taken_literally(toy, tmp_path):
    _, logger = run(toy, tmp_path, "big.run")
    page, _, _ = read(logger)
    regex = page["Training"]["Tokens per second"][0]
    assert re.match(regex, "big.run-train/tokens_per_second")
    assert not re.match(regex, "big_run-train/tokens_per_second")


def test_others_add_their_charts(toy, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = toy.make_trainer([RouterMonitor()], logger)
    tensorboard_page.register(trainer, "muE", {"Learning rate by role": [r"mue/lr/.*"]})
    tensorboard_page.register(trainer, "muE", {"Learning rate by role": [r"mue/lr/.*", r"mue/wd/.*"]})
    trainer.fit(toy.make_model(), toy.tokens(1))
    tensorboard_page.write(trainer, ["mue/lr/router", "mue/wd/router"])  # as a callback does that has logged them
    logger.experiment.flush()
    page, _, _ = read(logger)
    assert list(page) == ["Training", "muE", "Routing"]
    assert page["muE"] == {"Learning rate by role": ["(mue/lr/.*)$", "(mue/wd/.*)$"]}


def test_second_fit_writes_nothing_new(toy, tmp_path):
    trainer, logger = run(toy, tmp_path)
    written = read(logger)[1]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(toy.make_model(cls=toy.ValidatedToyModel), toy.tokens(2), toy.tokens(2))
    assert trainer.global_step == 5
    assert read(logger)[1] == written


def test_other_loggers_and_other_ranks_get_none(toy, tmp_path, monkeypatch):
    _, memory = toy.fit([RouterMonitor()], n_batches=1)
    assert memory.records  # a logger without pages is left in peace
    logger = TensorBoardLogger(tmp_path)
    trainer = toy.make_trainer([], logger)
    tensorboard_page.register(trainer, "Routing", RouterMonitor.charts)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    tensorboard_page.write(trainer)
    assert logger._experiment is None


def test_registry_forgets_the_trainer(toy):
    trainer = toy.make_trainer([], False)
    tensorboard_page.register(trainer, "Routing", RouterMonitor.charts)
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None


def test_bad_regex_is_refused(toy):
    with pytest.raises(
        ValueError, match=r"charts\['Loss'\]: found the tag 'loss\(', which is not a valid regular expression"
    ):
        tensorboard_page.register(toy.make_trainer([], False), "Training", {"Loss": ["loss("]})


def test_real_values_reach_the_event_file(toy, tmp_path):
    trainer, logger = run(toy, tmp_path)
    events = EventAccumulator(logger.log_dir).Reload()
    points = events.Scalars("stability/z/lm_logits")
    assert [point.step for point in points] == [point.step for point in events.Scalars("train/loss")] == [0, 1, 2]
    last = trainer.callback_metrics["stability/z/lm_logits"]
    assert torch.isclose(last, torch.tensor(points[-1].value))
