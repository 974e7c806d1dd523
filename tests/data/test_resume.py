"""A run that is stopped and resumed sees exactly the batches of a run that never stopped, through a real Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_mue.data import TextDataModule

BATCHES_PER_EPOCH = 6  # 96 training tokens / (2 windows of 8)


@pytest.fixture
def make_data(text_file, tmp_path):
    def make(cls=TextDataModule, **kwargs):
        arguments = {"context_length": 8, "batch_size": 2, "val_fraction": 0.2, "cache_dir": tmp_path / "cache"}
        return cls(text_file, **{**arguments, **kwargs})

    return make


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def train(model, data, trainer, ckpt_path=None):
    torch.manual_seed(0)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class ForgetfulDataModule(TextDataModule):
    """What a plain DataLoader does: every fit starts from the first batch."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(list(super().train_dataloader()), batch_size=None)

    def _batches_trained(self):
        return 0


LIMITS = [
    pytest.param({"max_steps": 8, "accumulate_grad_batches": 1}, id="8 steps"),
    pytest.param({"max_steps": 8, "accumulate_grad_batches": 2}, id="8 steps of 2 batches"),
    pytest.param({"max_epochs": 2}, id="2 epochs"),
    pytest.param({"max_epochs": 2, "accumulate_grad_batches": 4}, id="2 epochs, accumulation uneven"),
    pytest.param({"max_steps": 8, "limit_train_batches": 4}, id="epochs cut to 4 batches"),
    pytest.param({"max_epochs": 3, "limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1}, id="reloading"),
    pytest.param({"max_steps": 8, "val_check_interval": 3}, id="validation within epochs"),
]


@pytest.mark.parametrize("limits", LIMITS)
def test_resume_from_every_step_is_exact(limits, make_data, make_trainer, recorder, tmp_path):
    limits = {"limit_val_batches": 0, **limits}
    if "val_check_interval" in limits:
        del limits["limit_val_batches"]
    saver = every_step(tmp_path / "ckpt")
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, **limits)
    reference = train(recorder(), make_data(), trainer)
    assert len({str(batch) for batch in reference.seen}) == len(reference.seen) >= 8

    checkpoints = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) == trainer.global_step
    for path in checkpoints:
        checkpoint = torch.load(path, weights_only=True)
        n_seen = checkpoint["n_seen"]
        (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert state["step"] == n_seen, "the saved state runs ahead of what was trained on"
        resumed = train(recorder(), make_data(), make_trainer(**limits), ckpt_path=path)
        assert resumed.seen == reference.seen[n_seen:], f"resumed after {n_seen} batches"
        assert torch.equal(weights(resumed), weights(reference))


@pytest.mark.parametrize("when", ["train epoch end", "validation end"])
@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_steps": 4 * BATCHES_PER_EPOCH}])
def test_resume_between_epochs_is_exact(when, limit, make_data, make_trainer, recorder, tmp_path):
    """With max_epochs Lightning does not hand a loader its saved state here; it would start again at step 0."""
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "train epoch end"
    )
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, num_sanity_val_steps=0, **limit)
    reference = train(recorder(), make_data(), trainer)
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        n_seen = torch.load(path, weights_only=True)["n_seen"]
        assert n_seen == (epoch + 1) * BATCHES_PER_EPOCH
        resumed = train(recorder(), make_data(), make_trainer(num_sanity_val_steps=0, **limit), ckpt_path=path)
        assert resumed.seen == reference.seen[n_seen:]


@pytest.mark.parametrize("step", [3, 8])
def test_a_loader_without_state_fails_the_same_check(step, make_data, make_trainer, recorder, tmp_path):
    """Negative control: the comparison above tells a stream that starts again from one that continues."""
    saver = every_step(tmp_path / "ckpt")
    arguments = {"max_steps": 10, "limit_val_batches": 0}
    forgetful = make_data(ForgetfulDataModule)
    reference = train(recorder(), forgetful, make_trainer(callbacks=[saver], enable_checkpointing=True, **arguments))
    path = tmp_path / "ckpt" / f"step={step}.ckpt"
    resumed = train(recorder(), make_data(ForgetfulDataModule), make_trainer(**arguments), ckpt_path=path)
    assert len(resumed.seen) == len(reference.seen[step:])
    assert resumed.seen != reference.seen[step:]


@pytest.mark.parametrize("fail_at", [0, 4, 5, 6, 9])
def test_a_batch_that_raised_is_seen_again(fail_at, make_data, make_trainer, recorder, tmp_path):
    reference = train(recorder(), make_data(), make_trainer(max_steps=11, limit_val_batches=0))
    trainer = make_trainer(
        max_steps=11, limit_val_batches=0, callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True
    )
    crashed = recorder(fail_at=fail_at)
    with pytest.raises(RuntimeError, match="stop here"):
        train(crashed, make_data(), trainer)
    path = tmp_path / "on_exception.ckpt"
    resumed = train(recorder(), make_data(), make_trainer(max_steps=11, limit_val_batches=0), ckpt_path=path)
    assert crashed.seen + resumed.seen == reference.seen


def test_a_run_may_be_resumed_twice(make_data, make_trainer, recorder, tmp_path):
    reference = train(recorder(), make_data(), make_trainer(max_steps=14, limit_val_batches=0))
    seen, path = [], None
    for max_steps in (4, 5, 9, 14):
        trainer = make_trainer(max_steps=max_steps, limit_val_batches=0)
        seen += train(recorder(), make_data(), trainer, ckpt_path=path).seen
        path = tmp_path / f"{max_steps}.ckpt"
        trainer.save_checkpoint(path)
    assert seen == reference.seen


def test_a_second_fit_continues_and_a_new_trainer_starts_again(make_data, make_trainer, recorder):
    reference = train(recorder(), make_data(), make_trainer(max_steps=9, limit_val_batches=0))
    data, model = make_data(), recorder()
    trainer = make_trainer(max_steps=5, limit_val_batches=0)
    train(model, data, trainer)
    trainer.fit_loop.epoch_loop.max_steps = 9
    train(model, data, trainer)
    assert model.seen == reference.seen
    again = train(recorder(), data, make_trainer(max_steps=9, limit_val_batches=0))
    assert again.seen == reference.seen


def test_validation_and_logging_do_not_change_what_is_trained_on(make_data, make_trainer, recorder):
    plain = train(recorder(), make_data(), make_trainer(max_steps=8, limit_val_batches=0))
    validated = train(recorder(), make_data(), make_trainer(max_steps=8, val_check_interval=1, num_sanity_val_steps=2))
    assert validated.seen == plain.seen
    one_pass = validated.seen_in_validation[:1]
    assert len(validated.seen_in_validation) == 1 + 8
    assert validated.seen_in_validation == one_pass * 9


def test_resuming_with_another_batch_size_warns(make_data, make_trainer, recorder, tmp_path):
    trainer = make_trainer(max_steps=3, limit_val_batches=0)
    train(recorder(), make_data(), trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="batch_size: 2 -> 3"):
        train(
            recorder(),
            make_data(batch_size=3),
            make_trainer(max_steps=5, limit_val_batches=0),
            ckpt_path=tmp_path / "a.ckpt",
        )


def test_overfit_batches_repeats_the_same_batches(make_data, make_trainer, recorder):
    model = train(recorder(), make_data(), make_trainer(max_epochs=3, overfit_batches=2))
    assert len(model.seen) == 6
    assert model.seen == model.seen[:2] * 3
    assert model.seen[0] != model.seen[1]


def test_fast_dev_run_and_the_other_stages(make_data, make_trainer, recorder):
    data, model = make_data(), recorder()
    trainer = make_trainer(fast_dev_run=True)
    train(model, data, trainer)
    trainer = make_trainer()
    trainer.validate(model, datamodule=data)
    validated = model.seen_in_validation[-1]
    trainer.test(model, datamodule=data)
    assert model.seen_in_validation[-1] == validated
    (predicted,) = trainer.predict(model, datamodule=data)
    assert predicted.tolist() == validated


class WriteSeen(Callback):
    """Writes what each process saw: the test process cannot look into its children."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        seen = {
            "train": pl_module.seen,
            "val": pl_module.seen_in_validation,
            "batch_tokens": trainer.datamodule.batch_tokens,
        }
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")


def test_two_processes_share_the_work(make_data, make_trainer, recorder, tmp_path):
    trainer = make_trainer(
        strategy="ddp_fork", devices=2, max_epochs=1, num_sanity_val_steps=0, callbacks=[WriteSeen(tmp_path)]
    )
    trainer.fit(recorder(), datamodule=make_data(batch_size=1))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [rank["batch_tokens"] for rank in ranks] == [16, 16]
    assert [len(rank["train"]) for rank in ranks] == [BATCHES_PER_EPOCH, BATCHES_PER_EPOCH]
    windows = [{str(window) for batch in rank["train"] for window in batch} for rank in ranks]
    assert windows[0] != windows[1]

    single = make_data(batch_size=1)
    single.prepare_data()
    single.setup()
    assert ranks[0]["train"] == [
        single.train_dataloader().batch(i)["tokens"].tolist() for i in range(BATCHES_PER_EPOCH)
    ]
    by_one = [batch["tokens"].tolist() for batch in single.val_dataloader()]
    assert [rank["val"] for rank in ranks] == [by_one[0::2], by_one[1::2]]
