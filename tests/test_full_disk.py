"""A full disk at every kind of write: the old file stays as it was, and the run goes on or ends with one paragraph."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_mue import MoELanguageModel, TextDataModule, coordinate_check, plan, save_base
from lightning_mue.analysis.trials import Trial, write_trials
from lightning_mue.callbacks import MuECallback
from lightning_mue.callbacks.guard.snapshot import Snapshots
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint
from lightning_mue.data.cache import ByteCache


def model(width=16):
    return MoELanguageModel(vocab_size=256, width=width, depth=1, n_heads=2, context_length=8)


@pytest.fixture
def full(monkeypatch):
    """After this call, no byte reaches the disk: flushing raises what a full disk does, after half was written."""

    def fill():
        def fsync(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", fsync)

    return fill


def check():
    batch = {"tokens": torch.zeros(1, 4, dtype=torch.long), "targets": torch.zeros(1, 4, dtype=torch.long)}
    sizes = [{"width": 8}, {"width": 16}]
    return coordinate_check(model, sizes, [batch], rule="mup", steps=1, seeds=1)


WRITES = {
    "plan.yaml": lambda path: plan(model(), rule="mup").save(path),
    "base.yaml": lambda path: save_base(model(), path),
    "fingerprint.json": lambda path: Fingerprint.of_points(2, {0: {"a/b/outside": 1.0}}).save(path),
    "trials.csv": lambda path: write_trials(path, [Trial("mup", {"width": 8}, 0, 0.1, 2.0)]),
    "coordinates.csv": lambda path: check().to_csv(path),
    "train.bin": lambda path: ByteCache(path.parent).write({}, {"train": [b"t"], "val": [b"v"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITES)
def test_the_old_file_stays(name, full, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    full()
    with pytest.raises(OSError, match="No space left"):
        WRITES[name](path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [name], "nothing is left behind"


def test_a_snapshot_is_kept_in_memory(full, tmp_path):
    snapshots = Snapshots(tmp_path, 0)
    snapshots.add(1, {"weights": torch.ones(2)})
    full()
    with pytest.warns(UserWarning, match="kept in memory"):
        snapshots.add(2, {"weights": torch.full((2,), 2.0)})
    assert snapshots.newest()[1]["weights"][0] == 2
    assert snapshots.newest()[1]["weights"][0] == 1, "the older one is on disk"


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_run_goes_on_without_its_plan(full, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.txt").write_text("text " * 100)
    data = TextDataModule(corpus, context_length=8, batch_size=2, val_fraction=0.3, cache_dir=tmp_path / "cache")
    data.prepare_data()
    trainer = Trainer(
        max_steps=2,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MuECallback(rule="mup", base={"width": 8}, verbose=False, verify=False)],
    )
    full()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(model(), data)
    assert trainer.global_step == 2
    assert any("did not take the plan" in str(each.message) for each in told)
    assert not list(Path(tmp_path).rglob("plan.yaml"))


def test_a_cache_that_does_not_fit_ends_in_a_paragraph(full, tmp_path):
    (tmp_path / "text.txt").write_text("text " * 400)
    data = TextDataModule(tmp_path / "text.txt", cache_dir=tmp_path / "cache")
    full()
    with pytest.raises(ValueError, match=r"cache_dir: found .*No space left.*expected a writable folder"):
        data.prepare_data()
