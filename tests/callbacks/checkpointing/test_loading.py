"""Distributed checkpoints whose parts would run code when torch unpickles them are refused before it does."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from lightning_mue import SafeCheckpoint
from lightning_mue.callbacks.checkpointing.loading import before_loading, refuse_code

MARKER = "the_payload_ran"


class Bomb:
    """Unpickling it runs the payload."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


STATE = {
    "weight": torch.ones(3, 5),
    "step": torch.tensor(3.0),
    "lr": 0.1,
    "betas": (0.9, None),
    "name": ["x", {"y": True}],
}


def save(state, path="saved"):
    dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({}, Path(path) / "meta.pt")


def a_table():
    save(STATE)
    Path("saved/.metadata").write_bytes(pickle.dumps(Bomb()))


def inside_of_a_table():
    save(STATE)
    table = pickle.loads(Path("saved/.metadata").read_bytes())
    table.planner_data["more"] = Bomb()
    Path("saved/.metadata").write_bytes(pickle.dumps(table))


def a_value():
    save({**STATE, "lr": Bomb()})


def the_table_of_a_rank():
    """Which torch reads where there is no other."""
    save(STATE)
    Path("saved/.metadata").unlink()
    Path("saved/__0.metadata").write_bytes(pickle.dumps(Bomb()))


def the_table_of_a_rank_beside_an_empty_one():
    the_table_of_a_rank()
    Path("saved/.metadata").write_bytes(pickle.dumps({}))


CASES = [a_table, inside_of_a_table, a_value, the_table_of_a_rank, the_table_of_a_rank_beside_an_empty_one]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_it_runs_nothing(case):
    case()
    Path(MARKER).unlink(missing_ok=True)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[SafeCheckpoint()], enable_progress_bar=False)
    for load in (
        lambda: refuse_code("saved"),
        lambda: trainer.fit(BoringModel(), ckpt_path="saved"),
    ):
        with pytest.raises(ValueError, match=r"^ckpt_path: found 'saved', which cannot be read as plain data"):
            load()
        assert not Path(MARKER).exists()
    # A control: torch runs it.
    with contextlib.suppress(Exception, CheckpointException):  # after the payload, there is no table
        dcp.load({**STATE, "weight": torch.zeros(3, 5)}, checkpoint_id="saved", no_dist=True)
    assert Path(MARKER).exists()


def test_sound_checkpoints_and_other_paths_are_accepted():
    save(STATE)
    Path("folder").mkdir()
    for path in ("saved", Path("saved"), None, "", "folder", "not there", "last"):
        refuse_code(path)


def test_a_damaged_table_is_refused():
    save(STATE)
    data = Path("saved/.metadata").read_bytes()
    for damaged in (b"", data[: len(data) // 2], pickle.dumps(3), pickle.dumps(Metadata({}, storage_meta=3))):
        shutil.copytree("saved", "damaged", dirs_exist_ok=True)
        Path("damaged/.metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ckpt_path: found 'damaged'"):
            refuse_code("damaged")


def test_functions_are_called_before_the_loading_and_errors_of_ranks_become_one():
    def load(path, weights_only=None):
        calls.append(path)
        raise CheckpointException("load", {1: (KeyError("Missing key x"), None)})

    def act(path):
        calls.append(f"first {path}")

    calls, trainer = [], SimpleNamespace(strategy=SimpleNamespace(load_checkpoint=load))
    before_loading(trainer, act)
    before_loading(trainer, act)
    before_loading(trainer, refuse_code)
    with pytest.raises(
        ValueError, match=r"^ckpt_path: found 'a', which cannot be loaded \(KeyError: 'Missing key x'\)"
    ):
        trainer.strategy.load_checkpoint("a", weights_only=True)
    assert calls == ["first a", "a"]
