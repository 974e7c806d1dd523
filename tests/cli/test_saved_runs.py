"""Configs and checkpoints written before modules moved still load: files in data/, written by the code of commit 9ddc306.

debug.ckpt is the checkpoint after step 4 of the run that saved debug.yaml, on the corpus of conftest.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_mue import MoELanguageModel
from lightning_mue.cli import main
from lightning_mue.cli.lightning_cli import MuECLI

DATA = Path(__file__).parent / "data"
#: val/loss of the old code: of the checkpoint, and after two more steps.
LOSS, LOSS_AFTER_RESUME = 5.5149126, 5.5071874


def lacking(saved, now, key=""):
    """Keys of a saved config that another one lacks, or has with another value; class paths may be spelled otherwise."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [path for k in saved for path in lacking(saved[k], now.get(k, "nothing"), f"{key}.{k}")]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) <= len(now):
        return [path for i, (a, b) in enumerate(zip(saved, now, strict=False)) for path in lacking(a, b, f"{key}.{i}")]
    return [] if saved == now or key.endswith("class_path") else [f"{key}: {saved} -> {now}"]


@pytest.mark.parametrize("name", ["debug", "expert_parallel"])
def test_a_saved_config_is_parsed_to_the_same_options(capsys, corpus, name):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(DATA / f"{name}.yaml"), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert lacking(yaml.safe_load((DATA / f"{name}.yaml").read_text()), printed) == []


@pytest.mark.parametrize("name", ["debug", "expert_parallel"])
def test_a_saved_config_is_instantiated(monkeypatch, corpus, name):
    monkeypatch.setattr(MuECLI, "_run_subcommand", lambda self, subcommand: None)
    cli = MuECLI(["fit", "--config", str(DATA / f"{name}.yaml")])
    made = [type(callback).__name__ for callback in cli.trainer.callbacks]
    for callback in yaml.safe_load((DATA / f"{name}.yaml").read_text())["trainer"]["callbacks"]:
        assert callback["class_path"].rpartition(".")[2] in made
    assert isinstance(cli.model, MoELanguageModel)
    optimizer = cli.model.optimizer(list(cli.model.named_parameters()))
    assert type(optimizer).__name__ == "HyperSphereOptimizer"
    assert type(cli.model.scheduler(optimizer)).__name__ == "WarmupDecay"
    assert type(cli.datamodule).__name__ == "TextDataModule"


def test_a_saved_checkpoint_is_validated_and_resumed(corpus):
    """With the config of its own run; the losses are those that the old code computes."""
    args = ["--config", DATA / "debug.yaml", "--ckpt_path", DATA / "debug.ckpt", "--trainer.logger", "false"]
    cli = MuECLI(["validate", *map(str, args)])
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(LOSS, rel=1e-5)
    Path("config.yaml").unlink()
    args += ["--trainer.max_steps", 6, "--trainer.val_check_interval", 2, "--trainer.enable_checkpointing", "false"]
    cli = MuECLI(["fit", *map(str, args)])
    assert cli.trainer.global_step == 6
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(LOSS_AFTER_RESUME, rel=1e-5)


def test_a_saved_checkpoint_is_loaded_without_the_command_line():
    model = MoELanguageModel.load_from_checkpoint(DATA / "debug.ckpt", map_location="cpu")
    saved = torch.load(DATA / "debug.ckpt", weights_only=True)
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in model.state_dict().items())
    name = "transformer.blocks.0.residual_multiplier"
    assert model.transformer.blocks[0].residual_multiplier == pytest.approx(saved["mue_multipliers"][name])
