"""``lightning-mue certify`` and ``forecast`` on tables of trials: exit statuses, files, and what is refused with a remedy."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import yaml
from helpers.trials import GRID, WIDTHS, sweep

from lightning_mue.analysis.certificate import Certificate
from lightning_mue.analysis.forecast.record import config_hash
from lightning_mue.analysis.trials import write_trials

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"
LR = "model.init_args.optimizer.init_args.lr"
LADDER = {ratio: {"width": 8 * ratio} for ratio in (1, 2, 4, 8)}


def law(ratio):
    return 3 * ratio**-0.3 + 1.2


def ladder(path, unit=1e6, **more):
    """Four sizes whose largest takes 8 times `unit` FLOPs."""
    options = {"seeds": 2, "noise": 0.001, "rates": GRID[2:5], "loss": law} | more
    trials = sweep(LADDER, compute=lambda r: unit * r, tokens=lambda r: 768.0, draw=1, **options)
    write_trials(path, trials)
    return path


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(Certificate, "write", lambda self, folder: Path(folder) / "certificate.html")


def test_certify_says_by_its_status_whether_the_rate_holds(run, tmp_path, no_pictures):
    write_trials(tmp_path / "a" / "trials.csv", sweep(WIDTHS, noise=0.002) + sweep(WIDTHS, rule="sp", drift=-0.5))
    status, out = run("certify", tmp_path / "a")
    assert status == 1
    for expected in (
        "transfers complete-mue, width:",
        "drifts sp, width: at width=512",
        f"{tmp_path}/a/certificate.html",
    ):
        assert expected in out
    assert run("certify", tmp_path / "a" / "trials.csv", "--rule", "complete-mue")[0] == 0
    assert run("certify", tmp_path / "a", "--rule", "complete-mue", "--penalty", "1e-9")[0] == 1
    status, out = run("certify", tmp_path / "a", "--rule", "mup")
    assert (status, "--rule: found 'mup', expected one of 'complete-mue', 'sp'" in out) == (2, True)


def test_certify_puts_sweeps_of_one_rule_side_by_side(run, tmp_path, no_pictures):
    for name, drift in (("ours", 0), ("theirs", -1)):
        write_trials(tmp_path / name / "trials.csv", sweep({1: WIDTHS[1], 2: WIDTHS[2]}, drift=drift))
    out = run("certify", tmp_path / "ours", tmp_path / "theirs")[1]
    assert "transfers complete-mue (ours), width" in out
    assert "drifts complete-mue (theirs), width" in out
    status, out = run("certify", tmp_path / "nowhere")
    assert (status, "without a table, expected a folder with trials.csv" in out) == (2, True)
    assert "--base: found 'width'" in run("certify", tmp_path / "ours", "--base", "width")[1]


@pytest.mark.slow  # draws
def test_certify_writes_next_to_the_trials(run, tmp_path):
    write_trials(tmp_path / "trials.csv", sweep(WIDTHS, noise=0.002))
    assert run("certify", tmp_path)[0] == 0
    assert {p.suffix for p in tmp_path.glob("certificate.*")} == {".html", ".png", ".csv", ".json"}


def test_a_forecast_is_written_once_with_its_sources(run, tmp_path):
    table, output = ladder(tmp_path / "trials.csv"), tmp_path / "forecast.json"
    status, out = run("forecast", table, "--compute", 1.6e7, "--output", output)
    assert status == 0, out
    record = json.loads(output.read_text())
    assert record["loss"]["low"] < law(16) < record["loss"]["high"]
    assert record["rate"]["value"] == pytest.approx(0.016, rel=0.1)
    assert len(record["trials"]["tables"][str(table)]) == 64
    assert set(record["versions"]) >= {"torch", "lightning", "scipy", "python"}
    before = output.read_text()
    status, out = run("forecast", table, "--compute", 1.6e7, "--output", output)
    assert (status, "which exists, expected a new file" in out, output.read_text()) == (2, True, before)


def test_forecast_refuses_with_remedies(run, tmp_path):
    table, output = ladder(tmp_path / "trials.csv", seeds=3), ("--output", tmp_path / "f.json")
    out = run("forecast", table, "--compute", 1.6e7, *output)[1]
    assert (
        "trials: found 36, expected at most 30. Choose sizes with --size, or fit on all with --most-trials 36." in out
    )
    assert run("forecast", table, "--compute", 1.6e7, *output, "--most-trials", 36)[0] == 0
    sizes = [f"--size=width={width}" for width in (8, 16, 32)]
    assert run("forecast", table, "--compute", 1.6e7, "--output", tmp_path / "g.json", *sizes)[0] == 0
    assert "found no run, expected the run to predict. Give --config" in run("forecast", table, "--output", "h.json")[1]
    assert (
        "--size: found width=9" in run("forecast", table, "--compute", 1, "--size", "width=9", "--output", "h.json")[1]
    )
    assert "--compute: found 0.0" in run("forecast", table, "--compute", 0, "--output", "h.json")[1]


def test_compute_efficiency_of_a_rule_over_another(run, tmp_path):
    trials = [
        sweep(LADDER, rule=rule, loss=lambda r, d=d: law(r / d), compute=lambda r: 1e6 * r)
        for rule, d in (("a", 1), ("b", 2))
    ]
    write_trials(tmp_path / "trials.csv", trials[0] + trials[1])
    out = run("forecast", tmp_path, "--rule", "a", "--over", "b", "--at", 3.5)[1]
    found = float(re.search(r"b needs ([\d.]+) times the compute of a for loss 3.5 ", out)[1])
    assert found == pytest.approx(2, rel=0.1)
    assert "Nothing is extrapolated" in run("forecast", tmp_path, "--rule", "a", "--over", "b", "--at", 1.0)[1]
    assert "--over: found not all of" in run("forecast", tmp_path, "--over", "b")[1]


def make_run(folder, config, loss, *, step=6, age=0.0):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text(f"epoch,step,val/loss\n0,{step},{loss}\n")
    for path in folder.iterdir():
        os.utime(path, (time.time() + 5 - age,) * 2)


@pytest.mark.slow
def test_report_scores_a_forecast(run, corpus, tmp_path, capsys):
    """The config that `fit` resolves is the forecast's, at any rate and seed; another width, an older or unfinished run is not."""
    args = ("--config", DEBUG, "--data.path", corpus)
    output, table = tmp_path / "f.json", ladder(tmp_path / "trials.csv", unit=1e3)
    status, out = run("forecast", table, "--output", output, *args)
    assert status == 0, out
    record = json.loads(output.read_text())
    assert record["target"]["steps"] == 6
    config = yaml.safe_load(re.split(r"^# lightning.*$", _printed(run, capsys, args), flags=re.M)[-1])
    assert config_hash(config, LR) == record["config"]["sha256"]
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = record["rate"]["value"]
    config["seed_everything"] = 7
    config["trainer"]["logger"] = False
    make_run(tmp_path / "run", config, record["loss"]["value"])
    score = ("report", "--forecast", output, "--output", tmp_path / "r.html")
    status, out = run(*score, tmp_path / "run")
    assert status == 0, out
    assert "what val/loss" in out
    assert "off by +0.00 %, inside yes" in out
    assert "off by +0.00 octaves" in out
    assert "Forecast of" in (tmp_path / "r.html").read_text()
    make_run(tmp_path / "bad", config, 2 * record["loss"]["value"])
    assert "off by +100.00 %, inside no" in run(*score, tmp_path / "bad")[1]
    make_run(tmp_path / "old", config, 2.0, age=3600)
    assert "expected a run that started after the forecast" in run(*score, tmp_path / "old")[1]
    make_run(tmp_path / "short", config, 2.0, step=3)
    assert "expected a run of 6 steps that has ended" in run(*score, tmp_path / "short")[1]
    config["model"]["init_args"]["width"] *= 2
    make_run(tmp_path / "other", config, 2.0)
    status, out = run(*score, tmp_path / "other")
    assert (status, "of another config" in out) == (2, True)
    assert "a file that `lightning-mue forecast` wrote" in run("report", tmp_path / "run", "--forecast", table)[1]


def _printed(run, capsys, args):
    """What `fit --print_config` prints, with its lines."""
    from lightning_mue.cli import main

    with pytest.raises(SystemExit):
        main(["fit", *map(str, args), "--print_config"])
    return capsys.readouterr().out
