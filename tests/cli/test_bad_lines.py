"""Bad command lines of every command: status 2, the key, under 1,600 characters, no traceback, no batch trained.

Parsing alone refuses most of them, so they run in this process; a few of each command go on to where the data is known.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_mue import MoELanguageModel
from lightning_mue.cli.lightning_cli import MuECLI

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
MUE = "trainer.callbacks.0.init_args"
OPTIMIZER = "model.init_args.optimizer.init_args"

#: Edits of debug.yaml: path -> value; "key" is what the message must name, by default the last part of the path.
EDITS = [
    ("model.init_args.widht", 3),
    ("model.init_args.width", "wide"),
    ("model.init_args.width", -16),
    ("model.init_args.width", 0),
    ("model.init_args.width", 31),
    ("model.init_args.width", [16]),
    ("model.init_args.depth", 0),
    ("model.init_args.depth", 1.5),
    ("model.init_args.n_heads", 5),
    ("model.init_args.n_experts", -1),
    ("model.init_args.top_k", 9),
    ("model.init_args.context_length", "long"),
    ("model.init_args.gate", "relu"),
    ("model.init_args.qk_norm", "perhaps"),
    ("model.init_args.embedding_std", float("nan")),
    ("model.init_args.residual_multiplier", float("inf")),
    ("model.init_args.activation", "reluu"),
    ("model.init_args.optimizer", "AdamX"),
    ("model.init_args.optimizer", 3),
    ("model.init_args.optimizer.class_path", "torch.optim.Adamw"),
    ("model.init_args.scheduler.class_path", "lightning_mue.optim.schedule.WarmUp"),
    ("model.init_args.scheduler.init_args", {"warmupp": 0.1}),
    ("model.class_path", "lightning_mue.MoELanguageModell"),
    ("model.class_path", "lightning_mue.TextDataModule"),
    ("model.class_path", "no_such_package.Model"),
    ("model", None),
    ("model", 3),
    ("model.init_arg", {}),
    (f"{OPTIMIZER}.lr", float("nan")),
    (f"{OPTIMIZER}.lr", float("inf")),
    (f"{OPTIMIZER}.lr", -0.1),
    (f"{OPTIMIZER}.lr", "fast"),
    (f"{OPTIMIZER}.lrr", 0.1),
    (f"{OPTIMIZER}.betas", 3),
    (f"{OPTIMIZER}.betas", [0.9, 1.5]),
    (f"{OPTIMIZER}.momentum", float("nan")),
    (f"{OPTIMIZER}.weight_decay", float("inf")),
    (f"{OPTIMIZER}.eps", "small"),
    (f"{OPTIMIZER}.preset", "fast"),
    (f"{MUE}.rule", "mupp"),
    (f"{MUE}.rule", 3),
    (f"{MUE}.rulee", "mup"),
    (f"{MUE}.alpha", 3.0),
    (f"{MUE}.alpha", float("nan")),
    (f"{MUE}.alpha", "one"),
    (f"{MUE}.seed", -1),
    (f"{MUE}.seed", "x"),
    (f"{MUE}.tokens", -1.0),
    (f"{MUE}.batch_tokens", -1.0),
    (f"{MUE}.roles", ["x"]),
    (f"{MUE}.roles", {"(": "hidden"}),
    (f"{MUE}.roles", {"x": "no role"}),
    (f"{MUE}.multipliers", {"residual": "("}),
    (f"{MUE}.initialize", ["("]),
    (f"{MUE}.initialize", "some"),
    (f"{MUE}.verify", "perhaps"),
    (f"{MUE}.base", [1]),
    (f"{MUE}.verbose", "perhaps"),
    ("trainer.callbacks.0.class_path", "lightning_mue.MuEcallback"),
    ("trainer.callbacks.1.class_path", "lightning_mue.callbacks.LogitZMonitor"),
    ("trainer.callbacks.1.init_args", {"every_n_step": 3}),
    ("trainer.callbacks.1.init_args", {"every_n_steps": 0}),
    ("trainer.callbacks.1.init_args", {"lm_logits": "("}),
    ("trainer.callbacks.3.init_args", {"routers": "("}),
    ("trainer.callbacks.4.init_args", {"roles": {"(": "hidden"}}),
    ("trainer.callbacks.2.init_args", {"threshold": -1}),
    ("trainer.callbacks", 3),
    ("trainer.max_step", 3),
    ("trainer.max_steps", "many"),
    ("trainer.max_steps", 1.5),
    ("trainer.max_steps", -5),
    ("trainer.max_epochs", "x"),
    ("trainer.precision", "fp7"),
    ("trainer.accelerator", "abacus"),
    ("trainer.devices", -7),
    ("trainer.strategy", "no_such_strategy"),
    ("trainer.val_check_interval", "often"),
    ("trainer.limit_val_batches", "x"),
    ("trainer.log_every_n_steps", "x"),
    ("trainer.accumulate_grad_batches", 0),
    ("trainer.gradient_clip_val", "x"),
    ("trainer.gradient_clip_algorithm", "x"),
    ("trainer.gradient_clip_val", float("nan")),
    ("trainer.logger.class_path", "lightning.pytorch.loggers.TensorboardLogger"),
    ("trainer.logger.init_args.save_dirr", "x"),
    ("trainer.logger", 3.5),
    ("trainer.max_time", "soon"),
    ("data.class_path", "lightning_mue.data.TextData"),
    ("data.init_args.batchsize", 3),
    ("data.init_args.batch_size", 0),
    ("data.init_args.batch_size", "x"),
    ("data.init_args.val_fraction", 1.5),
    ("data.init_args.seed", -1),
    ("data.init_args.val_batches", 0),
    ("data.init_args.context_length", -1),
    ("data", 3),
    ("seed_everything", -1),
    ("seed_everything", "x"),
    ("seed_everything", 2**40),
    ("modle", 3),
    ("ckpt_path", "/not/there.ckpt"),
    ("ckpt_path", "damaged.ckpt"),
    ("ckpt_path", "other.ckpt"),
    ("ckpt_path", "."),
    ("ckpt_path", 3),
    ("weights_only", False),
    ("mue", {"rulee": "mup"}),
    ("mue", {"alpha": "x"}),
    ("updates", 3),
]
#: Command lines after the config: (command, words, key).
LINES = [
    ("fit", ["--model.widht", "3"], "widht"),
    ("fit", ["--model.width", "wide"], "width"),
    ("fit", ["--model.optimizer.lr", "fast"], "lr"),
    ("fit", ["--model.optimizer.lr", ".nan"], "lr"),
    ("fit", ["--model.optimizer.lr", ".inf"], "lr"),
    ("fit", ["--model.optimizer.lr", "-1"], "lr"),
    ("fit", ["--trainer.max_steps"], "max_steps"),
    ("fit", ["--trainer.maxsteps", "3"], "maxsteps"),
    ("fit", ["--foo", "3"], "foo"),
    ("fit", ["extra"], "extra"),
    ("fit", ["--config", "/not/there.yaml"], "config"),
    ("fit", ["--config", "broken.yaml"], "config"),
    ("fit", ["--config", "list.yaml"], "config"),
    ("fit", ["--config", "."], "config"),
    ("fit", ["--config"], "config"),
    ("fit", ["--mue.rulee", "mup"], "rulee"),
    ("fit", ["--mue.alpha", "x"], "alpha"),
    ("fit", ["--mue.alpha", "7"], "alpha"),
    ("fit", ["--mue.rule", "mupp"], "rule"),
    ("fit", ["--health.every", "3"], "every"),
    ("fit", ["--spectral.iterations", "0"], "iterations"),
    ("fit", ["--guard.window", "x"], "window"),
    ("fit", ["--transfer.band", "2"], "record"),
    ("fit", ["--seed_everything", "-1"], "seed_everything"),
    ("fit", ["--ckpt_path", "/not/there.ckpt"], "ckpt_path"),
    ("fit", ["--trainer.callbacks.init_args.losess", "x"], "losess"),
    ("fit", ["--trainer.callbacks+=NoSuch"], "callbacks"),
    ("fit", ["--trainer.logger.name", "[1, 2]"], "name"),
    ("fit", ["--data.context_length", "64"], "context_length"),
    ("fit", ["--data.path", "/not/there"], "path"),
    ("validate", ["--ckpt_path", "/not/there.ckpt"], "ckpt_path"),
    ("validate", ["--ckpt_path", "damaged.ckpt"], "ckpt_path"),
    ("validate", ["--ckpt_path", "other.ckpt"], "ckpt_path"),
    ("validate", ["--data.context_length", "64"], "context_length"),
    ("validate", ["--data.path", "/not/there"], "path"),
    ("validate", ["--verbose", "perhaps"], "verbose"),
    ("test", ["--ckpt_path", "."], "ckpt_path"),
    ("predict", ["--ckpt_path", "empty.ckpt"], "ckpt_path"),
    ("explain", ["--family", "adamw"], "family"),
    ("explain", ["--rules", "mup,mupp"], "rule"),
    ("explain", ["--rules", ""], "rule"),
    ("explain", ["--save-base", "."], "path"),
    ("explain", ["--verify", "perhaps"], "verify"),
    ("explain", ["--axis", "width=1,2"], "axis"),
    ("explain", ["--mue.base", "no_such.yaml"], "base"),
    ("explain", ["--mue.base", "damaged.yaml"], "base"),
    ("explain", ["--mue.base", "{widht: 3}"], "widht"),
    ("explain", ["--mue.base", "{width: x}"], "width"),
    ("explain", ["--model.init_args.top_k", "7"], "top_k"),
    ("explain", ["--model.optimizer.lr", ".nan"], "lr"),
    ("explain", ["--trainer.callbacks=null"], "callbacks"),
    ("coord-check", [], "axis"),
    ("coord-check", ["--axis", "width"], "axis"),
    ("coord-check", ["--axis", "width=16"], "axis"),
    ("coord-check", ["--axis", "width=16,32", "--axis", "n_heads=2"], "axis"),
    ("coord-check", ["--axis", "widht=16,32"], "axis"),
    ("coord-check", ["--axis", "width=x,y"], "axis"),
    ("coord-check", ["--axis", "width=16,16"], "sizes"),
    ("coord-check", ["--axis", "width=16,32", "--seeds", "-1"], "seeds"),
    ("coord-check", ["--axis", "width=16,32", "--seeds", "x"], "seeds"),
    ("coord-check", ["--axis", "width=16,32", "--steps", "0"], "steps"),
    ("coord-check", ["--axis", "width=16,32", "--steps", "x"], "steps"),
    ("coord-check", ["--axis", "width=16,32", "--tolerance", "-1"], "tolerance"),
    ("coord-check", ["--axis", "width=16,32", "--tolerance", ".nan"], "tolerance"),
    ("coord-check", ["--axis", "width=16,32", "--tolerance", "x"], "tolerance"),
    ("coord-check", ["--axis", "width=16,32", "--lr", ".inf"], "lr"),
    ("coord-check", ["--axis", "width=16,32", "--lr", "-1"], "lr"),
    ("coord-check", ["--axis", "width=16,32", "--lr", "0"], "lr"),
    ("coord-check", ["--axis", "width=16,32", "--rule", "mupp"], "rule"),
    ("coord-check", ["--axis", "width=16,32", "--alpha", "7"], "alpha"),
    ("coord-check", ["--axis", "width=16,32", "--base", "[1]"], "base"),
    ("coord-check", ["--axis", "width=16,32", "--base", "{widht: 3}"], "widht"),
    ("coord-check", ["--axis", "width=16,32", "--output", "damaged.ckpt"], "output"),
]
#: Without a config: words, key.
BARE = [
    ([], "command"),
    (["fitt"], "fitt"),
    (["--config", "x"], "config"),
    (["fit"], "model"),
    (["validate"], "model"),
    (["explain"], "model"),
    (["report"], "RUN_DIR"),
    (["report", "/not/there"], "/not/there"),
    (["report", "."], "RUN_DIR"),
    (["report", "damaged.ckpt"], "damaged.ckpt"),
    (["report", ".", "--output", "."], "output"),
    (["report", ".", "--no-such"], "no-such"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, corpus):
    """In a folder with damaged files; nothing may be trained."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "damaged.ckpt": b"PK\x03\x04 half a checkpoint",
        "empty.ckpt": b"",
        "broken.yaml": b"a: [1, 2",
        "list.yaml": b"- 1\n- 2\n",
        "damaged.yaml": b"lightning_mue_base: 1\nmodel: 3\n",
    }.items():
        Path(name).write_bytes(content)
    torch.save({"weights": torch.ones(2)}, "other.ckpt")

    def trained(*args):
        raise AssertionError("a batch was trained")

    monkeypatch.setattr(MoELanguageModel, "training_step", trained)
    monkeypatch.setattr(MoELanguageModel, "validation_step", trained)


def refused(run, words, key):
    status, out = run(*words)
    assert status == 2, out
    assert "Traceback" not in out
    paragraph = out[out.index("error: ") :]
    assert key in paragraph, out
    assert len(out) < 1600, f"{len(out)} characters: {out}"


def written(corpus, path="", value=None):
    """debug.yaml with one edit, as a file."""
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"]["path"] = str(corpus)
    if path:
        *around, last = path.split(".")
        place = config
        for name in around:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[last] = value
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return "config.yaml"


def fast(cases, every):
    """The other cases are slow: one parse takes a third of a second."""
    return [pytest.param(*case, marks=[] if i % every == 3 else [pytest.mark.slow]) for i, case in enumerate(cases)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("path", "value"), fast(EDITS, 40))
def test_a_bad_config(run, corpus, path, value):
    key = next(iter(value)) if isinstance(value, dict) and value else path.rpartition(".")[2]
    key = {"class_path": str(value), "0": "roles"}.get(key, key)
    refused(run, ["fit", "--config", written(corpus, path, value)], key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("command", "words", "key"), fast(LINES, 40))
def test_a_bad_command_line(run, corpus, command, words, key):
    refused(run, [command, "--config", written(corpus), *words], key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("words", "key"), fast(BARE, 9))
def test_a_bad_command_line_without_a_config(run, corpus, words, key, every_command):
    refused(run, words, key)


@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_that_parameterize(run, corpus, monkeypatch):
    second = "--trainer.callbacks+=lightning_mue.callbacks.MuECallback"
    refused(run, ["fit", "--config", written(corpus), second], "MuECallback")


def test_there_are_enough_of_them():
    assert len(EDITS) + len(LINES) + len(BARE) >= 134


def test_a_group_overrides_the_callback_of_its_type_and_is_saved_once(corpus, monkeypatch):
    """Or adds one; the config that is saved holds no group, so that it is read the same."""
    monkeypatch.setattr(MuECLI, "_run_subcommand", lambda self, subcommand: None)
    words = ["--mue.rule", "sp", "--updates.every_n_steps=3", "--spectral.iterations", "2", "--guard", "{}"]
    cli = MuECLI(["fit", "--config", written(corpus), *words])
    made = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert made["MuECallback"].rule.name == "sp"
    assert made["MuECallback"].base == {"width": 16, "depth": 1, "n_heads": 2, "n_experts": 0}, "the config's"
    assert (made["UpdateMonitor"].every_n_steps, made["SpectralMonitor"].iterations) == (3, 2)
    assert {"HealthMonitor", "StabilityGuard"} <= set(made)  # the config's, and one with its defaults
    assert [type(c).__name__ for c in cli.trainer.callbacks].count("MuECallback") == 1
    assert cli.config["fit"]["mue"] is None
