"""Runs are read from whatever a logger wrote, and the page shows what they hold."""

from __future__ import annotations

import re

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_mue.cli import main
from lightning_mue.health.departures import Level
from lightning_mue.health.report import read_runs, write_report
from lightning_mue.health.series import find_runs, read_run, series_of


def write_run(logger, n=60, *, bad_at=None, layers=2, every=1):
    """Logs a run as the monitors do."""
    rng = np.random.default_rng(0)
    for step in range(0, n * every, every):
        z = 30 * np.exp(0.03 * rng.standard_normal())
        if bad_at is not None and step >= bad_at:
            z *= 100
        metrics = {f"stability/z/attention/{i:02d}": z + i for i in range(layers)}
        metrics |= {"stability/z/attention_max": z + layers - 1, "train/loss": 2.0 + 3 * np.exp(-step / 9)}
        logger.log_metrics(metrics, step=step)
    logger.log_metrics({"val/loss": 2.1}, step=(n - 1) * every)
    logger.finalize("success")
    return logger.log_dir


LOGGERS = {
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tb", default_hp_metric=False),
    "prefix": lambda folder: TensorBoardLogger(folder, name="pre", prefix="my-run", default_hp_metric=False),
    "csv": lambda folder: CSVLogger(folder, name="csv"),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_logger_is_read_alike(tmp_path, kind):
    folder = write_run(LOGGERS[kind](tmp_path), bad_at=40)
    run = read_run(folder)
    assert set(run) == {f"stability/z/attention{end}" for end in ("/00", "/01", "_max")} | {"train/loss", "val/loss"}
    assert run["train/loss"].steps.tolist() == list(range(60))
    assert run["train/loss"].values[0] == pytest.approx(5.0, rel=1e-6)
    (read,) = read_runs([folder])
    assert read.verdict.level is Level.WATCH
    (symptom,) = read.verdict.symptoms
    assert (symptom.where, symptom.layer, symptom.step) == ("attention", "00", 40)


def test_a_line_that_was_cut_off_and_other_text_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,note\n0,0,1.5,hello\n1,0,nan,\n2,0,,\n3,0,1.2\nx,")
    run = read_run(tmp_path)
    assert set(run) == {"loss"}
    assert run["loss"].steps.tolist() == [0, 1, 3]
    assert np.isnan(run["loss"].values[1])


def test_the_last_of_several_values_at_one_step_counts():
    series = series_of([(3, 1.0), (1, 5.0), (3, 2.0)])
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 3], [5.0, 2.0])


def test_hyperparameters_of_a_run_are_no_run(tmp_path):
    logger = LOGGERS["tensorboard"](tmp_path)
    logger.experiment.add_hparams({"lr": 0.1}, {"final/loss": 1.0}, run_name="hparams")
    folder = write_run(logger)
    assert [str(path) for path in find_runs(tmp_path)] == [folder]


def test_one_page_holds_everything(tmp_path):
    for name, bad_at in (("good", None), ("ill", 40)):
        write_run(TensorBoardLogger(tmp_path, name=name, default_hp_metric=False), bad_at=bad_at)
    page = write_report(read_runs([tmp_path]), tmp_path / "out" / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", ""))  # nothing is loaded from elsewhere
    assert page.count("<svg") == page.count("</svg>") >= 4
    assert "good/version_0" in page
    assert "ill/version_0" in page
    assert "attention, layer 00" in page
    assert page.index("watch</b>") > 0
    assert page.index("healthy</b>") > 0
    assert "By layer over time" in page
    assert "val/loss 2.1" in page


def test_names_are_escaped(tmp_path):
    logger = CSVLogger(tmp_path, name="<script>alert(1)</script>")
    write_run(logger, n=3)
    page = write_report(read_runs([tmp_path]), tmp_path / "page.html").read_text()
    assert "<script>" not in page


def test_the_command(tmp_path, capsys):
    folder = write_run(LOGGERS["csv"](tmp_path), bad_at=40)
    main(["report", folder, "--output", str(tmp_path / "r.html")])
    out = capsys.readouterr().out
    assert out.startswith("watch  csv/version_0: First: Z-value of attention, layer 00")
    assert (tmp_path / "r.html").exists()
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], r"RUN_DIR: found nowhere, which is no folder, expected a folder with TensorBoard event files"),
        (["."], r"RUN_DIR: found \. with neither"),
        (
            ["csv", "--loss", "objective"],
            r"--loss: found 'objective', expected a metric of the run. It logged .*train/loss",
        ),
        (["csv", "--output", "."], r"--output: found the folder \.,"),
    ],
)
def test_bad_arguments_get_one_paragraph(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    if args[0] == "csv":
        write_run(LOGGERS["csv"](tmp_path), n=3)
    with pytest.raises(SystemExit) as stopped:
        main(["report", *args])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_layers_that_have_names_share_a_panel(tmp_path):
    """Several matrices of one layer are told apart by their modules' names; each in a panel of its own could not be read."""
    logger = CSVLogger(tmp_path, name="named")
    names = [f"model.layers.{i}.{part}" for i in (0, 10, 2) for part in ("q_proj", "k_proj")]
    for step in range(4):
        tags = [f"updates/update_ratio/{role}/{name}" for role in ("hidden", "down") for name in names]
        logger.log_metrics({tag: 1.0 + 0.01 * step + i for i, tag in enumerate(tags)}, step=step)
    logger.save()
    page = write_report(read_runs([logger.log_dir]), tmp_path / "page.html").read_text()
    panels, maps = page.split("By layer over time")
    assert panels.count("<svg") == maps.count("<svg") == 2  # one a role
    assert re.findall(r"\d+\.[qk]_proj", maps)[:6] == [
        f"{i}.{part}" for i in (0, 2, 10) for part in ("k_proj", "q_proj")
    ]
    assert "model.layers.0" not in page
