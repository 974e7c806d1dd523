from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mue import HyperSphereOptimizer
from lightning_mue.cli.lightning_cli import MuECLI, main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A small folder of text, and a cache of its own."""
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox jumps over the lazy dog. " * 8)
    return folder


def run(capsys, *args):
    """Runs the command; returns (exit status, all output on one line with single spaces)."""
    status = 0
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def debug(corpus, *args):
    return ("--config", CONFIGS / "debug.yaml", "--data.path", corpus, *args)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_explained(capsys, config):
    status, out = run(capsys, "explain", "--config", config)
    assert status == 0
    rule = next(
        c["init_args"]["rule"]
        for c in yaml.safe_load(config.read_text())["trainer"]["callbacks"]
        if c["class_path"].endswith("MuECallback")
    )
    assert f"{rule} (" in out
    assert "expert_down" in out


@pytest.mark.slow
def test_explain_for_a_trillion_parameters_takes_seconds_and_little_memory(tmp_path):
    """Under 20 s and 2 GiB, from process start to exit."""
    code = (
        "import json, resource, sys, time; start = time.perf_counter()\n"
        "from lightning_mue.cli.lightning_cli import main; main(sys.argv[1:])\n"
        "json.dump([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], open('r.json', 'w'))"
    )
    config = str(CONFIGS / "trillion.yaml")
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", "--config", config],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    seconds, gib = json.loads((tmp_path / "r.json").read_text())
    assert "T parameters" in done.stdout
    assert gib < 2
    assert seconds < 20


def losses(folder, tag="train/loss"):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_fit_validate_test_predict(capsys, corpus, tmp_path):
    status, out = run(capsys, "fit", *debug(corpus))
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
        "val/bits_per_byte",
        "mue/lr/expert_up",
        "stability/z/lm_logits",
        "routing/max_violation/00",
    ):
        assert tag in tags, tags
    status, out = run(capsys, "validate", *debug(corpus, "--ckpt_path", checkpoint))
    assert status == 0
    assert "val/bits_per_byte" in out
    status, out = run(capsys, "test", *debug(corpus, "--ckpt_path", checkpoint))
    assert status == 0
    assert "test/bits_per_byte" in out
    status, out = run(
        capsys, "predict", *debug(corpus, "--ckpt_path", checkpoint, "--trainer.limit_predict_batches", "1")
    )
    assert status == 0


def test_validation_of_a_checkpoint_gives_the_loss_of_the_run(capsys, corpus, tmp_path):
    """The multipliers must come back with the weights."""
    run(capsys, "fit", *debug(corpus, "--trainer.max_steps", 6))
    trained = losses(tmp_path / "logs" / "debug" / "version_0", "val/loss")[-1]
    args = debug(corpus, "--ckpt_path", next(tmp_path.rglob("*.ckpt")), "--trainer.logger", "false")
    cli = MuECLI(["validate", *map(str, args)])
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(trained, rel=1e-5)


def test_resume_through_the_command_line(capsys, corpus, tmp_path):
    run(capsys, "fit", *debug(corpus, "--trainer.max_steps", 3, "--trainer.val_check_interval", 3))
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    content = checkpoint.read_bytes()
    status, out = run(capsys, "fit", *debug(corpus, "--ckpt_path", checkpoint, "--trainer.max_steps", 5))
    assert status == 0
    assert "steps: 5" in out
    status, out = run(
        capsys,
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
    "role": (mue_args(roles={"w_q": "matrix"}), "names the role 'matrix'"),
    "pattern": (mue_args(roles={"w_z": "hidden"}), r"\['w_z'\] match no"),
    "zero matrix on the sphere": (model_args(unembedding_std=0.0), r"unembedding\.weight.*zero"),
    "vocabulary": (model_args(vocab_size=100), r"vocab_size.*100|100.*vocab"),
    "corpus not there": (data_args(path="/not/there"), "/not/there"),
    "learning rate": (optimizer_args(lr=-1.0), "lr.*-1"),
    "preset": (optimizer_args(preset="fast"), "preset.*fast"),
    "momentum": (optimizer_args(momentum=1.0), "momentum"),
    "retraction": (optimizer_args(retraction="polar"), "retraction must be one of project, geodesic; found 'polar'"),
    "convention": (optimizer_args(lr_convention="mup"), "lr_convention must be one of spectral, rms, .*found 'mup'"),
    "compute type": (optimizer_args(compute_dtype="int8"), "compute_dtype must be one of None, .*found 'int8'"),
    "state type": (optimizer_args(state_dtype="float8"), "state_dtype must be one of None, .*found 'float8'"),
    "radius": (optimizer_args(radius=-1.0), "radius must be .*found -1"),
    "radius at another size": (optimizer_args(radius=2.0), "radius=2 .*Leave radius out"),
    "process group": (optimizer_args(process_group="some"), "process_group must be .*'some'"),
    "optimizer flag": (optimizer_args(capturable="maybe"), "capturable"),
    "unknown key of the optimizer": (optimizer_args(adam_lr=0.1), "adam_lr"),
    "val_fraction": (data_args(val_fraction=1.5), "val_fraction"),
    "batch size": (data_args(batch_size=0), "batch_size"),
    "context longer than the model's": (
        data_args(context_length=64),
        r"context_length: found sequences of 64 tokens, expected at most 32",
    ),
    "corpus smaller than a window": (
        lambda c: (data_args(context_length=20000)(c), model_args(context_length=20000)(c)),
        "too small",
    ),
    "warmup": (lambda c: c["model"]["init_args"]["scheduler"].update(init_args={"warmup": 2.0}), "warmup: found 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_a_paragraph_before_step_0(capsys, corpus, tmp_path, case):
    import re

    edit, message = BAD[case]
    status, out = run(capsys, "fit", "--config", change(corpus, tmp_path, edit))
    assert status == 2, out
    assert re.search(message, out), out
    assert "Traceback" not in out
    assert not list(tmp_path.rglob("*.ckpt"))


#: Every option of HyperSphereOptimizer, each with another value than its default.
OPTIONS = {
    "lr": 0.03,
    "adamw_lr": 0.02,
    "momentum": 0.9,
    "nesterov": False,
    "betas": [0.8, 0.9],
    "eps": 1e-7,
    "weight_decay": 0.05,
    "preset": "classic",
    "compute_dtype": "float64",
    "state_dtype": "bfloat16",
    "retraction": "geodesic",
    "radius": 5.0,
    "lr_convention": "rms",
    "maximize": True,
    "capturable": True,
    "compile": True,
    "sphere": False,
    "process_group": None,
}


def test_every_option_of_the_optimizer_is_set_from_yaml(corpus, tmp_path):
    parameters = inspect.signature(HyperSphereOptimizer).parameters
    assert set(OPTIONS) == set(parameters) - {"params"}
    assert all(value != parameters[key].default for key, value in OPTIONS.items())
    cli = MuECLI(["--config", str(change(corpus, tmp_path, optimizer_args(**OPTIONS)))], run=False)
    optimizer = cli.model.optimizer(list(cli.model.named_parameters()))
    for group in optimizer.param_groups:
        expected = {
            **OPTIONS,
            "lr": OPTIONS["adamw_lr"] if group["kind"] == "adamw" else OPTIONS["lr"],
            "betas": (0.8, 0.9),
        }
        assert {key: group[key] for key in expected if key in group} == {
            key: value for key, value in expected.items() if key not in ("adamw_lr", "sphere", "process_group")
        }
    assert {group["kind"] for group in optimizer.param_groups} == {"muon", "adamw"}  # sphere
    assert optimizer._process_group is None


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05, "adamw_lr": 0.02},
        {"lr": 0.05, "adamw_lr": 0.02, "sphere": False, "weight_decay": 0.1},
        {"lr": 0.2, "adamw_lr": 0.02, "sphere": False, "lr_convention": "rms", "state_dtype": "bfloat16"},
    ],
    ids=["sphere", "muon", "muon, rms"],
)
def test_sphere_and_muon_learn_from_yaml(capsys, corpus, tmp_path, options):
    # The sphere keeps the unembedding's norm for good: with the model's default std, logits would stay small.
    edit = lambda c: (optimizer_args(**options)(c), model_args(unembedding_std=0.25)(c))  # noqa: E731
    config = change(corpus, tmp_path, edit)
    few = ("--trainer.max_steps", 40, "--trainer.val_check_interval", 40, "--trainer.log_every_n_steps", 1)
    status, out = run(capsys, "fit", "--config", config, *few)
    assert status == 0, out
    assert f"hyperp ({'sphere' if options.get('sphere', True) else 'muon'}" in out
    loss = losses(tmp_path / "logs" / "debug" / "version_0")
    assert len(loss) == 40
    # Of 256 bytes, 5.5 nats; the corpus repeats one sentence, which is learned in tens of steps.
    assert sum(loss[-5:]) / 5 < 0.6 * loss[0], loss


def test_muon_baseline_is_the_quickstart_but_for_the_optimizer(capsys, corpus):
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
    status, out = run(capsys, "fit", "--config", CONFIGS / "muon_baseline.yaml", "--data.path", corpus, *small, *steps)
    assert status == 0, out
    assert "steps: 3" in out
    assert "hyperp (muon" in out


def test_empty_corpus(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    empty = tmp_path / "empty"
    empty.mkdir()
    status, out = run(capsys, "fit", *debug(empty))
    assert status == 2
    assert str(empty) in out


def test_explain_without_the_callback(capsys, corpus, tmp_path):
    status, out = run(
        capsys, "explain", "--config", change(corpus, tmp_path, lambda c: c["trainer"].update(callbacks=None))
    )
    assert status == 2
    assert "no MuECallback" in out


def test_traceback_on_request(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_TRACEBACK", "1")
    path = change(corpus, tmp_path, mue_args(alpha=3.0))
    with pytest.raises(ValueError, match="alpha"):
        main(["fit", "--config", str(path)])


def test_errors_of_others_keep_their_traceback(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mue.models.MoELanguageModel.loss", lambda self, batch: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", *map(str, debug(corpus))])


def coord_check(corpus, *args):
    small = ("--data.batch_size", 8, "--seeds", 1, "--steps", 2)
    return ("coord-check", "--config", CONFIGS / "dense_to_moe.yaml", "--data.path", corpus, *MODEL, *small, *args)


#: dense_to_moe.yaml with a model of test size; the base in it (width 64, 2 heads) stays.
MODEL = ("--data.context_length", 32, "--model.init_args.context_length", 32, "--model.init_args.depth", 2)


def test_coord_check_passes_and_writes(capsys, corpus, tmp_path):
    """The config's own base, data and optimizer; loose tolerance, since one seed and two steps are noisy."""
    args = ("--axis", "width=32,64,128", "--axis=n_heads=1,2,4", "--tolerance", 0.5, "--output", tmp_path / "out")
    status, out = run(capsys, *coord_check(corpus, *args))
    assert status == 0, out
    assert "PASSED: complete-mue along width = 32, 64, 128: all 17 slopes within +-0.5" in out
    assert "Coordinate check: complete-mue (adam) after 2 steps, 1 seeds" in out
    header, *rows = (tmp_path / "out" / "coordinates.csv").read_text().splitlines()
    assert header == "size,seed,step,name,role,quantity,rms,base"
    # A dense base: experts scale from its FFN.
    assert any("ffn.experts.w_up,expert_up,update" in row and row.endswith("ffn.w_up") for row in rows)
    assert (tmp_path / "out" / "coordinates.png").read_bytes().startswith(b"\x89PNG")


def test_coord_check_fails_with_status_1(capsys, corpus):
    args = ("--axis", "width=32,64,128", "--axis", "n_heads=1,2,4", "--rule", "sp", "--tolerance", 0.5, "--lr", 3e-3)
    status, out = run(capsys, *coord_check(corpus, *args))
    assert status == 1
    assert "FAILED: sp along width = 32, 64, 128" in out
    assert Path("coordinates.csv").exists()


def test_coord_check_from_dense_to_moe(capsys, corpus):
    status, out = run(capsys, *coord_check(corpus, "--axis", "n_experts=0,2,4", "--tolerance", 9))
    assert status == 0
    assert "n_experts = 1, 2, 4" in out


AXES = {
    "one size": (["width=32"], "--axis: found width=32, expected at least two sizes"),
    "no values": (["width"], "--axis: found 'width', expected name=value"),
    "unequal": (["width=32,64", "n_heads=1"], "equally many values; found width: 2, n_heads: 1"),
    "twice": (["width=32,64", "width=32,64"], "--axis: width is given twice"),
    "unknown": (["widht=32,64"], "widht.*Did you mean 'width'"),
    "does not fit": (
        ["width=32,64", "n_heads=1,5"],
        "width=64, n_heads=5.*n_heads: found 5, expected a divisor of width=64",
    ),
    "wrong type": (["width=32,wide"], "width=wide"),
    "same size": (["width=32,32"], "width = 32, 32; every size needs an x of its own"),
    "rule": (["width=32,64", "n_heads=1,2", "--rule", "mop"], "rule: found 'mop'"),
    "optimizer": (["width=32,64", "n_heads=1,2", "--rule", "hyperp"], "no row for the role 'hidden'"),
    "missing": ([], "axis"),
}


@pytest.mark.parametrize("case", AXES)
def test_bad_axes_are_told_in_a_paragraph(capsys, corpus, case):
    import re

    given, message = AXES[case]
    axes, more = ([a for a in given if "=" in a] or given, given[given.index("--rule") :] if "--rule" in given else [])
    status, out = run(capsys, *coord_check(corpus, *(part for axis in axes for part in ("--axis", axis)), *more))
    assert status == 2, out
    assert re.search(message, out), out
    assert "Traceback" not in out


def test_coord_check_needs_data(capsys, tmp_path):
    config = yaml.safe_load((CONFIGS / "dense_to_moe.yaml").read_text())
    del config["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    status, out = run(capsys, "coord-check", "--config", tmp_path / "config.yaml", "--axis", "n_experts=2,4")
    assert status == 2
    assert "coord-check: there is no data" in out


def test_explain_compares_rules(capsys):
    config = CONFIGS / "dense_to_moe.yaml"
    status, out = run(capsys, "explain", "--config", config, "--rules", "sp,mup,complete-p,mssp,complete-mue")
    assert status == 0
    for part in ("initial std", "forward multipliers", "agree", "complete-p: rule='complete-p'", "mup does not claim"):
        assert part in out, part
    status, out = run(capsys, "explain", "--config", config, "--rules", "sp,mop")
    assert status == 2
    assert "rule: found 'mop'" in out


def test_explain_saves_a_base_that_stands_for_it(capsys, tmp_path):
    """The plan from the file is the plan from the overrides."""
    config = yaml.safe_load((CONFIGS / "dense_to_moe.yaml").read_text())
    path, base = tmp_path / "config.yaml", tmp_path / "base.yaml"
    status, out = run(capsys, "explain", "--config", CONFIGS / "dense_to_moe.yaml", "--save-base", base)
    assert status == 0
    assert f"base written to {base}" in out
    plan = out[out.index("complete-mue (adam") :]
    config["trainer"]["callbacks"][0]["init_args"]["base"] = str(base)
    path.write_text(yaml.safe_dump(config))
    status, again = run(capsys, "explain", "--config", path)
    assert status == 0
    assert again[again.index("complete-mue (adam") :] == plan


OWN_MODULE = """
import torch
from lightning.pytorch import LightningModule
from torch import nn

class Own(LightningModule):
    def __init__(self, hidden: int = 16, rate: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        assert self.trainer.max_epochs is not None
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))]

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(list(zip(x, x.sum(-1, keepdim=True).sin())), batch_size=32)
"""


@pytest.mark.parametrize(("rule", "status"), [("mup", 0), ("sp", 1)])
def test_coord_check_of_a_module_that_nobody_here_wrote(capsys, tmp_path, monkeypatch, rule, status):
    """No callback, no roles, no mue_axes, no data module, a warm-up: nothing but a LightningModule."""
    (tmp_path / "own_module.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    args = (
        "--model",
        "own_module.Own",
        "--axis",
        "hidden=64,256,1024",
        "--rule",
        rule,
        "--tolerance",
        0.25,
        "--lr",
        1e-3,
    )
    found, out = run(capsys, "coord-check", *args, "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    assert found == status, out
    assert f"{rule} along hidden = 64, 256, 1024" in out
    assert "non-finite" not in out
