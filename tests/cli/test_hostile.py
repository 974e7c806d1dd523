"""Hostile configurations, bases, fingerprints, caches and checkpoints: none of their code runs, each ends in a clear error.

Every payload would write a marker file.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue import MoELanguageModel, ScalingPlan, plan
from lightning_mue.callbacks.guard.snapshot import Snapshots
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.data.cache import ByteCache
from lightning_mue.parameterizations.reading.base import load_base

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
MARKER = "the_payload_ran"


def payload(path="os.system", **more):
    arguments = {"os.system": {"command": f"touch {MARKER}"}, "subprocess.Popen": {"args": ["touch", MARKER]}}
    return {"class_path": path, "init_args": arguments.get(path, {}), **more}


class Bomb:
    """Unpickling it runs the payload."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class Untyped(nn.Module):
    """Of its arguments the parser knows no type."""

    def __init__(self, part=None, thing: Any = None, **others) -> None:
        super().__init__()


def make() -> Path:
    """A function, which is no class."""
    return Path(MARKER).write_text("made") and Path(MARKER)


def make_module() -> LightningModule:
    """A function that says that it returns a module, and runs code first."""
    Path(MARKER).write_text("made")
    return LightningModule()


def callback(name, **arguments):
    return lambda c: c["trainer"]["callbacks"].append(
        {"class_path": f"lightning_mue.callbacks.{name}", "init_args": arguments}
    )


def mue(**arguments):
    return lambda c: c["trainer"]["callbacks"][0]["init_args"].update(arguments)


def model(**arguments):
    return lambda c: c["model"]["init_args"].update(arguments)


def trainer(**arguments):
    return lambda c: c["trainer"].update(arguments)


def top(**arguments):
    return lambda c: c.update(arguments)


def listed(value):
    return lambda c: c["trainer"]["callbacks"].append(value)


HERE = __name__
LOAD = "lightning.pytorch.LightningModule.load_from_checkpoint"
PICKLED = {"class_path": LOAD, "init_args": {"checkpoint_path": "evil.ckpt", "weights_only": False}}
CONFIGS = {
    "base": mue(base=payload()),
    "base, another class": mue(base=payload("subprocess.Popen")),
    "base, inside": mue(base={"width": payload()}),
    "base, another class inside": mue(base={"width": payload("subprocess.Popen")}),
    "base, deep inside": mue(base={"width": 16, "net": [{"a": payload("subprocess.Popen")}]}),
    "base, partial": mue(base=payload("functools.partial")),
    "base, another command line": mue(base=payload("lightning.pytorch.cli.LightningCLI")),
    "base, a function": mue(base={"class_path": f"{HERE}.make"}),
    "base, a function of a module": mue(base={"class_path": f"{HERE}.make_module"}),
    "base, an argument without a type": mue(
        base={"class_path": f"{HERE}.Untyped", "init_args": {"part": payload("subprocess.Popen")}}
    ),
    "base, an argument of any type": mue(base={"class_path": f"{HERE}.Untyped", "init_args": {"thing": payload()}}),
    "base, a further argument": mue(
        base={"class_path": f"{HERE}.Untyped", "dict_kwargs": {"more": payload("subprocess.Popen")}}
    ),
    "model": top(model=payload()),
    "model, another class": top(model=payload("subprocess.Popen")),
    "model, exec": top(model={"class_path": "builtins.exec", "init_args": {"source": f"open('{MARKER}', 'w')"}}),
    "model, a function": top(model={"class_path": f"{HERE}.make_module"}),
    "model, a pickled checkpoint": top(model=PICKLED),
    "optimizer": model(optimizer=payload()),
    "optimizer, another class": model(optimizer=payload("subprocess.Popen")),
    "scheduler": model(scheduler=payload()),
    "scheduler, a function": model(scheduler={"class_path": f"{HERE}.make"}),
    "data": top(data=payload()),
    "callback": listed(payload()),
    "callback, another class": listed(payload("subprocess.Popen")),
    "a callback's argument": callback("StabilityGuard", sample_ids=payload()),
    "roles": mue(roles={"x": payload()}),
    "initialize": mue(initialize=[payload()]),
    "logger": trainer(logger=payload()),
    "loggers": trainer(logger=[payload("subprocess.Popen")]),
    "strategy": trainer(strategy=payload()),
    "profiler": trainer(profiler=payload()),
    "plugins": trainer(plugins=[payload()]),
    "accelerator": trainer(accelerator=payload("subprocess.Popen")),
    "a pickled checkpoint": top(ckpt_path="evil.ckpt"),
    "a pickled checkpoint that is trusted": top(ckpt_path="evil.ckpt", weights_only=False),
    "a distributed checkpoint": top(ckpt_path="evil"),
    "a checkpoint's arguments": top(ckpt_path="arguments.ckpt"),
    "a checkpoint's class": top(ckpt_path="class.ckpt"),
}
#: One of each way; the others are slow.
FAST = ("base", "base, another class inside", "optimizer", "a pickled checkpoint that is trusted")
FAST += ("a distributed checkpoint",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The payloads run in a folder of the test's own, in which the hostile checkpoints lie."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "bomb": Bomb()}, "evil.ckpt")
    Path("evil").mkdir()
    Path("evil/.metadata").write_bytes(pickle.dumps(Bomb()))
    torch.save({}, "evil/meta.pt")
    saved = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "loops": {}}
    torch.save({**saved, "hyper_parameters": {"width": 16, "optimizer": payload()}}, "arguments.ckpt")
    torch.save({**saved, "hyper_parameters": {"_class_path": "os.system", "command": f"touch {MARKER}"}}, "class.ckpt")
    yield
    assert not Path(MARKER).exists(), "the payload ran"


def edited(corpus, edit):
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"]["path"] = str(corpus)
    edit(config)
    Path("hostile.yaml").write_text(yaml.safe_dump(config))
    return "hostile.yaml"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CONFIGS]
)
def test_a_hostile_config_runs_nothing(run, corpus, case):
    status, out = run("fit", "--config", edited(corpus, CONFIGS[case]))
    assert status == 2, out
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["explain", "coord-check", "validate", "test", "predict"])
@pytest.mark.parametrize("case", ["base", "optimizer", "base, another class inside"])
def test_no_command_runs_it(run, corpus, command, case):
    axis = ("--axis", "width=16,32") if command == "coord-check" else ()
    status, out = run(command, "--config", edited(corpus, CONFIGS[case]), *axis)
    assert status == 2, out


@pytest.mark.slow
def test_the_base_of_a_check_of_sizes_runs_nothing(run, corpus):
    config = edited(corpus, lambda c: None)
    base = '{"width": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "' + MARKER + '"]}}}'
    status, out = run("coord-check", "--config", config, "--axis", "width=16,32", "--base", base)
    assert status == 2, out


TAGGED = f"!!python/object/apply:os.system ['touch {MARKER}']"


@pytest.mark.parametrize(
    "text", [TAGGED, f"lightning_mue_base: 1\nmodel: {TAGGED}", "!!python/name:os.system", "!!python/module:this"]
)
def test_a_hostile_yaml_file_runs_nothing(run, text):
    Path("evil.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"base: found the file 'evil\.yaml', which"):
        load_base("evil.yaml")
    with pytest.raises(ValueError, match=r"'evil\.yaml'"):
        ScalingPlan.load("evil.yaml")
    status, out = run("fit", "--config", "evil.yaml")
    assert status == 2, out


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b'{"py/reduce": [{"py/function": "os.system"}, ["x"]]}'])
def test_a_hostile_fingerprint_or_cache_runs_nothing(content):
    Path("evil.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"compare: found 'evil\.json'"):
        Fingerprint.load("evil.json")
    for name in ("manifest.json", "train.bin", "val.bin"):
        Path(name).write_bytes(content)
    cache = ByteCache(Path())
    assert not cache.is_valid({})
    with pytest.raises(FileNotFoundError, match="cache_dir: found no complete cache"):
        cache.open("train")


def test_a_link_in_a_shared_cache_is_not_written_through():
    victim = Path("victim")
    victim.write_text("precious")
    folder = Path("cache")
    folder.mkdir()
    for name in ("CACHEDIR.TAG", "manifest.json", "train.bin", "val.bin"):
        (folder / name).symlink_to(victim.absolute())
    ByteCache(folder).write({}, {"train": [b"t"], "val": [b"v"]})
    assert victim.read_text() == "precious"
    assert ByteCache(folder).is_valid({})


def test_a_hostile_snapshot_runs_nothing():
    snapshots = Snapshots(Path(), 0)
    torch.save({"bomb": Bomb()}, snapshots._path(3))
    snapshots.adopt([3])
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        snapshots.newest()


@pytest.mark.parametrize("name", ["evil", "arguments", "class"])
def test_loading_a_hostile_checkpoint_runs_nothing(name):
    if name == "class":  # told to be of LightningCLI
        saved = torch.load("class.ckpt", weights_only=True)
        saved["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        torch.save(saved, "class.ckpt")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        MoELanguageModel.load_from_checkpoint(f"{name}.ckpt")


@pytest.mark.parametrize("instantiator", ["os.system", f"{HERE}.make", "subprocess.run", None])
def test_hyperparameters_from_a_checkpoint_run_nothing(instantiator):
    """As LightningCLI saves them: what makes the module, and its arguments."""
    small = {"width": 16, "depth": 1, "n_heads": 2, "n_experts": 0, "context_length": 8}
    made = MoELanguageModel(**small)
    made._set_hparams({**small, "optimizer": payload()})
    made.hparams["_instantiator"] = instantiator or "lightning.pytorch.cli.instantiate_module"
    key = "base.optimizer.class_path" if instantiator is None else "_instantiator"
    with pytest.raises(ValueError, match=rf"^{key}: found "):
        plan(made, base={"width": 8}, family="adam", rule="mup")


def test_there_are_enough_of_them_and_their_payloads_are_live():
    """Negative control: each payload does write its marker where it is run."""
    assert len(CONFIGS) + 15 + 4 + 2 + 3 + 4 >= 40
    for run_it in (
        lambda: os.system(f"touch {MARKER}"),
        lambda: pickle.loads(pickle.dumps(Bomb())),
        make,
        lambda: torch.load("evil.ckpt", weights_only=False),
        lambda: sys.modules["yaml"].unsafe_load(TAGGED),
    ):
        run_it()
        assert Path(MARKER).exists()
        Path(MARKER).unlink()
