"""configs/diffusion.yaml from the command line, by both rules, and what a short run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CONFIG = Path(__file__).parents[2] / "configs" / "diffusion.yaml"
SMALL = ("--model.width", "32", "--model.n_heads", "2", "--model.depth", "1", "--model.n_experts", "4")
ADAMW = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.008", "--model.gate", "linear")


@pytest.fixture
def rule_of_adamw(tmp_path):
    """The config with complete-mue in place of hyperp."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.read_text().replace("rule: hyperp", "rule: complete-mue"))
    return path


def test_fast_dev_run(run):
    status, out = run("fit", "--config", CONFIG, *SMALL, "--trainer.fast_dev_run", "true")
    assert status == 0, out
    assert "modulation" in out


def test_a_short_run_by_adamw_leaves_samples_and_figures(run, rule_of_adamw, tmp_path, caplog):
    caplog.set_level("INFO", "lightning_mue")
    short = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1")
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path)
    status, out = run("fit", "--config", rule_of_adamw, *SMALL, *ADAMW, *short, *logger)
    assert status == 0, out
    assert len(list(tmp_path.rglob("samples-2.png"))) == 1
    (metrics,) = tmp_path.rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert {"val/loss", "val/sample_accuracy", "val/real_accuracy", "train/tokens_per_second"} <= set(header)
    assert not any("lm_logits" in name for name in header), "velocities are no logits"
    assert "tokens are not counted" not in out
    assert "HealthMonitor: not known yet" in caplog.text, (
        "two samples are no evidence, and weights that start at zero no alarm"
    )
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(value.any()) for name, value in state.items() if name.endswith("modulation.weight"))
