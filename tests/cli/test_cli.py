from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mue import HyperSphereOptimizer
from lightning_mue.callbacks import ThroughputMonitor
from lightning_mue.cli.lightning_cli import MuECLI, main

CONFIGS = Path(__file__).parents[2] / "configs"
#: A barebones Trainer refuses the settings of debug.yaml that would slow it.
BAREBONES = [
    "--trainer.barebones=true",
    "--trainer.logger=false",
    "--trainer.log_every_n_steps=null",
    "--trainer.num_sanity_val_steps=null",
    "--trainer.enable_progress_bar=null",
]


def debug(corpus, *args):
    return ("--config", CONFIGS / "debug.yaml", "--data.path", corpus, *args)


def losses(folder, tag="train/loss"):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_fit_validate_test_predict(run, corpus, tmp_path, every_command):
    status, out = run("fit", *debug(corpus))
    assert status == 0
    for expected in (
        "val/bits_per_byte: ",
        "hyperp (sphere",
        "tensorboard --logdir logs/debug",
        "text sample",
        "steps: 6",
    ):
        assert expected in out, expected
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    torch.load(checkpoint, weights_only=True)
    events = EventAccumulator(str(tmp_path / "logs" / "debug" / "version_0"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in (
        "train/loss",
        "train/tokens_per_second",
        "val/bits_per_byte",
        "mue/lr/expert_up",
        "stability/z/lm_logits",
        "routing/max_violation/00",
    ):
        assert tag in tags, tags
    status, out = run("validate", *debug(corpus, "--ckpt_path", checkpoint))
    assert status == 0
    assert "val/bits_per_byte" in out
    status, out = run("test", *debug(corpus, "--ckpt_path", checkpoint))
    assert status == 0
    assert "test/bits_per_byte" in out
    status, out = run("predict", *debug(corpus, "--ckpt_path", checkpoint, "--trainer.limit_predict_batches", "1"))
    assert status == 0


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param({"class_path": "lightning_mue.callbacks.RouterMonitor"}, marks=pytest.mark.slow),
        "list",
        pytest.param("named", marks=pytest.mark.slow),  # faster: "added" of test_throughput_monitor_under_options
        pytest.param("named alone", marks=pytest.mark.slow),
    ],
    ids=["none", "one", "list", "named", "named alone"],
)
def test_there_is_one_throughput_monitor(run, corpus, tmp_path, monkeypatch, given):
    """By default, also beside the config's callbacks, and not twice; the saved config loads again and gives one too."""
    monitor = {"class_path": "lightning_mue.callbacks.ThroughputMonitor"}

    def edit(config):
        listed = config["trainer"]["callbacks"]
        new = {"list": listed, "named": [*listed, monitor], "named alone": monitor}
        config["trainer"]["callbacks"] = new[given] if isinstance(given, str) else given

    def monitors(path):
        with monkeypatch.context() as patch:
            patch.setattr(MuECLI, "_run_subcommand", lambda self, subcommand: None)
            callbacks = MuECLI(["fit", "--config", str(path)]).trainer.callbacks
        return sum(isinstance(callback, ThroughputMonitor) for callback in callbacks)

    def given_in(path):
        callbacks = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
        return len(callbacks) if isinstance(callbacks, list) else int(callbacks is not None)

    path, saved = change(corpus, tmp_path, edit), tmp_path / "logs" / "debug" / "version_0" / "config.yaml"
    assert monitors(path) == 1
    status, out = run("fit", "--config", path, "--trainer.max_steps", 2)
    assert status == 0, out
    assert given_in(saved) == given_in(path)  # the default is not written: it would be there twice the next time
    assert monitors(saved) == 1


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ([], 1),
        (["--trainer.callbacks=null"], 1),
        (["--trainer.callbacks+=lightning_mue.callbacks.ThroughputMonitor"], 1),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"], 1),
        (["--trainer.fast_dev_run=true"], 1),
        (BAREBONES, 0),  # measures the raw speed, without any logging
    ],
    ids=["config", "null", "added", "another added", "fast_dev_run", "barebones"],
)
def test_throughput_monitor_under_options(corpus, monkeypatch, args, count):
    monkeypatch.setattr(MuECLI, "_run_subcommand", lambda self, subcommand: None)
    callbacks = MuECLI(["fit", *map(str, debug(corpus, *args))]).trainer.callbacks
    assert sum(isinstance(callback, ThroughputMonitor) for callback in callbacks) == count
    if "--trainer.callbacks=null" not in args:
        assert "MuECallback" in {type(callback).__name__ for callback in callbacks}


def test_validation_of_a_checkpoint_gives_the_loss_of_the_run(run, corpus, tmp_path):
    """The multipliers must come back with the weights."""
    run("fit", *debug(corpus, "--trainer.max_steps", 6))
    trained = losses(tmp_path / "logs" / "debug" / "version_0", "val/loss")[-1]
    args = debug(corpus, "--ckpt_path", next(tmp_path.rglob("*.ckpt")), "--trainer.logger", "false")
    cli = MuECLI(["validate", *map(str, args)])
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(trained, rel=1e-5)


def test_resume_through_the_command_line(run, corpus, tmp_path):
    run("fit", *debug(corpus, "--trainer.max_steps", 3, "--trainer.val_check_interval", 3))
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    content = checkpoint.read_bytes()
    status, out = run("fit", *debug(corpus, "--ckpt_path", checkpoint, "--trainer.max_steps", 5))
    assert status == 0
    assert "steps: 5" in out
    status, out = run(
        "fit",
        *debug(
            corpus, "--ckpt_path", checkpoint, "--trainer.callbacks.init_args.alpha", "0.5", "--trainer.max_steps", 5
        ),
    )
    assert checkpoint.read_bytes() == content


def change(corpus, tmp_path, edit):
    """debug.yaml with an edit, as a file."""
    config = yaml.safe_load((CONFIGS / "debug.yaml").read_text())
    config["data"]["init_args"]["path"] = str(corpus)
    edit(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def model_args(**kwargs):
    return lambda c: c["model"]["init_args"].update(kwargs)


def data_args(**kwargs):
    return lambda c: c["data"]["init_args"].update(kwargs)


def mue_args(**kwargs):
    return lambda c: c["trainer"]["callbacks"][0]["init_args"].update(kwargs)


def optimizer_args(**kwargs):
    return lambda c: c["model"]["init_args"]["optimizer"]["init_args"].update(kwargs)


BAD = {
    "unknown key of the model": (model_args(widht=3), "widht"),
    "unknown key of the callback": (mue_args(bases={"width": 16}), "bases"),
    "unknown key of the trainer": (lambda c: c["trainer"].update(max_step=3), "max_step"),
    "unknown key of the data": (data_args(batchsize=3), "batchsize"),
    "unknown class": (lambda c: c["model"].update(class_path="lightning_mue.models.MoEModel"), "MoEModel"),
    "wrong type": (model_args(width="wide"), "width"),
    "wrong type of base": (mue_args(base=[1, 2]), "base"),
    "top_k too large": (model_args(top_k=9), r"top_k: found 9, expected at most n_experts=4"),
    "width and heads": (model_args(n_heads=5), r"n_heads: found 5, expected a divisor of width=32"),
    "kv heads": (model_args(n_heads=4, n_kv_heads=3), "n_kv_heads: found 3"),
    "scoring": (model_args(scoring="hash"), "scoring"),
    "gate": (model_args(gate="relu"), "gate"),
    "balance": (model_args(balance="luck"), "balance"),
    "base key": (mue_args(base={"widht": 16}), r"base\.widht.*Did you mean 'width'"),
    "base shape": (mue_args(base={"width": 30, "n_heads": 4}), r"base: .*n_heads"),
    "rule": (mue_args(rule="hyper"), "rule: found 'hyper'"),
    "rule and optimizer": (mue_args(rule="complete-mue"), r"no table .*'sphere'"),
    "alpha": (mue_args(alpha=3.0), "alpha: found 3"),
    "tokens without the base's": (mue_args(tokens=1e6), "tokens: .*base: {..., tokens: 1e9}"),
    "role": (mue_args(roles={"w_q": "matrix"}), r"roles\['w_q'\]: found 'matrix', expected one of 'embedding'"),
    "pattern": (mue_args(roles={"w_z": "hidden"}), r"roles: found pattern\(s\) \['w_z'\], which match no"),
    "zero matrix on the sphere": (model_args(unembedding_std=0.0), r"unembedding\.weight.*zero"),
    "vocabulary": (model_args(vocab_size=100), "MoELanguageModel.vocab_size: found 100, expected at least 256"),
    "corpus not there": (data_args(path="/not/there"), "path: found '/not/there', which does not exist"),
    "learning rate": (optimizer_args(lr=-1.0), "lr.*-1"),
    "preset": (optimizer_args(preset="fast"), "preset.*fast"),
    "momentum": (optimizer_args(momentum=1.0), "momentum"),
    "retraction": (
        optimizer_args(retraction="polar"),
        "retraction: found 'polar', expected one of 'project', 'geodesic'",
    ),
    "convention": (
        optimizer_args(lr_convention="mup"),
        "lr_convention: found 'mup', expected one of 'spectral', 'rms', ",
    ),
    "compute type": (optimizer_args(compute_dtype="int8"), "compute_dtype: found 'int8', expected one of None, "),
    "state type": (optimizer_args(state_dtype="float8"), "state_dtype: found 'float8', expected one of None, "),
    "radius": (optimizer_args(radius=-1.0), "radius: found -1"),
    "radius at another size": (optimizer_args(radius=2.0), "radius=2 .*Leave radius out"),
    "process group": (optimizer_args(process_group="some"), "process_group: found 'some'"),
    "optimizer flag": (optimizer_args(capturable="maybe"), "capturable"),
    "unknown key of the optimizer": (optimizer_args(adam_lr=0.1), "adam_lr"),
    "val_fraction": (data_args(val_fraction=1.5), "val_fraction: found 1.5, expected a number above 0 and below 1"),
    "batch size": (data_args(batch_size=0), "batch_size: found 0, expected an integer of at least 1"),
    "context longer than the model's": (
        data_args(context_length=64),
        r"context_length: found sequences of 64 tokens, expected at most 32",
    ),
    "corpus smaller than a window": (
        lambda c: (data_args(context_length=20000)(c), model_args(context_length=20000)(c)),
        r"path='.*', train split: found \d+ tokens .*expected at least 20001",
    ),
    "warmup": (lambda c: c["model"]["init_args"]["scheduler"].update(init_args={"warmup": 2.0}), "warmup: found 2"),
}


#: Refused by the same constructors in test_groups.py, test_step.py, test_op.py, test_layer.py, test_language.py, test_tokens.py
#: and test_callback.py; what the command line adds, the other cases of the same class show.
TWINS = ("preset", "momentum", "retraction", "compute type", "process group", "scoring", "gate")
TWINS += ("balance", "kv heads", "batch size", "role", "pattern", "rule", "alpha")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in TWINS else []) for case in BAD]
)
def test_bad_input_is_reported_in_a_paragraph_before_step_0(run, corpus, tmp_path, case):
    edit, message = BAD[case]
    status, out = run("fit", "--config", change(corpus, tmp_path, edit))
    assert status == 2, out
    assert re.search(message, out), out
    assert "Traceback" not in out
    assert not list(tmp_path.rglob("*.ckpt"))


#: Every option of HyperSphereOptimizer, each with another value than its default.
OPTIONS = {
    "lr": 0.03,
    "adamw_lr": 0.02,
    "adamw_weight_decay": 0.01,
    "momentum": 0.9,
    "nesterov": False,
    "betas": [0.8, 0.9],
    "eps": 1e-7,
    "weight_decay": 0.05,
    "preset": "classic",
    "compute_dtype": "float64",
    "state_dtype": "bfloat16",
    "retraction": "geodesic",
    "zero_gradient": "momentum",
    "radius": 5.0,
    "lr_convention": "rms",
    "normalize": "neuron",
    "split": 2,
    "maximize": True,
    "capturable": True,
    "compile": True,
    "sphere": False,
    "process_group": "auto",  # of older configurations; means None
}


def test_every_option_of_the_optimizer_is_set_from_yaml(corpus, tmp_path):
    parameters = inspect.signature(HyperSphereOptimizer).parameters
    assert set(OPTIONS) == set(parameters) - {"params"}
    assert all(value != parameters[key].default for key, value in OPTIONS.items())
    cli = MuECLI(["--config", str(change(corpus, tmp_path, optimizer_args(**OPTIONS)))], run=False)
    optimizer = cli.model.optimizer(list(cli.model.named_parameters()))
    own = ("adamw_lr", "adamw_weight_decay", "sphere", "process_group")
    for group in optimizer.param_groups:
        expected = {
            **OPTIONS,
            **({key: OPTIONS[f"adamw_{key}"] for key in ("lr", "weight_decay")} if group["kind"] == "adamw" else {}),
            "betas": (0.8, 0.9),
            "split": None if group["kind"] == "adamw" else OPTIONS["split"],
        }
        assert {key: group[key] for key in expected if key in group} == {
            key: value for key, value in expected.items() if key not in own
        }
    assert {group["kind"] for group in optimizer.param_groups} == {"muon", "adamw"}  # sphere
    assert optimizer.process_group is None


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05, "adamw_lr": 0.02},
        pytest.param({"lr": 0.05, "adamw_lr": 0.02, "sphere": False, "weight_decay": 0.1}, marks=pytest.mark.slow),
        pytest.param(
            {"lr": 0.2, "adamw_lr": 0.02, "sphere": False, "lr_convention": "rms", "state_dtype": "bfloat16"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sphere", "muon", "muon, rms"],
)
def test_sphere_and_muon_learn_from_yaml(run, corpus, tmp_path, options):
    # The sphere keeps the unembedding's norm for good: with the model's default std, logits would stay small.
    edit = lambda c: (optimizer_args(**options)(c), model_args(unembedding_std=0.25)(c))  # noqa: E731
    config = change(corpus, tmp_path, edit)
    few = ("--trainer.max_steps", 40, "--trainer.val_check_interval", 40, "--trainer.log_every_n_steps", 1)
    status, out = run("fit", "--config", config, *few)
    assert status == 0, out
    assert f"hyperp ({'sphere' if options.get('sphere', True) else 'muon'}" in out
    loss = losses(tmp_path / "logs" / "debug" / "version_0")
    assert len(loss) == 40
    # Of 256 bytes, 5.5 nats; the corpus repeats one sentence, which is learned in tens of steps.
    assert sum(loss[-5:]) / 5 < 0.6 * loss[0], loss


@pytest.mark.slow
def test_muon_baseline_is_the_quickstart_but_for_the_optimizer(run, corpus):
    """A baseline compares optimizers only if nothing else differs; and it trains."""
    sphere, muon = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("quickstart", "muon_baseline"))
    options = muon["model"]["init_args"].pop("optimizer")["init_args"]
    assert options["sphere"] is False
    assert sphere["model"]["init_args"].pop("optimizer")["init_args"].keys() <= options.keys()
    for config in (sphere, muon):
        config["trainer"]["logger"]["init_args"].pop("name")
    assert sphere == muon
    small = ("--data.context_length", 32, "--model.init_args.context_length", 32, "--data.batch_size", 2)
    steps = ("--trainer.max_steps", 3, "--trainer.val_check_interval", 3, "--trainer.limit_val_batches", 1)
    status, out = run("fit", "--config", CONFIGS / "muon_baseline.yaml", "--data.path", corpus, *small, *steps)
    assert status == 0, out
    assert "steps: 3" in out
    assert "hyperp (muon" in out


@pytest.mark.slow
@pytest.mark.parametrize("n_experts", [0, 4])
def test_the_papers_recipe_trains(run, corpus, tmp_path, n_experts):
    """configs/hyperp_paper.yaml at small sizes: depth and width grow together from a base; lr falls by L^-1/2 T^-0.32."""
    config = yaml.safe_load((CONFIGS / "hyperp_paper.yaml").read_text())
    small = {"n_kv_heads": 1, "head_dim": 16, "vocab_size": 256, "context_length": 32, "n_experts": n_experts}
    config["model"]["init_args"].update(small, width=32, depth=2, n_heads=4, ffn_width=128)
    mue = config["trainer"]["callbacks"][0]["init_args"]
    mue["base"].update(small, depth=1, width=16, n_heads=2, ffn_width=64, n_experts=0, batch_tokens=64)
    del mue["base"]["context_length"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    data = ("--data.path", corpus, "--data.context_length", 32, "--data.batch_size", 2)
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1)
    plain = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", 1)
    status, out = run("fit", "--config", path, *data, *steps, *plain, "--trainer.log_every_n_steps", 1)
    assert status == 0, out
    assert "hyperp-paper (sphere" in out
    assert "steps: 2" in out


def test_empty_corpus(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    empty = tmp_path / "empty"
    empty.mkdir()
    status, out = run("fit", *debug(empty))
    assert status == 2
    assert str(empty) in out


def test_traceback_on_request(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_TRACEBACK", "1")
    path = change(corpus, tmp_path, mue_args(alpha=3.0))
    with pytest.raises(ValueError, match="alpha"):
        main(["fit", "--config", str(path)])


def test_errors_of_others_keep_their_traceback(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mue.models.MoELanguageModel.loss", lambda self, batch: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", *map(str, debug(corpus))])


def test_a_config_may_name_classes_of_files_in_the_current_folder(run, tmp_path, monkeypatch):
    """As ``python -m`` lets it; the folder of the installed command is another."""
    (tmp_path / "own_module_here.py").write_text(
        "from lightning.pytorch import LightningModule\nclass Mine(LightningModule):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    status, out = run("fit", "--model", "own_module_here.Mine", "--print_config")
    assert (status, "class_path: own_module_here.Mine" in out) == (0, True)
    assert sys.path[-1] == str(tmp_path)  # after all that is installed
