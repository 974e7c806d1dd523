"""The tutorial, followed from its first block to its last as a reader does, with fewer steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from helpers.pages import ROOT, command, lines, printed, run_here, sections

from lightning_mue.analysis.sweep import runner
from lightning_mue.analysis.trials import read_trials
from lightning_mue.files import TRIAL_RESULT
from lightning_mue.health.report import read_runs

#: The introduction, and the steps.
SECTIONS = sections("tutorial.md")
#: What makes the page quick. Rates lie so far apart that the best is the middle one, whatever the number of steps.
TOY = {
    r"max_steps=100, limit_val_batches=20": "max_steps=4, limit_val_batches=1, enable_progress_bar=False",
    r"max_steps: 100": "max_steps: 6",
    r"max_steps 100 (.*)limit_val_batches 20": r"max_steps 4 \1limit_val_batches 1 --extend 0",
    r"val_check_interval: 50": "val_check_interval: 3",
    r"limit_val_batches: 20": "limit_val_batches: 0.04",
    r"\[0.008, 0.016, 0.032\]": "[0.001, 0.03, 0.6]",
    r"--lr 0.002,0.004,0.008,0.016,0.032": "--lr 0.03",
    r"--lr 0.008,0.016,0.032 --seeds 3": "--lr 0.001,0.03,0.6 --seeds 2 --extend 0 --jobs 1",
    r"width=64,128,256 n_heads=2,4,8 --seeds 2": "width=32,64 n_heads=1,2 --seeds 1 --steps 2 --tolerance 9",
    r"width=64,96,128,160 n_heads=2,3,4,5": "width=32,64,96,128 n_heads=1,2,3,4",
    r"--size width=96 --size width=128 --size width=160": "--size width=64 --size width=96 --size width=128",
    r"(--trainer.accelerator gpu.*)": r"\1 --print_config",
}


class Ended:
    """A process that has ended well."""

    stdin = None

    def poll(self):
        return 0


class Here(runner.ProcessRunner):
    """Runs a trial of another command as ever, and of lightning-mue one of each size, in this process.

    Losses after a few steps say nothing: all trials of a sweep get some that fall with the width and have their least at one rate.
    """

    trained: ClassVar[dict[int, dict]] = {}

    def start(self, config, folder, slot):
        if tuple(self.command) != runner.OWN_COMMAND:
            return super().start(config, folder, slot)
        folder.mkdir(parents=True)
        arguments, seed = config["model"]["init_args"], config["seed_everything"]
        octaves = math.log2(arguments["lr"] / 0.03)
        if arguments["width"] not in self.trained:
            path = folder / runner.CONFIG
            path.write_text(yaml.safe_dump(runner.as_trial(config, folder, self.metric)))
            command(["fit", "--config", str(path)])
            self.trained[arguments["width"]] = json.loads((folder / TRIAL_RESULT).read_text())
        loss = 3 * arguments["width"] ** -0.1 + 0.01 * octaves**2 + 0.001 * seed * (1 + octaves)
        (folder / TRIAL_RESULT).write_text(json.dumps({**self.trained[arguments["width"]], "loss": loss}))
        return runner.TrialProcess(Ended(), folder)


def quick(text):
    for pattern, replacement in TOY.items():
        text = re.sub(pattern, replacement, text)
    return text


def follow(kind, text, names):
    """Does what a reader does with a block; returns what is printed."""
    if named := re.match(r"# (\w+\.\w+)\n", text):
        Path(named[1]).write_text(quick(text))
        return ""
    if kind == "python":
        return printed(lambda: exec(compile(quick(text), "<tutorial>", "exec"), names))
    called = lines(quick(text))
    assert all(line[:2] == ["pip", "install"] or line[0] == "lightning-mue" for line in called)
    return printed(lambda: [command(line[1:]) for line in called if line[0] == "lightning-mue"])


def lines_of(text):
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.fixture
def _reader(tmp_path, monkeypatch):
    """An empty folder whose files can be imported, and the commands of this interpreter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setattr(Here, "trained", {})
    monkeypatch.setattr(runner, "ProcessRunner", Here)
    monkeypatch.setattr(subprocess, "run", run_here)
    for name in ("gpt", "moe_gpt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("gpt", "moe_gpt"):
        sys.modules.pop(name, None)


def read(parts):
    """Follows the blocks of sections; returns how many tables of a plan are as shown, which does not depend on the steps."""
    names: dict = {}
    told, tables = "", 0
    for kind, text in (block for part in parts for block in part):
        if kind != "text":
            told = follow(kind, text, names)
        elif "role" in text and "shape" in text:
            tables += 1
            assert [line for line in lines_of(text) if line not in lines_of(told)] == []
    return tables


@pytest.mark.slow
@pytest.mark.usefixtures("_reader")
def test_from_the_dense_model_to_the_plan_of_the_target():
    assert read(SECTIONS[:7]) == 2
    assert len(read_trials("base/trials.csv")) == 1
    assert Path("coordinates.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("_reader")
def test_from_the_sweep_over_sizes_to_larger_machines():
    for kind, text in (block for section in SECTIONS[:7] for block in section):
        if kind in ("python", "yaml") and text.startswith("# "):
            follow(kind, text, {})  # the files, without what was done with them
    assert read(SECTIONS[7:]) == 0
    assert {trial.size["width"] for trial in read_trials("path/trials.csv")} == {32, 64, 96, 128}
    assert sorted(Here.trained) == [32, 64, 96, 128]
    assert len(read_runs(["logs/moe"])) == 1
    assert Path("report.html").stat().st_size > 10_000


def test_each_step_of_the_page_has_blocks():
    assert len(SECTIONS) == 12
    assert all(SECTIONS)
