"""HealthMonitor: it hears the monitors and the user's losses, tells once, writes the card, and survives a resume."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

from lightning_mue.callbacks import (
    ActivationOutlierMonitor,
    HealthMonitor,
    LogitsZMonitor,
    UpdateMonitor,
    metric_stream,
)
from lightning_mue.health.departures import Level
from lightning_mue.health.report import read_runs
from lightning_mue.health.series import find_runs


def text_of(logger, tag="health/text_summary"):
    events = EventAccumulator(logger.log_dir).Reload()
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)]


def run(toy, tmp_path, *, spoil_at=None, steps=32, health=None, loggers=None, name="train/loss"):
    health = HealthMonitor(heat_maps=False) if health is None else health

    class Spoilt(toy.ToyModel):
        """A model whose loss is multiplied from one step on."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            factor = 100.0 if spoil_at is not None and self.global_step >= spoil_at else 1.0
            self.log(name, loss.detach() * factor)
            return loss

    loggers = [TensorBoardLogger(tmp_path, name="run")] if loggers is None else loggers
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor()]  # the toy's experts get nothing in many of its batches
    trainer = toy.make_trainer([health, *monitors], loggers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(toy.make_model(cls=Spoilt), toy.tokens(steps))
    told = [str(w.message) for w in caught if str(w.message).startswith("HealthMonitor")]
    return trainer, health, told


def test_a_healthy_run(toy, tmp_path):
    trainer, health, told = run(toy, tmp_path)
    assert health.verdict.level is Level.HEALTHY
    assert health.verdict.samples == 32
    assert told == []
    cards = text_of(trainer.logger)
    assert [card.splitlines()[0] for card in cards] == ["# NOT KNOWN YET", "# HEALTHY", "# HEALTHY"]
    assert ["to step 0," in cards[0], "to step 19." in cards[1], "to step 31." in cards[2]] == [True] * 3


def test_what_a_monitor_tells_counts_once(toy, tmp_path):
    health = HealthMonitor(heat_maps=False)
    trainer = toy.make_trainer([UpdateMonitor(), health], [TensorBoardLogger(tmp_path, name="run")])
    trainer.fit(toy.make_model(), toy.tokens(4))
    assert health.state_dict()["judge"]["samples"]["updates/gradient_norm/all"] == 4


@pytest.mark.parametrize(("accumulated", "every", "steps"), [(1, 1, 8), (4, 1, 2), (2, 2, 2), (3, 5, 0)])
def test_a_step_counts_once_however_many_batches_it_has(toy, tmp_path, accumulated, every, steps):
    health = HealthMonitor(heat_maps=False)
    options = {"accumulate_grad_batches": accumulated, "log_every_n_steps": every}
    trainer = toy.make_trainer([health], [TensorBoardLogger(tmp_path, name="run")], **options)
    trainer.fit(toy.make_model(), toy.tokens(8))
    assert health.state_dict()["judge"]["samples"].get("train/loss", 0) == steps


def test_a_fault_is_told_once_and_stands_on_the_card(toy, tmp_path):
    trainer, health, told = run(toy, tmp_path, spoil_at=26)
    assert health.verdict.level is Level.WATCH
    assert len(told) == 1
    assert re.search(r"loss of train/loss was .* at step 2\d, expected about .*: training goes backwards", told[0])
    assert text_of(trainer.logger)[-1].startswith("# WATCH")
    folder = trainer.logger.log_dir
    with open(f"{folder}/health.md", encoding="utf-8") as card:
        assert card.read() == text_of(trainer.logger)[-1]


def test_a_loss_of_another_name(toy, tmp_path):
    _, health, _ = run(toy, tmp_path / "a", spoil_at=26, name="objective")
    assert health.verdict.level is Level.HEALTHY
    _, health, _ = run(
        toy, tmp_path / "b", spoil_at=26, name="objective", health=HealthMonitor(["objective"], heat_maps=False)
    )
    assert health.verdict.level is Level.WATCH


def test_the_report_says_what_the_monitor_said(toy, tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    _, health, _ = run(toy, tmp_path, spoil_at=26, loggers=loggers)
    assert len(find_runs(tmp_path)) == 2
    for read in read_runs([tmp_path]):
        assert read.verdict.level is health.verdict.level
        assert [(f.indicator.name, f.step) for f in read.verdict.symptoms] == [
            (f.indicator.name, f.step) for f in health.verdict.symptoms
        ]


def test_pictures(toy, tmp_path):
    trainer, _, _ = run(toy, tmp_path, health=HealthMonitor())
    assert "layers/stability/z/attention" in EventAccumulator(trainer.logger.log_dir).Reload().Tags()["images"]
    run(toy, tmp_path / "none")
    assert EventAccumulator(str(tmp_path / "none" / "run" / "version_0")).Reload().Tags()["images"] == []


def test_the_hyperparameters_stand_beside_the_last_losses(toy, tmp_path):
    """Lightning's own column, hp_metric = -1, would hide them: TensorBoard takes the columns that come first."""
    logger = TensorBoardLogger(tmp_path, name="run", prefix="my")
    trainer, _, _ = run(toy, tmp_path, loggers=[logger])
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    told = events.PluginTagToContent("hparams")
    columns = {info.name.tag for info in parse_experiment_plugin_data(told["_hparams_/experiment"]).metric_infos}
    begun = parse_session_start_info_plugin_data(told["_hparams_/session_start_info"]).hparams
    assert "hp_metric" not in columns
    assert "my-train/loss" in columns <= set(events.Tags()["scalars"])
    assert begun["MuE/lr"].number_value == trainer.optimizers[0].param_groups[0]["lr"]


def test_hyperparameters_of_a_run_that_breaks_stand_there_too(toy, tmp_path):
    class Broken(toy.ToyModel):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken")

    logger = TensorBoardLogger(tmp_path, name="run")
    with pytest.raises(RuntimeError, match="broken"):
        toy.make_trainer([HealthMonitor()], [logger]).fit(toy.make_model(cls=Broken), toy.tokens(2))
    told = EventAccumulator(logger.log_dir).Reload().PluginTagToContent("hparams")
    assert set(told) == {f"_hparams_/{of}" for of in ("experiment", "session_start_info", "session_end_info")}


@pytest.mark.slow
def test_wandb_offline_has_the_card_the_pictures_and_the_files(toy, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run(toy, tmp_path, loggers=[logger], health=HealthMonitor())
    files, config = Path(logger.experiment.dir), dict(logger.experiment.config)
    assert (files / "health.md").read_text(encoding="utf-8").startswith("# HEALTHY")
    media = {path.suffix for path in (files / "media").rglob("*.*")}
    assert media == {".html", ".png"}
    pages = [path.read_text(encoding="utf-8") for path in (files / "media").rglob("*.html")]
    assert any("# HEALTHY" in page for page in pages)
    assert any("# NOT KNOWN YET" in page for page in pages)
    assert config["MuE/lr"] > 0
    logger.experiment.finish()


def test_no_logger_and_unwritable_folder(toy, tmp_path):
    with pytest.warns(match="Trainer.logger: found no logger, expected one, without which monitors measure nothing"):
        toy.make_trainer([health := HealthMonitor(), LogitsZMonitor()], False).fit(toy.make_model(), toy.tokens(2))
    assert (health.verdict.samples, health.verdict.indicators) == (2, 1)  # the losses are known without a logger
    blocked = CSVLogger(tmp_path, name="blocked")
    (tmp_path / "blocked").mkdir()
    trainer, _, _ = run(toy, tmp_path, loggers=[blocked])
    assert trainer.state.finished


def test_without_matplotlib_there_are_no_pictures_and_a_warning(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mue.callbacks.health.find_spec", lambda name: None)
    trainer = toy.make_trainer([health := HealthMonitor()], [TensorBoardLogger(tmp_path, name="run")])
    with pytest.warns(match="HealthMonitor.heat_maps: found no matplotlib"):
        trainer.fit(toy.make_model(), toy.tokens(2))
    assert trainer.state.finished
    assert not health.heat_maps


def test_a_resumed_judge_goes_on(toy, tmp_path):
    _, health, _ = run(toy, tmp_path, spoil_at=26)
    other = HealthMonitor()
    state = health.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(other.verdict) == str(health.verdict)


def test_it_listens_no_more_after_the_fit(toy, tmp_path):
    trainer, health, _ = run(toy, tmp_path)
    samples = health.verdict.samples
    metric_stream.tell(trainer, 99, {"stability/z/lm_logits": 1.0})
    assert health.verdict.samples == samples


@pytest.mark.parametrize("losses", ["loss", [1]])
def test_bad_losses_are_refused(losses):
    with pytest.raises(TypeError, match="losses"):
        HealthMonitor(losses)


def test_healthy_runs_show_what_the_own_history_cannot(toy, tmp_path):
    run(toy, tmp_path, loggers=[CSVLogger(tmp_path, name="base", version=0)])
    own = CSVLogger(tmp_path, name="base", version="own")  # beside them, and none of them
    (tmp_path / "base" / "own").mkdir()
    (tmp_path / "base" / "own" / "metrics.csv").write_text("step,train/loss\n0,1e9\n")
    health = HealthMonitor(heat_maps=False, reference=[tmp_path / "base"])
    _, _, told = run(toy, tmp_path, spoil_at=0, health=health, loggers=[own])
    assert [symptom.indicator.name for symptom in health.verdict.symptoms] == ["loss"]
    assert "as in the reference" in told[0]
    _, alone, _ = run(toy, tmp_path, spoil_at=0, loggers=False)
    assert alone.verdict.level is Level.HEALTHY  # a loss that was always bad has no better past


def test_a_reference_without_a_run_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match=r"reference: found .*nothing, which is no folder"):
        run(toy, tmp_path, health=HealthMonitor(reference=[tmp_path / "nothing"]))
    with pytest.raises(TypeError, match="reference"):
        HealthMonitor(reference="logs")
