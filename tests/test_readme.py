"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_mue

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_example_trains_and_scales():
    code, monitors = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(monitors, names)
    watching = names["callbacks"]
    exec(
        code.replace("max_epochs=3", "max_epochs=1, logger=False, enable_checkpointing=False, accelerator='cpu'"), names
    )
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 10, (64,)))
    trainer = names["trainer"]
    trainer.callbacks += watching
    trainer.fit(names["Net"](), DataLoader(data, batch_size=32))
    plan = next(callback.plan for callback in trainer.callbacks if hasattr(callback, "plan"))
    assert plan["net.2.weight"].lr == 1 / 16
    assert plan["net.4.weight"].role == "unembedding"


def test_names_it_uses_can_be_imported_from_the_package():
    foreign = {"LearningRateMonitor", "ModelParallelStrategy", "logsumexp"}
    calls = re.findall(r"`(\w+)(?:\.\w+)?\(", README)  # `plan(...)`, `MoELayer.from_ffn(...)`
    classes = re.findall(r"`([A-Z]\w+)`", README)
    assert len(calls) >= 8
    assert {*calls, *classes} - foreign <= set(lightning_mue.__all__)


def test_every_file_it_names_is_there():
    root = Path(__file__).parent.parent
    for path in re.findall(r"(?:configs|docs)/[\w/.]+\.\w+", README):
        assert (root / path).exists(), path
