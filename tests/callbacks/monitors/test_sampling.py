"""When a monitor samples, what it costs when it does not, and what it leaves behind."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.probes import by_layer, find_modules, layer_labels, over_layers
from lightning_mue.callbacks.monitors.routing import RouterMonitor

TAG = "stability/z/lm_logits"
#: LM head, two attention cores, two routers.
HOOKS = 5
MONITORS = (LogitsZMonitor, ActivationOutlierMonitor, RouterMonitor)


def z(logits):
    return logits.double().logsumexp(-1).square().mean().item()


def lm_values(model, steps):
    return pytest.approx([z(model.seen["lm_logits"][step][0]) for step in steps], rel=2e-6)


@pytest.mark.parametrize(("every", "sampled"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (7, [])])
def test_hooks_exist_in_sampled_steps_only(toy, every, sampled):
    model, logger = toy.fit([LogitsZMonitor(every_n_steps=every)], log_every_n_steps=1000)
    assert model.hooks_in_training == [HOOKS * (step in sampled) for step in range(6)]
    assert toy.n_hooks(model) == 0
    assert logger.steps(TAG) == sampled
    assert logger.values(TAG) == lm_values(model, sampled)


def test_follows_the_trainer_on_the_same_x_axis(toy):
    _, logger = toy.fit([LogitsZMonitor()], n_batches=7, max_epochs=2, log_every_n_steps=3)
    assert logger.steps(TAG) == logger.steps("train/loss") == [2, 5, 8, 11]


def test_accumulation_samples_the_batch_that_steps(toy):
    # Seven batches an epoch, three a step: the Trainer steps at batches 2, 5 and, early, 6.
    model, logger = toy.fit(
        [LogitsZMonitor(every_n_steps=2)], n_batches=7, max_epochs=2, accumulate_grad_batches=3, log_every_n_steps=2
    )
    sampled = [5, 7 + 2, 7 + 6]
    assert [i for i, hooks in enumerate(model.hooks_in_training) if hooks] == sampled
    assert logger.steps(TAG) == logger.steps("train/loss") == [1, 3, 5]
    assert logger.values(TAG) == lm_values(model, sampled)


def test_accumulation_over_an_iterable_of_unknown_length(toy):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from toy.tokens(4).dataset

    model, logger = toy.make_model(), toy.MemoryLogger()
    trainer = toy.make_trainer([LogitsZMonitor()], logger, accumulate_grad_batches=3)
    trainer.fit(model, torch.utils.data.DataLoader(Stream(), batch_size=2))
    assert trainer.global_step == 2
    assert [i for i, hooks in enumerate(model.hooks_in_training) if hooks] == [2, 3]  # 3: the last, found by look-ahead


@pytest.mark.parametrize(
    "options",
    [{"logger": False}, {"logger": False, "fast_dev_run": 2}, {"barebones": True, "logger": None}],
    ids=["no_logger", "fast_dev_run", "barebones"],
)
def test_nothing_without_a_logger(toy, options):
    options = {**options, "log_every_n_steps": None} if "barebones" in options else options
    if "barebones" in options:
        options |= {"enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    logger = options.pop("logger")
    model = toy.make_model()
    trainer = toy.make_trainer([monitor(1) for monitor in MONITORS], logger, **options)
    trainer.fit(model, toy.tokens())
    assert len(model.hooks_in_training) >= 2
    assert set(model.hooks_in_training) == {0}
    assert not any(tag.startswith(("stability", "routing")) for tag in trainer.callback_metrics)


def test_fast_dev_run_with_a_logger_runs_the_monitor(toy):
    model, _ = toy.fit([LogitsZMonitor()], fast_dev_run=2)
    assert model.hooks_in_training == [HOOKS, HOOKS]


def test_validation_and_sanity_check_have_no_hooks(toy):
    model, logger = toy.make_model(cls=toy.ValidatedToyModel), toy.MemoryLogger()
    trainer = toy.make_trainer([LogitsZMonitor()], logger, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(model, toy.tokens(4), toy.tokens(3))
    assert len(model.hooks_in_validation) == 2 + 2 * 3
    assert set(model.hooks_in_validation) == {0}
    assert logger.values(TAG) == lm_values(model, range(4))


def test_an_exception_leaves_no_hooks_and_the_next_fit_works(toy):
    class Failing(toy.ToyModel):
        fail = True

        def loss(self, tokens):
            loss = super().loss(tokens)
            if self.fail and len(self.hooks_in_training) == 2:
                raise RuntimeError("broken batch")
            return loss

    model, monitor = toy.make_model(cls=Failing), LogitsZMonitor()
    with pytest.raises(RuntimeError, match="broken batch"):
        toy.fit([monitor], model=model)
    assert model.hooks_in_training == [HOOKS, HOOKS]
    assert toy.n_hooks(model) == 0
    model.fail = False
    _, logger = toy.fit([monitor], model=model, n_batches=3)
    assert logger.steps(TAG) == [0, 1, 2]
    assert logger.values(TAG) == lm_values(model, [2, 3, 4])  # nothing of the broken batch is left in them


def test_a_skipped_epoch_leaves_no_hooks(toy):
    class Skipping(toy.ToyModel):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    model, logger = toy.fit([LogitsZMonitor()], model=toy.make_model(cls=Skipping), max_epochs=2)
    assert toy.n_hooks(model) == 0
    assert len(logger.values(TAG)) == len(model.hooks_in_training) == 2


def test_one_collective_a_sampled_step(toy, monkeypatch):
    calls = []

    class Spy(Callback):
        def on_fit_start(self, trainer, pl_module):
            for name in ("all_gather", "reduce", "reduce_boolean_decision", "broadcast", "barrier"):
                plain = getattr(trainer.strategy, name)
                monkeypatch.setattr(
                    trainer.strategy,
                    name,
                    lambda *args, plain=plain, name=name, **kwargs: calls.append(name) or plain(*args, **kwargs),
                )

        def on_train_batch_end(self, trainer, *_):
            calls.append("batch")

    toy.fit([Spy()], n_batches=4)  # what the Trainer itself does
    without = list(calls)
    calls.clear()
    toy.fit([monitor(2) for monitor in MONITORS] + [Spy()], n_batches=4)  # the Trainer calls Spy last
    assert "all_gather" not in without
    assert [call for call in calls if call != "all_gather"] == without
    order = [call for call in calls if call in ("all_gather", "batch")]
    assert order == ["batch", "all_gather", "batch", "batch", "all_gather", "batch"]  # whatever the number of monitors


def test_training_is_not_changed(toy):
    watched, _ = toy.fit([monitor(2) for monitor in MONITORS])
    plain, _ = toy.fit([])
    for (name, a), b in zip(watched.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(a, toy.make_model().state_dict()[name])  # it did train


def test_no_graph_is_kept(toy):
    monitors = [monitor(1) for monitor in MONITORS]
    totals = []

    class Look(Callback):
        def on_before_optimizer_step(self, *_):
            totals.extend(probe.total for monitor in monitors for probe in monitor._probes)

    toy.fit([*monitors, Look()], n_batches=2)
    assert len(totals) == 2 * (5 + 4 + 2)
    assert all(total.dtype == torch.float32 and not total.requires_grad for total in totals)
    assert all(monitor._probes == [] for monitor in monitors)


def test_metrics_can_be_monitored_by_other_callbacks(toy, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor=TAG, every_n_train_steps=1, save_top_k=1, filename="{step}")
    _, logger = toy.fit([LogitsZMonitor(), best], enable_checkpointing=True)
    assert best.best_model_score.item() == pytest.approx(min(logger.values(TAG)))
    torch.load(best.best_model_path, weights_only=True)


def test_resume_keeps_the_rhythm(toy, tmp_path):
    first, trainer_logger = toy.make_model(), toy.MemoryLogger()
    trainer = toy.make_trainer([LogitsZMonitor(3)], trainer_logger, max_epochs=1)
    trainer.fit(first, toy.tokens(4))
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    logger = toy.MemoryLogger()
    toy.make_trainer([LogitsZMonitor(3)], logger, max_epochs=2).fit(
        toy.make_model(), toy.tokens(4), ckpt_path=tmp_path / "at4.ckpt", weights_only=True
    )
    assert trainer_logger.steps(TAG) == [2]
    assert logger.steps(TAG) == [5]


def test_manual_optimization_with_two_optimizers(toy):
    class Manual(toy.ToyModel):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.blocks, self.lm_head)]

    model, _ = toy.fit([LogitsZMonitor(2)], model=toy.make_model(cls=Manual))
    assert model.hooks_in_training == [0, HOOKS] * 3


def test_manual_accumulation_is_sampled_once_a_step(toy):
    class Manual(toy.ToyModel):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 3 == 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    model, logger = toy.fit([LogitsZMonitor(2)], model=toy.make_model(cls=Manual), n_batches=9)
    assert model.hooks_in_training == [0, 0, 0, HOOKS, 0, 0, 0, 0, 0]
    assert logger.steps(TAG) == [1]


def test_a_silent_module_is_named_once(toy):
    model = toy.make_model()
    model.spare = nn.ModuleList([nn.Identity()])
    model.spare[0].mue_branch = "spare"
    with pytest.warns(UserWarning, match="spare") as caught:
        _, logger = toy.fit([ActivationOutlierMonitor()], model=model)
    assert sum("saw no forward pass of spare/00" in str(warning.message) for warning in caught) == 1
    assert not any("spare" in tag for tag in logger.tags())
    assert len(logger.values("stability/rms/ffn/00")) == 6


def test_activation_checkpointing_changes_no_metric(toy):
    """Blocks run twice, in forward and again in backward: the metrics are ratios, in which that cancels."""
    plain_model, plain = toy.fit([monitor(1) for monitor in MONITORS], n_batches=2)
    model = toy.make_model()
    for block in model.blocks:
        block.forward = lambda x, keep, run=block.forward: checkpoint(run, x, keep, use_reentrant=False)
    _, logger = toy.fit([monitor(1) for monitor in MONITORS], model=model, n_batches=2)
    assert len(model.seen["q"][0]) == 2 * len(plain_model.seen["q"][0])  # it did run again
    assert logger.tags() == plain.tags()
    for tag in plain.tags():
        assert logger.values(tag) == pytest.approx(plain.values(tag), rel=1e-6), tag


class Head(nn.Linear):
    """Dynamo does not compile the forward of torch's own modules alone."""

    def forward(self, x):
        return 2 * super().forward(x)


class CompiledModel(LightningModule):
    """Its head is compiled, whole, in place; the graphs that Dynamo makes are counted."""

    def __init__(self, style):
        super().__init__()
        self.body, self.lm_head, self.graphs, self.seen = nn.Linear(6, 8), Head(8, 5), [], []
        if style == "module":
            self.lm_head.compile(backend=self.backend, fullgraph=True)
        elif style == "wrapper":
            self.lm_head = torch.compile(self.lm_head, backend=self.backend, fullgraph=True)

    def backend(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    def training_step(self, batch, batch_idx):
        logits = self.lm_head(self.body(batch))
        self.seen.append(z(logits.detach()))
        return logits.square().mean()

    def configure_optimizers(self):
        return StanceSGD(self.parameters(), lr=0.1)


class StanceSGD(torch.optim.SGD):
    """Records whether compiled code would run compiled in its update."""

    def step(self, closure=None):
        loss = closure()
        self.stances = [*getattr(self, "stances", []), torch._dynamo.eval_frame._stance.stance]
        super().step()
        return loss


@pytest.mark.parametrize("style", ["module", "wrapper"])
@pytest.mark.parametrize("first", [1, 2])
def test_compiled_modules_run_eagerly_in_sampled_steps(toy, style, first):
    """Hooks fire though the module was compiled before (first = 2), and none is compiled in (first = 1)."""
    torch._dynamo.reset()
    model, logger = CompiledModel(style), toy.MemoryLogger()
    monitors = [LogitsZMonitor(first), LogitsZMonitor(first, attention=False), ActivationOutlierMonitor(1)]
    data = torch.utils.data.DataLoader(torch.randn(4, 6), batch_size=1)
    trainer = toy.make_trainer(monitors, logger)
    with pytest.warns(UserWarning, match="eagerly") as caught:
        trainer.fit(model, data)
    sampled = [step for step in range(first - 1, 4, first) for _ in range(2)]  # two monitors, the third finds nothing
    assert logger.steps(TAG) == sampled
    assert logger.values(TAG) == pytest.approx([model.seen[step] for step in sampled], rel=2e-6)
    assert sum("runs compiled modules eagerly" in str(warning.message) for warning in caught) == 2  # once a monitor
    assert trainer.optimizers[0].stances == ["default"] * 4
    assert len(model.graphs) == (0 if first == 1 else 1)  # no recompilation after a sampled step
    model.lm_head(torch.zeros(1, 8, requires_grad=True))
    assert len(model.graphs) == 1  # compiled code is on again


@pytest.mark.parametrize("period", [0, -3])
def test_bad_periods_are_refused(period):
    with pytest.raises(ValueError, match=f"every_n_steps: found {period}, .*at least 1"):
        LogitsZMonitor(period)


@pytest.mark.parametrize("period", [2.0, "5", True])
def test_wrong_types_are_refused(period):
    with pytest.raises(TypeError, match=rf"every_n_steps: found {period!r}.*integer"):
        RouterMonitor(period)


def test_no_warnings_in_a_sound_run(toy):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy.fit([monitor(2) for monitor in MONITORS])
    assert not [warning for warning in caught if "Monitor" in str(warning.message)]


def test_labels():
    names = ["blocks.3.attention.core", "blocks.12.attention.core", "head", ""]
    assert list(layer_labels(names).values()) == ["03", "12", "head", "root"]
    twice = ["blocks.3.a", "blocks.3.b", "blocks.4.a"]
    assert list(layer_labels(twice).values()) == ["blocks.3.a", "blocks.3.b", "04"]
    assert layer_labels(["stem[x]/y"]) == {"stem[x]/y": "stem_x_y"}


def test_names_lose_their_wrappers():
    inner = nn.Sequential(nn.Linear(1, 1))
    wrapped = nn.ModuleDict({"_checkpoint_wrapped_module": nn.ModuleDict({"_orig_mod": inner})})
    root = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"blocks": wrapped})})
    assert list(find_modules(root, lambda m: isinstance(m, nn.Linear))) == ["blocks.0"]


def test_over_layers():
    layers = by_layer({"a/x/00": 1.0, "a/x/01": 4.0, "a/xy/00": 100.0})
    assert over_layers(layers, "a/x", "mean", "max", "min") == {"a/x_mean": 2.5, "a/x_max": 4.0, "a/x_min": 1.0}
    assert over_layers(layers, "a/z", "mean") == {}
    for broken in ({"a/x/0": float("nan"), "a/x/1": 1.0}, {"a/x/0": 1.0, "a/x/1": float("nan")}):
        assert all(math.isnan(x) for x in over_layers(by_layer(broken), "a/x", "mean", "max", "min").values())
