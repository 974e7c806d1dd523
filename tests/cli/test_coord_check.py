from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def coord_check(corpus, *args):
    small = ("--data.batch_size", 8, "--seeds", 1, "--steps", 2)
    return ("coord-check", "--config", CONFIGS / "dense_to_moe.yaml", "--data.path", corpus, *MODEL, *small, *args)


#: dense_to_moe.yaml with a model of test size; the base in it (width 64, 2 heads) stays.
MODEL = ("--data.context_length", 32, "--model.init_args.context_length", 32, "--model.init_args.depth", 2)


def test_coord_check_passes_and_writes(run, corpus, tmp_path, every_command):
    """The config's own base, data and optimizer; loose tolerance, since one seed and two steps are noisy."""
    args = ("--axis", "width=32,64,128", "n_heads=1,2,4", "--tolerance", 0.5, "--output", tmp_path / "out")
    status, out = run(*coord_check(corpus, *args))
    assert status == 0, out
    assert "PASSED: complete-mue along width = 32, 64, 128: all 17 slopes within +-0.5" in out
    assert "Coordinate check: complete-mue (adam) after 2 steps, 1 seeds" in out
    header, *rows = (tmp_path / "out" / "coordinates.csv").read_text().splitlines()
    assert header == "size,seed,step,name,role,quantity,rms,base"
    # A dense base: experts scale from its FFN.
    assert any("ffn.experts.w_up,expert_up,update" in row and row.endswith("ffn.w_up") for row in rows)
    assert (tmp_path / "out" / "coordinates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # faster: "sp" of test_coord_check_of_a_foreign_module
def test_coord_check_fails_with_status_1(run, corpus):
    args = ("--axis", "width=32,64,128", "--axis", "n_heads=1,2,4", "--rule", "sp", "--tolerance", 0.5, "--lr", 3e-3)
    status, out = run(*coord_check(corpus, *args))
    assert status == 1
    assert "FAILED: sp along width = 32, 64, 128" in out
    assert Path("coordinates.csv").exists()


@pytest.mark.slow
def test_coord_check_from_dense_to_moe(run, corpus):
    status, out = run(*coord_check(corpus, "--axis", "n_experts=0,2,4", "--tolerance", 9))
    assert status == 0
    assert "n_experts = 1, 2, 4" in out


AXES = {
    "one size": (["width=32"], "--axis: found width=32, expected at least two sizes"),
    "no values": (["width"], "--axis: found 'width', expected name=value"),
    "unequal": (["width=32,64", "n_heads=1"], "--axis: found width: 2, n_heads: 1, expected equally many values"),
    "twice": (["width=32,64", "width=32,64"], "--axis: found width twice, expected each axis once"),
    "unknown": (["widht=32,64"], "widht.*Did you mean 'width'"),
    "does not fit": (
        ["width=32,64", "n_heads=1,5"],
        "width=64, n_heads=5.*n_heads: found 5, expected a divisor of width=64",
    ),
    "wrong type": (["width=32,wide"], "width=wide"),
    "same size": (["width=32,32"], "sizes: found models at width = 32, 32, expected a different width for every size"),
    "rule": (["width=32,64", "n_heads=1,2", "--rule", "mop"], "rule: found 'mop'"),
    "optimizer": (["width=32,64", "n_heads=1,2", "--rule", "hyperp"], "no row for the role 'hidden'"),
    "missing": ([], "axis"),
}


@pytest.mark.parametrize("case", AXES)
def test_bad_axes_are_reported_in_a_paragraph(run, corpus, case):
    given, message = AXES[case]
    axes, more = ([a for a in given if "=" in a] or given, given[given.index("--rule") :] if "--rule" in given else [])
    status, out = run(*coord_check(corpus, *(part for axis in axes for part in ("--axis", axis)), *more))
    assert status == 2, out
    assert re.search(message, out), out
    assert "Traceback" not in out


def test_coord_check_needs_data(run, tmp_path):
    config = yaml.safe_load((CONFIGS / "dense_to_moe.yaml").read_text())
    del config["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    status, out = run("coord-check", "--config", tmp_path / "config.yaml", "--axis", "n_experts=2,4")
    assert status == 2
    assert "data: found none, and no train_dataloader in MoELanguageModel" in out


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
def test_coord_check_of_a_foreign_module(run, tmp_path, monkeypatch, rule, status):
    """A plain LightningModule with a warm-up: no callback, roles, mue_axes or data module."""
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
    found, out = run("coord-check", *args, "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    assert found == status, out
    assert f"{['PASSED', 'FAILED'][status]}: {rule} along hidden = 64, 256, 1024" in out
    assert Path("coordinates.csv").exists()
    assert "non-finite" not in out
