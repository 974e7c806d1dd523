"""The command `sweep`: real trainings in processes, a kill in the middle, two processes at once, and input that is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from lightning_mue.analysis.trials import read_trials
from lightning_mue.cli import sweep as command
from lightning_mue.cli.lightning_cli import MuECLI
from lightning_mue.cli.sweep import resolve_config, resources
from lightning_mue.cli.sweep_check import check_builds

CONFIGS = Path(__file__).parents[2] / "configs"
ROOT = str(Path(__file__).parents[2])
#: A LightningCLI of one's own, not in subclass mode, with a module and an optimizer of one's own.
TRAIN = """
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class Mine(LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.1, step_seconds: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def loss(self, batch):
        import time
        time.sleep(self.hparams.step_seconds)
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        return DataLoader(torch.randn(64, 4), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), batch_size=64)


print("my own greeting")
LightningCLI(Mine)
"""


def start(folder, *args):
    """Starts a sweep as a user does, in a process of its own."""
    called = [sys.executable, "-m", "lightning_mue.cli.lightning_cli", "sweep", *map(str, args)]
    paths = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        called,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what, seconds=240):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


def trials_of(folder):
    journal = folder / "sweep" / "journal.log"
    if not journal.exists():
        return []
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    return [
        t
        for study in optuna.get_all_study_names(storage)
        for t in optuna.load_study(study_name=study, storage=storage).trials
    ]


def processes_in(folder):
    """Trials that run: processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder / "sweep" / "trials").encode() in line:
            found.append(path)
    return found


@pytest.mark.slow
def test_killed_and_joined_by_two_processes_it_trains_everything_once(tmp_path):
    """On a module and a LightningCLI of one's own."""
    (tmp_path / "train.py").write_text(TRAIN)
    args = [
        *("--command", f"{sys.executable} train.py fit", "--axis", "width=4,8", "--lr", "0.02,0.08", "--extend", "0"),
        *("--jobs", "1", "--trainer.max_steps", "12", "--trainer.accelerator", "cpu", "--model.step_seconds", "0.1"),
    ]
    first = start(tmp_path, *args)
    states = optuna.trial.TrialState
    wait_for(lambda: [t.state for t in trials_of(tmp_path)][:2] == [states.COMPLETE, states.RUNNING])
    wait_for(lambda: processes_in(tmp_path))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = trials_of(tmp_path)
    wait_for(lambda: not processes_in(tmp_path), 60)  # a trial does not outlive its sweep
    both = [start(tmp_path, *args), start(tmp_path, *args)]
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    after = trials_of(tmp_path)
    finished = Counter(t.user_attrs["key"] for t in after if t.state is states.COMPLETE)
    assert sorted(finished.values()) == [1, 1, 1, 1]
    # What was finished is there as it was, and each run that was given up was begun once more.
    assert [t.datetime_complete for t in after if t.number == 0] == [before[0].datetime_complete]
    folders = [path.name.rpartition("-")[0] for path in (tmp_path / "sweep" / "trials").iterdir()]
    assert sorted(Counter(folders).values()) == [1, 1, 1, 2]
    assert {t.user_attrs["worker"] for t in after} >= {before[0].user_attrs["worker"]}
    table = read_trials(tmp_path / "sweep" / "trials.csv")
    assert {(t.rule, t.size["width"], t.lr) for t in table} == {("none", w, lr) for w in (4, 8) for lr in (0.02, 0.08)}
    assert len({t.loss for t in table}) == 4
    assert "4 trials: " in outputs[0]


@pytest.mark.slow
def test_a_sweep_of_rules_on_a_config_of_this_package(tmp_path, corpus):
    args = [
        *("--config", CONFIGS / "debug.yaml", "--rules", "hyperp,none", "--lr", "0.02", "--data.path", corpus),
        *("--set", "gate=sqrt", "--seeds", "1", "--jobs", "2"),
    ]
    process = start(tmp_path, *args)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    table = read_trials(tmp_path / "sweep" / "trials.csv")
    assert {t.rule for t in table} == {"hyperp", "none"}
    assert all(t.tokens == 6 * 4 * 32 and t.compute > 0 and t.settings == {"gate": "sqrt"} for t in table)
    assert (next((tmp_path / "sweep" / "trials").iterdir()) / "metrics.csv").exists()


def test_the_config_is_what_the_command_makes_of_it(tmp_path):
    script = tmp_path / "cli.py"
    script.write_text(
        "import sys\nassert sys.argv[1:] == ['fit', '--model.lr', '2', '--print_config']\n"
        "print('a: greeting: of mine')\nprint('# lightning.pytorch==9')\nprint('trainer: {}\\nmodel: {lr: 2.0}')"
    )
    assert resolve_config([sys.executable, str(script), "fit"], ["--model.lr", "2"]) == {
        "trainer": {},
        "model": {"lr": 2.0},
    }
    with pytest.raises(
        ValueError, match=r"--config: found status 1 and '.*AssertionError', expected a command .*Try: "
    ):
        resolve_config([sys.executable, str(script), "fit"], [])


def test_callbacks_given_by_name_are_in_the_list_where_rules_are_looked_for(monkeypatch):
    """`--mue.rule mup` would otherwise outdo the rules that a sweep compares, under their names."""
    mue = {"class_path": "lightning_mue.callbacks.MuECallback", "init_args": {"rule": "sp", "base": {"width": 8}}}
    printed = {"mue": {"rule": "mup"}, "health": {}, "logits": None, "model": {}, "trainer": {"callbacks": [mue]}}
    done = subprocess.CompletedProcess([], 0, stdout=yaml.safe_dump(printed), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    config = resolve_config((), [])
    rules = [(c["class_path"].rpartition(".")[2], c["init_args"]) for c in config["trainer"]["callbacks"]]
    assert rules == [("MuECallback", {"rule": "mup", "base": {"width": 8}}), ("HealthMonitor", {})]
    assert "mue" not in config
    assert "health" not in config
    assert resolve_config(("mine",), [])["mue"] == {"rule": "mup"}  # another command may mean something else by it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--axis", "widht=1,2"], "--axis: found 'widht'.*Did you mean 'width'"),
        (["--axis", "width=1,2,1"], "--axis width: found 1 twice"),
        (["--lr", "0.1,-0.1"], "--lr: found -0.1, expected a positive"),
        (["--lr-key", "model.wdth"], "--lr-key: found 'model.wdth'"),
        (["--rules", "none,mup"], "--rules: found 'mup', and no base in the config"),
        (["--set", "width=1", "--set", "width=2"], "--set: found width in two options"),
        (["--seeds", "0"], "--seeds: found 0, expected an integer of at least 1"),
        (["--extend", "-1"], "--extend: found -1, expected"),
        (["--lr", "0.1,0.2", "--search", "width=int:1:3"], "--lr: found 2 rates beside --search"),
        (["--search", "lr=log:1:3"], "--search: found lr, expected other keys"),
    ],
)
def test_what_is_refused_before_the_first_trial(monkeypatch, tmp_path, options, message):
    config = {"trainer": {"callbacks": None}, "model": {"width": 8, "lr": 0.1}}
    monkeypatch.setattr(command, "resolve_config", lambda *given: config)
    with pytest.raises(ValueError, match=message):
        command.sweep_command([*options, "--command", "mine"], MuECLI)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"no package optuna, expected optuna\. Run: pip install 'lightning_mue\[sweep\]'"
    ):
        command.sweep_command([], MuECLI)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"axes": [{"width": [32, 33]}]}, "hyperp width=33"),
        ({"rules": ("hyperp", "mup")}, "mup"),
    ],
)
def test_a_cell_that_cannot_be_built_is_refused(corpus, changes, found):
    from helpers.sweeps import axis, plan

    class Parsed(MuECLI):
        def instantiate_classes(self):
            pass

    args = ["--config", str(CONFIGS / "debug.yaml"), "--data.path", str(corpus)]
    config = Parsed(args, run=False).config.as_dict()
    options = {**changes, "axes": tuple(axis(**a) for a in changes.get("axes", ()))}
    with pytest.raises(ValueError, match=f"cell: found {found}, expected sizes, settings and rule that fit together"):
        check_builds(plan(config, **options), MuECLI)


@pytest.mark.parametrize(
    ("trainer", "gpus", "visible", "jobs", "expected"),
    [
        ({"accelerator": "cpu"}, 4, None, None, (8, 1, [])),
        ({"accelerator": "cpu"}, 0, None, 3, (3, 2, [])),
        ({"accelerator": "auto", "devices": "auto"}, 4, None, None, (4, 2, ["0", "1", "2", "3"])),
        ({"accelerator": "auto", "devices": 1}, 2, "5,7", 4, (4, 2, ["5", "7"])),
        ({"accelerator": "gpu", "devices": 2}, 4, None, None, (1, 8, [])),
    ],
)
def test_cores_and_devices_are_shared_out(monkeypatch, trainer, gpus, visible, jobs, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert resources({"trainer": trainer}, jobs) == expected
