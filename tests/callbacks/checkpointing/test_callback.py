"""SafeCheckpoint in one process: what it saves and keeps, what it refuses, signals, and resumed runs bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.interruptions import At
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mue import SafeCheckpoint
from lightning_mue.callbacks.checkpointing import folder, writing

Usage = namedtuple("Usage", "total used free")


def stop():
    raise RuntimeError("stop here")


def flip(path, count=50, seed=0):
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(count):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def names(dirpath):
    return sorted(path.name for path in Path(dirpath).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fail_at", [3, 5])
def test_a_run_that_fails_goes_on_bit_for_bit(run, tmp_path, accumulate, fail_at):
    limits = {"accumulate_grad_batches": accumulate}
    reference = run(**limits)
    with pytest.raises(RuntimeError, match="stop here"):
        run(SafeCheckpoint(tmp_path / "safe", every_n_train_steps=1), At(fail_at, stop), **limits)
    path = SafeCheckpoint.latest(tmp_path / "safe")
    saved = torch.load(path, weights_only=True)
    assert torch.equal(run(SafeCheckpoint(tmp_path / "2"), ckpt_path=path, **limits), reference)
    # A control: without the random states, the noise differs.
    del saved["lightning_mue_random_states"]
    torch.save(saved, tmp_path / "no_random.ckpt")
    assert not torch.equal(run(ckpt_path=tmp_path / "no_random.ckpt", **limits), reference)


def test_the_newest_are_kept_and_those_of_every_so_many_steps(run, tmp_path):
    run(SafeCheckpoint(every_n_train_steps=1, keep_last=2, keep_every=3))  # in default_root_dir
    assert names(tmp_path / "checkpoints") == ["step-000003", "step-000005", "step-000006"]
    assert SafeCheckpoint.latest(tmp_path / "checkpoints").endswith("step-000006/checkpoint.ckpt")


def test_the_last_step_is_saved(run, tmp_path):
    run(SafeCheckpoint(tmp_path / "steps", every_n_train_steps=4))
    assert names(tmp_path / "steps") == ["step-000004", "step-000006"]


@pytest.mark.slow
def test_the_last_step_of_the_last_epoch_is_saved(run, tmp_path):
    run(SafeCheckpoint(tmp_path / "epochs", every_n_train_steps=100), max_steps=-1, max_epochs=1)
    assert names(tmp_path / "epochs") == ["step-000014"]
    reference = run(max_steps=-1, max_epochs=2)
    path = SafeCheckpoint.latest(tmp_path / "epochs")
    assert torch.equal(run(SafeCheckpoint(tmp_path / "2"), ckpt_path=path, max_steps=-1, max_epochs=2), reference)


def test_max_time_saves_before_the_end_in_the_middle_of_an_accumulation(run, tmp_path):
    class Stops(At):
        def on_train_batch_start(self, trainer, *args):
            self.do = lambda: setattr(trainer, "should_stop", True)
            super().on_train_batch_start(trainer, *args)

    run(SafeCheckpoint(tmp_path / "safe", every_n_train_steps=100), Stops(4, None), accumulate_grad_batches=3)
    assert names(tmp_path / "safe") == ["step-000001"]
    saved = torch.load(SafeCheckpoint.latest(tmp_path / "safe"), weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"]["processed"] == 3  # the two since the step do not count


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(saved, damage):
    newest = saved / "step-000006"
    file, manifest = newest / "checkpoint.ckpt", newest / "manifest.json"
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 6', '"step": 7'))
    else:
        manifest.unlink()  # then it is somebody else's folder
    warns = pytest.warns(UserWarning, match="step-000006.*The one before is taken now")
    with warns if damage != "no manifest" else nullcontext():
        assert SafeCheckpoint.latest(saved).endswith("step-000003/checkpoint.ckpt")


def test_fifty_flipped_bits_are_found_wherever_they_are(saved):
    sound = (saved / "step-000006" / "checkpoint.ckpt").read_bytes()
    for seed in range(20):
        flip(saved / "step-000006" / "checkpoint.ckpt", seed=seed)
        assert list(folder.damages(saved / "step-000006")) == ["checkpoint.ckpt with other bytes than were written"]
        (saved / "step-000006" / "checkpoint.ckpt").write_bytes(sound)
    assert list(folder.damages(saved / "step-000006")) == []


def test_a_damaged_one_is_deleted_before_a_sound_one(saved):
    (saved / "step-000006" / "manifest.json").write_text("{}")
    folder.remove_old(saved, keep_last=1, keep_every=None)
    assert names(saved) == ["step-000003"]


def test_flipped_bytes_that_lightning_would_accept_are_refused(run, saved, tmp_path):
    file = saved / "step-000006" / "checkpoint.ckpt"
    state = torch.load(file, weights_only=True)
    first = next(iter(state["state_dict"].values())).numpy().tobytes()[:64]
    data = file.read_bytes().replace(first, bytes(64))
    assert data != file.read_bytes()
    file.write_bytes(data)
    torch.load(file, weights_only=True)  # it can be read
    with pytest.raises(ValueError, match=r"checkpoint: found .*step-000006: checkpoint.ckpt with other bytes"):
        run(SafeCheckpoint(tmp_path / "safe"), ckpt_path=file, max_steps=8)


def test_no_space_keeps_the_old_ones_and_the_run_goes_on(run, saved, monkeypatch):
    folder.remove(saved / "step-000006")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**4))
    path = SafeCheckpoint.latest(saved)
    with pytest.warns(UserWarning, match=r"that of step 6 not written \(OSError: 1e-05 GB free"):
        run(SafeCheckpoint(saved, every_n_train_steps=3), ckpt_path=path)
    assert names(saved) == ["step-000003"]


@pytest.mark.parametrize("place", ["torch.save", pytest.param("folder.finish", marks=pytest.mark.slow)])
def test_a_failed_write_is_told_and_leaves_the_old_ones(run, tmp_path, monkeypatch, place):
    fails = {"now": False}
    module, name = {"torch": torch, "folder": folder}[place.split(".")[0]], place.split(".")[1]
    original = getattr(module, name)

    def act(*args, **kwargs):
        if fails["now"]:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, act)
    safe = SafeCheckpoint(tmp_path / "safe", every_n_train_steps=1, keep_last=1)
    with pytest.warns(UserWarning, match="that of step . not written .*failed writing file.*older checkpoints"):
        run(safe, At(3, lambda: (safe._writer.wait(), fails.update(now=True))))
    assert names(tmp_path / "safe") == ["step-000003"]
    assert SafeCheckpoint.latest(tmp_path / "safe") is not None


def test_leftovers_of_kills_are_removed_and_never_taken(run, tmp_path):
    (tmp_path / "safe" / "step-000099.tmp").mkdir(parents=True)
    (tmp_path / "safe" / "step-000098").mkdir()  # somebody else's
    assert SafeCheckpoint.latest(tmp_path / "safe") is None
    run(SafeCheckpoint(tmp_path / "safe", every_n_train_steps=6, keep_last=1))
    assert names(tmp_path / "safe") == ["step-000006", "step-000098"]


def test_a_run_that_went_back_writes_the_newest(run, saved):
    run(SafeCheckpoint(saved), ckpt_path=saved / "step-000003" / "checkpoint.ckpt", max_steps=4)
    assert SafeCheckpoint.latest(saved).endswith("step-000004/checkpoint.ckpt")


def test_a_run_that_starts_anew_over_checkpoints_is_warned_of(run, saved):
    with pytest.warns(UserWarning, match="2 checkpoint.* and a run that starts at step 0"):
        run(SafeCheckpoint(saved, every_n_train_steps=3), max_steps=3)
    assert SafeCheckpoint.latest(saved).endswith("step-000003/checkpoint.ckpt")  # the new one, in the old one's place


@pytest.mark.slow
def test_a_model_checkpoint_of_the_user_beside_it(run, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=2, save_top_k=-1)
    safe = SafeCheckpoint(tmp_path / "safe", every_n_train_steps=2)
    reference = run(safe, own)
    assert len(names(tmp_path / "own")) == 3
    for path in (SafeCheckpoint.latest(tmp_path / "safe"), tmp_path / "safe/step-000002/checkpoint.ckpt"):
        assert torch.equal(run(SafeCheckpoint(tmp_path / "2"), own, ckpt_path=path), reference)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_143(run, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    reference = run(accumulate_grad_batches=2)
    safe = SafeCheckpoint(tmp_path / "safe", every_n_train_steps=100)
    with pytest.raises(SystemExit) as exit_:
        run(safe, At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), accumulate_grad_batches=2)
    assert exit_.value.code == 143
    assert names(tmp_path / "safe") == ["step-000003"]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == before[0]
    path = SafeCheckpoint.latest(tmp_path / "safe")
    again = run(SafeCheckpoint(tmp_path / "2"), ckpt_path=path, accumulate_grad_batches=2)
    assert torch.equal(again, reference)


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_calls_the_handler_that_was_there(run, tmp_path):
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *args: calls.append(args))
    try:
        reference = run()
        again = run(
            SafeCheckpoint(tmp_path / "safe", every_n_train_steps=100),
            At(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)),
        )
        assert torch.equal(again, reference)
        assert len(calls) == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(calls) == 2  # given back
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert names(tmp_path / "safe") == ["step-000003", "step-000006"]


def test_what_cannot_be_saved_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="several SafeCheckpoints, expected one"):
        run(SafeCheckpoint(tmp_path / "a"), SafeCheckpoint(tmp_path / "b"))
    with pytest.raises(ValueError, match="keep_every: found 5, expected a multiple of every_n_train_steps=2"):
        SafeCheckpoint(every_n_train_steps=2, keep_every=5)
    with pytest.raises(ValueError, match="keep_last: found 0"):
        SafeCheckpoint(keep_last=0)
    with pytest.raises(TypeError, match="dirpath: found 3"):
        SafeCheckpoint(3)
    trainer = Trainer(accelerator="cpu", strategy="fsdp", devices=1) if torch.cuda.is_available() else None
    if trainer is not None:
        with pytest.raises(ValueError, match="strategy FSDPStrategy"):
            SafeCheckpoint().setup(trainer, None, "fit")


def test_bytes_of_shared_memory_count_once():
    x = torch.zeros(100)
    assert writing.bytes_of({"a": x, "b": [x[:50], {"c": torch.zeros(3, dtype=torch.float64)}]}) == 424


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_thread_that_writes_steps_back_and_the_training_does_not():
    def own():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen = own(), []
    writer = writing.Writer()
    for _ in range(2):
        writer.start(lambda: seen.append(own()))
        writer.wait()
    assert seen == [min(before + 10, 19)] * 2
    assert own() == before
    assert writer.error() is None
