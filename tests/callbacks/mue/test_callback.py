from __future__ import annotations

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, MuECallback
from lightning_mue.callbacks.mue import checks
from lightning_mue.data import TextDataModule
from lightning_mue.optim import hypersphere
from lightning_mue.optim.schedule import WarmupDecay
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.reading.sites import read_multipliers

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}


def batches(count=64, seed=0):
    rows = torch.randint(0, 64, (count, 17), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": row[:-1], "targets": row[1:]} for row in rows]


def loader(count=64):
    return DataLoader(batches(count), batch_size=4)


def make_model(optimizer=None, scheduler=None, **kwargs):
    torch.manual_seed(11)
    sizes = {"vocab_size": 64, "context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 4, **kwargs}
    make = optimizer or (lambda params: AdamW(params, lr=1e-2, weight_decay=0.1))
    return MoELanguageModel(**sizes, optimizer=make, scheduler=scheduler)


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def fit(model, callbacks=(), max_steps=6, ckpt_path=None, **kwargs):
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=max_steps, callbacks=list(callbacks), **{**settings, **kwargs})
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer


def mue(**kwargs):
    return MuECallback(**{"base": BASE, "verbose": False, **kwargs})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        ("complete-mue", lambda params: AdamW(params, lr=1e-2)),
        ("sp", lambda params: SGD(params, lr=1e-2, momentum=0.9)),
        ("hyperp", lambda params: HyperSphereOptimizer(params, lr=1e-2)),
    ],
)
def test_at_base_size_losses_are_the_same_bit_for_bit(rule, optimizer):
    traces = []
    for callbacks in ([], [MuECallback(rule=rule, base={"width": 64}, verbose=False)]):
        torch.manual_seed(5)
        losses = Losses()
        fit(make_model(optimizer), [*callbacks, losses], max_steps=50)
        traces.append(losses.values)
    assert len(traces[0]) == 50
    assert traces[0] == traces[1]


def test_off_base_size_they_differ():
    """The control of the test above."""
    traces = []
    for callbacks in ([], [mue()]):
        losses = Losses()
        fit(make_model(), [*callbacks, losses], max_steps=3)
        traces.append(losses.values)
    assert traces[0] != traces[1]


class Seeing(AdamW):
    """Notes the group of each parameter at the moment of its update."""

    seen: ClassVar[dict] = {}

    def _init_group(self, group, params_with_grad, *args, **kwargs):
        result = super()._init_group(group, params_with_grad, *args, **kwargs)
        self.seen.update({id(p): group["lr"] for p in params_with_grad})
        return result


def test_sets_weights_multipliers_and_steps():
    model, callback = make_model(lambda params: Seeing(params, lr=1e-2)), mue()
    spy = []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            spy.append(weights(pl_module))

    trainer = fit(model, [callback, Spy()], max_steps=1)
    router = spy[0]["transformer.blocks.0.ffn.router.weight"]
    assert router.std().item() == pytest.approx(32**0.5 / 64, rel=0.25)
    assert model.transformer.blocks[0].ffn.route_scale == 2.0
    assert Seeing.seen[id(model.transformer.blocks[0].attention.w_q)] == pytest.approx(0.5e-2)
    assert Seeing.seen[id(model.transformer.embedding.weight)] == pytest.approx(1e-2)
    assert len(trainer.optimizers[0].param_groups) == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2


def test_hypersphere_kinds_come_from_the_plan(monkeypatch):
    seen = {}

    def prepare(group, *args):
        seen.update({id(p): (group["kind"], group["lr"]) for p in group["params"]})
        return whole(group, *args)

    whole = hypersphere.prepare
    monkeypatch.setattr(hypersphere, "prepare", prepare)
    model = make_model(lambda params: HyperSphereOptimizer([p for _, p in params], lr=0.02, adamw_lr=0.005))
    fit(model, [MuECallback(rule="hyperp", base={**BASE, "depth": 8}, verbose=False)], max_steps=2)
    assert seen[id(model.transformer.blocks[0].ffn.experts.w_up)] == ("sphere", pytest.approx(0.02 * 2))
    assert seen[id(model.transformer.unembedding.weight)] == ("adam_sphere", pytest.approx(0.02 * 2))
    assert seen[id(model.transformer.embedding.weight)] == ("adamw", pytest.approx(0.005 * 2))
    radius = model.transformer.blocks[0].attention.w_q.norm()
    initial = mue(rule="hyperp").make_plan(model, [HyperSphereOptimizer(model.named_parameters())])
    assert radius.item() == pytest.approx(initial["transformer.blocks.0.attention.w_q"].init.value * 64, rel=0.05)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_exact(tmp_path, accumulate, stop):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(bytes(torch.randint(0, 64, (4000,), generator=torch.Generator().manual_seed(0)).tolist()))

    def run(max_steps, ckpt_path=None, dirpath=None):
        model = make_model(vocab_size=256, scheduler=lambda o: WarmupDecay(o, total_steps=8, warmup=0.25))
        savers = [ModelCheckpoint(dirpath=dirpath, every_n_train_steps=stop, save_top_k=-1)] if dirpath else []
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            callbacks=[mue(), *savers],
            logger=False,
            enable_checkpointing=bool(savers),
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        data = TextDataModule(corpus, context_length=16, batch_size=4, cache_dir=tmp_path / "cache")
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return weights(model)

    whole = run(8)
    run(stop, dirpath=tmp_path / "saved")
    path = next((tmp_path / "saved").glob("*.ckpt"))
    torch.load(path, weights_only=True)
    resumed = run(8, ckpt_path=path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_second_fit_keeps_what_was_learned():
    model = make_model()
    fit(model, [mue()], max_steps=3)
    learned = weights(model)
    start = []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(weights(pl_module))

    fit(model, [mue(), Spy()], max_steps=3)
    assert all(torch.equal(learned[name], start[0][name]) for name in learned)


def test_kept_weights_under_another_plan_are_told(tmp_path):
    """The table's initial stds were not used. Not told: the first fit, the same plan again, no stds, a resumed run."""

    def told(model, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, [mue(**kwargs)], max_steps=1)
        return [str(w.message) for w in caught if "weights were kept" in str(w.message)]

    model = make_model()
    assert told(model) == told(model) == []
    (message,) = told(model, rule="sp")
    assert "another plan (complete-mue; now sp)" in message
    assert "initial stds" in message
    assert told(model, rule="sp") == []
    assert told(model, base={"width": 64}) == []
    assert told(make_model()) == []
    assert len(told(model, rule="mup", base={**BASE, "n_experts": 4})) == 1
    assert told(model, initialize=False) == []
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    model = make_model()
    fit(model, [mue(), saver], max_steps=2, enable_checkpointing=True)
    model._mue_last_plan = mue(rule="sp").make_plan(model, [])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights were kept")
        fit(model, [mue()], max_steps=3, ckpt_path=tmp_path / "last.ckpt")


def test_a_longer_resumed_run_is_told_how_to_go_on(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    base = {**BASE, "tokens": 64.0, "batch_tokens": 32.0}
    counted = {"base": base, "batch_tokens": 64.0}
    fit(make_model(), [mue(**counted), saver], max_steps=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"MuECallback\(tokens=128, \.\.\.\) goes on"):
        fit(make_model(), [mue(**counted)], max_steps=4, ckpt_path=tmp_path / "last.ckpt")
    trainer = fit(make_model(), [mue(**counted, tokens=128.0)], max_steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4
    with pytest.raises(ValueError, match=r"ckpt_path: .*another plan") as error:  # the length is not what differs
        fit(make_model(), [mue(**counted, tokens=128.0, rule="sp")], max_steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert "goes on" not in str(error.value)


def test_model_loaded_from_a_checkpoint_keeps_its_weights_and_multipliers(tmp_path):
    model = make_model()
    trainer = fit(model, [mue()], max_steps=3)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MoELanguageModel.load_from_checkpoint(tmp_path / "model.ckpt")
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.transformer.blocks[0].ffn.route_scale == 2.0
    learned, start = weights(loaded), []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(weights(pl_module))

    loaded.optimizer = lambda params: AdamW(params, lr=1e-2)
    fit(loaded, [mue(), Spy()], max_steps=1)
    assert all(torch.equal(learned[name], start[0][name]) for name in learned)


def test_another_plan_on_resume_is_refused_with_the_differences(tmp_path):
    trainer = fit(make_model(), [mue()], max_steps=2)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"ckpt_path: found .*another plan.*\n.*base_axes\.width: 32 -> 16\n") as error:
        fit(make_model(), [mue(base={**BASE, "width": 16})], max_steps=4, ckpt_path=path)
    assert "hidden" not in str(error.value) or ".lr: 0.5 -> 0.25" in str(error.value)
    assert path.read_bytes() == content


def test_checkpoint_after_a_crash_holds_the_users_own_groups(tmp_path):
    class Crashing(MoELanguageModel):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise RuntimeError("node lost")
            return super().training_step(batch, batch_idx)

    class Rescue(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "rescue.ckpt")

    torch.manual_seed(0)
    model = Crashing(64, 16, 64, 2, n_experts=4, optimizer=lambda p: AdamW(p, lr=1e-2))
    with pytest.raises(RuntimeError, match="node lost"):
        fit(model, [mue(base={"width": 32}), Rescue()])
    saved = torch.load(tmp_path / "rescue.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-2]


def test_multipliers_hold_in_validation_without_fit():
    model = make_model()
    trainer = Trainer(accelerator="cpu", callbacks=[mue()], logger=False, enable_progress_bar=False)
    trainer.validate(model, loader(8), verbose=False)
    assert model.transformer.blocks[0].ffn.route_scale == 2.0


def test_validation_of_a_checkpoint_uses_its_own_multipliers(tmp_path):
    model = make_model()
    trainer = fit(model, [mue()], max_steps=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = make_model()
    callback = mue(base={**BASE, "width": 16})
    settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], **settings)
    trainer.validate(other, loader(8), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert read_multipliers(other) == read_multipliers(model)
    # A fresh fit of the same callback is not held to that checkpoint's plan.
    fit(make_model(), [callback], max_steps=1)


def test_one_callback_serves_several_models():
    callback = mue()
    for _ in range(2):
        model = make_model()
        trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
        trainer.validate(model, loader(8), verbose=False)
        assert model.transformer.blocks[0].ffn.route_scale == 2.0


def test_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path):
    trainer = fit(make_model(), [], max_steps=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="ckpt_path: found a checkpoint that holds no plan"):
        fit(make_model(), [mue()], max_steps=2, ckpt_path=tmp_path / "model.ckpt")
    fit(make_model(), [mue(base={"width": 64})], max_steps=2, ckpt_path=tmp_path / "model.ckpt")


def test_measured_digits_do_not_keep_a_run_from_resuming(tmp_path):
    """The base's spread is measured, and its last digits depend on the number of threads."""
    trainer = fit(make_model(), [mue()], max_steps=1)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    (state,) = [s for name, s in saved["callbacks"].items() if "MuECallback" in name]
    state["plan"]["parameters"][0]["init"]["value"] *= 1 + 1e-7
    torch.save(saved, path)
    fit(make_model(), [mue()], max_steps=2, ckpt_path=path)


@pytest.mark.parametrize("settings", [{"barebones": True}, {"log_every_n_steps": 0}])
def test_trainer_that_logs_nothing(settings):
    quiet = (
        {}
        if "barebones" in settings
        else {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    )
    trainer = Trainer(accelerator="cpu", max_steps=2, callbacks=[mue()], **quiet, **settings)
    trainer.fit(make_model(), loader())


def test_coupled_weight_decay_is_warned_of():
    with pytest.warns(UserWarning, match="Use AdamW"):
        fit(make_model(lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1)), [mue()], max_steps=1)


def test_logs_effective_rates_and_the_table(tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [mue(verbose=True), LearningRateMonitor()]
    fit(make_model(), callbacks, max_steps=4, logger=logger, log_every_n_steps=2)
    assert ScalingPlan.load(tmp_path / "plan.yaml") == callbacks[0].plan
    assert "complete-mue (adam, alpha=1)" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("mue/lr/hidden")] == [pytest.approx(5e-3), pytest.approx(5e-3)]
    assert [e.value for e in events.Scalars("mue/lr/embedding")] == [pytest.approx(1e-2)] * 2
    text = events.Tensors("parameterization/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| router |" in text
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_move_that_the_rule_does_not_claim_is_warned_of_without_the_table(caplog):
    fit(make_model(depth=4, n_experts=0), [MuECallback(rule="mup", base={"depth": 2}, verbose=False)], max_steps=1)
    assert any("depth differs from the base (2 -> 4), but mup does not claim" in r.message for r in caplog.records)


def test_works_with_another_logger(tmp_path):
    fit(make_model(), [mue()], max_steps=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert "mue/lr/hidden" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_initialize_false_keeps_weights_given_by_hand():
    model = make_model()
    before, start = weights(model), []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(weights(pl_module))

    fit(model, [mue(initialize=False), Spy()], max_steps=1)
    assert all(torch.equal(before[name], start[0][name]) for name in before)
    assert model.transformer.blocks[0].ffn.route_scale == 2.0


class Plain(LightningModule):
    """A LightningModule as anyone has it: nothing of it is declared for this package."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-2)


def test_existing_module_and_trainer():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(list(zip(x, x[:, :4].argmax(1), strict=True)), batch_size=16)
    callback = MuECallback(rule="mup", base={"width": 32}, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Plain(128), data)
    assert callback.plan is not None
    assert callback.plan["net.2.weight"].lr == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("kwargs", "optimizer", "message"),
    [
        ({"rule": "nothing"}, None, "rule: found 'nothing'"),
        ({"base": {"n_layers": 2}}, None, r"base\.n_layers"),
        ({"alpha": 2.0}, None, "alpha: found 2"),
        ({}, lambda p: torch.optim.Adagrad(p), "optimizer: found Adagrad"),
        ({}, lambda p: HyperSphereOptimizer(p), r"no table.*'sphere'.*hyperp"),
        ({"rule": "hyperp"}, None, r"'hyperp'.*no (table|row).*'adam'"),
        ({"tokens": 1e6}, None, "tokens: "),
        ({"roles": {"nothing_like_it": "hidden"}}, None, "match no parameter"),
    ],
)
def test_bad_input_is_told_before_step_0(kwargs, optimizer, message):
    losses = Losses()
    with pytest.raises(ValueError, match=message):
        fit(make_model(optimizer), [mue(**kwargs), losses])
    assert losses.values == []


def test_zero_matrix_on_the_sphere_is_named():
    def optimizer(params):
        params = list(params)
        dict(params)["transformer.blocks.1.attention.w_o"].data.zero_()
        return HyperSphereOptimizer(params)

    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.w_o.*zero"):
        fit(make_model(optimizer), [mue(rule="hyperp")])


def test_callback_can_be_copied_before_a_run():
    callback = copy.deepcopy(mue())
    assert callback.state_dict() == {}


def test_an_optimizer_that_trains_nothing_is_refused_before_a_plan_is_made(monkeypatch):
    """Its own fault comes first, not that of the plan which its parameters would have."""
    monkeypatch.setattr(checks, "is_sharded", lambda parameter: True)
    model = make_model(optimizer=lambda params: AdamW([nn.Parameter(torch.zeros(2))], lr=1e-2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^optimizer: found AdamW, which holds none of the module's parameters"):
        fit(model, [MuECallback(base={"no_such_size": 1})])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
