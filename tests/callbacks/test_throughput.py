"""ThroughputMonitor with a clock that the tests set: exact figures, and when they are logged."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.data import DataLoader

from lightning_mue.callbacks import MuECallback, ThroughputMonitor, throughput
from lightning_mue.contract import flops_per_token

RATE, MFU = "train/tokens_per_second", "train/mfu"
TOKENS = 2 * 5  # of a batch of the toy's data


class Clock:
    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Slow(Callback):
    """Every training step takes `seconds[i]` (the last one from then on); validation and its end take minutes."""

    def __init__(self, clock, seconds=(1.0,)):
        self.clock, self.seconds, self.done = clock, seconds, 0

    def on_train_batch_start(self, *_):
        self.clock.now += self.seconds[min(self.done, len(self.seconds) - 1)]
        self.done += 1

    def on_validation_batch_start(self, *_):
        self.clock.now += 100

    def on_validation_end(self, *_):
        self.clock.now += 300


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def fit(toy, clock, monitor=None, *, seconds=(1.0,), model=None, data=None, val=None, **options):
    logger = toy.MemoryLogger()
    monitor = monitor or ThroughputMonitor()
    trainer = toy.make_trainer([monitor, Slow(clock, seconds)], logger, **options)
    trainer.fit(model or toy.make_model(), data or toy.tokens(6), val)
    return trainer, logger


def test_tokens_since_the_last_log_over_the_time_since_then(toy, clock):
    """The first batch, of 50 s, does not count."""
    seconds = (50.0, 1.0, 2.0, 2.0, 2.0, 4.0)
    _, logger = fit(toy, clock, seconds=seconds)
    assert logger.steps(RATE) == [1, 2, 3, 4, 5]
    assert logger.values(RATE) == pytest.approx([TOKENS / s for s in seconds[1:]])
    _, logger = fit(toy, clock, seconds=seconds, log_every_n_steps=3)
    assert logger.steps(RATE) == [2, 5] == logger.steps("train/loss")
    assert logger.values(RATE) == pytest.approx([2 * TOKENS / 3, 3 * TOKENS / 8])


def test_accumulation_logs_when_the_optimizer_steps(toy, clock):
    _, logger = fit(toy, clock, data=toy.tokens(12), accumulate_grad_batches=3, log_every_n_steps=2)
    assert logger.steps(RATE) == [1, 3] == logger.steps("train/loss")
    assert logger.values(RATE) == pytest.approx([TOKENS] * 2)


def test_validation_and_what_follows_it_do_not_count(toy, clock):
    """A checkpoint may be saved at the end of a validation."""
    model = toy.make_model(cls=toy.ValidatedToyModel)
    settings = {"val_check_interval": 2, "num_sanity_val_steps": 2, "max_epochs": 2}
    trainer, logger = fit(toy, clock, model=model, val=toy.tokens(2), **settings)
    assert logger.values(RATE) == pytest.approx([TOKENS] * 11)
    assert clock.now > 1000 + 6 * (2 * 100 + 300)
    assert float(trainer.progress_bar_metrics[RATE]) == pytest.approx(TOKENS)


def test_replicas_count_and_tensor_parallel_ranks_do_not(toy, clock, monkeypatch):
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 4, "rank": 0})
    _, logger = fit(toy, clock)
    assert logger.values(RATE) == pytest.approx([4 * TOKENS] * 5)


@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"logger": False}, {"barebones": True}])
def test_trainers_without_a_logger(toy, clock, options):
    quiet = {"barebones": True} if "barebones" in options else {"enable_progress_bar": False, "log_every_n_steps": 2}
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "enable_model_summary": False}
    settings = {key: value for key, value in settings.items() if "barebones" not in options or "enable" not in key}
    trainer = Trainer(callbacks=[ThroughputMonitor(), Slow(clock)], **{**settings, **quiet, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*self.log.*tokens")
        trainer.fit(toy.make_model(), toy.tokens(4))
    logged = trainer.callback_metrics.get(RATE)
    assert logged is None if "barebones" in options else float(logged) == pytest.approx(TOKENS)


def test_resume_and_a_second_fit_start_anew(toy, clock, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    logger = toy.MemoryLogger()
    callbacks = [ThroughputMonitor(), saver, Slow(clock)]
    trainer = toy.make_trainer(callbacks, logger, max_steps=3, enable_checkpointing=True, log_every_n_steps=2)
    trainer.fit(toy.make_model(), toy.tokens(9))
    assert logger.steps(RATE) == [1]
    clock.now += 1e6
    resumed, again = ThroughputMonitor(), toy.MemoryLogger()
    trainer = toy.make_trainer([resumed, Slow(clock, (50.0, 1.0))], again, max_steps=8, log_every_n_steps=2)
    trainer.fit(toy.make_model(), toy.tokens(9), ckpt_path=tmp_path / "step=3.ckpt")
    assert again.steps(RATE) == [5, 7]  # step 3 is the first batch
    assert again.values(RATE) == pytest.approx([TOKENS] * 2)
    clock.now += 1e6
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, 12
    trainer.fit(trainer.lightning_module, toy.tokens(9))
    assert again.values(RATE) == pytest.approx([TOKENS] * len(again.values(RATE)))
    assert again.steps(RATE)[-1] == 11


class Several(LightningModule):
    """Manual optimization: the second optimizer steps on every third batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        for i, (optimizer, layer) in enumerate(zip(self.optimizers(), (self.a, self.b), strict=True)):
            if i == 0 or batch_idx % 3 == 2:
                optimizer.zero_grad()
                self.manual_backward(layer(batch.float()).square().mean())
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.a, self.b)]


def test_manual_optimization_with_optimizers_of_other_frequencies(toy, clock):
    _, logger = fit(toy, clock, model=Several(), data=toy.tokens(12), log_every_n_steps=4)
    assert logger.steps(RATE) == [3, 7, 11]
    assert logger.values(RATE) == pytest.approx([TOKENS] * 3)


IDS, MASK = torch.zeros(2, 7, dtype=torch.int64), torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IDS, 14),
        ({"tokens": torch.zeros(4), "targets": IDS}, 4),
        ({"tokens": ["a"], "input_ids": IDS}, 14),
        ({"mask": MASK, "x": torch.zeros(2, 2), "label": torch.zeros(9, dtype=torch.int64), "input_ids": IDS}, 14),
        ((torch.zeros(2, 2), [{"ids": IDS.int()}]), 14),
        ((torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), None),
        ("text", None),
    ],
)
def test_tokens_of_a_batch(batch, expected):
    assert ThroughputMonitor()._tokens(batch) == expected


def test_a_function_of_the_batch_counts(toy, clock):
    _, logger = fit(toy, clock, ThroughputMonitor(tokens_of=lambda batch: torch.tensor(7)))
    assert logger.values(RATE) == [7.0] * 5
    with pytest.raises(TypeError, match="tokens_of: found 5, expected a function"):
        ThroughputMonitor(tokens_of=5)


def test_nothing_to_count_is_told_once(toy, clock):
    class Floats(Several):
        pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, logger = fit(toy, clock, model=Floats(), data=DataLoader(torch.randn(8, 5), batch_size=2))
    assert sum("ThroughputMonitor: tokens are not counted" in str(w.message) for w in caught) == 1
    assert RATE not in logger.tags()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)]
)
def test_model_flops_utilization(toy, clock, monkeypatch, precision, dtype):
    class Counted(toy.ToyModel):
        def flops_per_token(self):
            return 600

    def peak(device, asked):
        assert (device, asked) == (torch.device("cpu"), dtype)
        return 12_000

    monkeypatch.setattr(throughput, "get_available_flops", peak)
    monkeypatch.setattr(Trainer, "world_size", 2)  # one token is counted once, two devices can work on it
    _, logger = fit(toy, clock, model=toy.make_model(cls=Counted), seconds=(9.0, 2.0), precision=precision)
    assert logger.values(MFU) == pytest.approx([TOKENS / 2 * 600 / (2 * 12_000)] * 5)


def test_no_utilization_without_flops_or_peak(toy, clock, monkeypatch):
    class Counted(toy.ToyModel):
        def flops_per_token(self):
            return 600

    model = toy.make_model(cls=Counted)
    assert (flops_per_token(model), flops_per_token(toy.make_model())) == (600.0, None)
    assert MFU not in fit(toy, clock, model=model)[1].tags()  # a CPU's peak is not known
    monkeypatch.setattr(throughput, "get_available_flops", lambda *_: pytest.fail("asked for nothing"))
    assert MFU not in fit(toy, clock)[1].tags()


@pytest.mark.parametrize("known", [True, False])
def test_charts(toy, tmp_path, monkeypatch, known):
    """Beside MuECallback and alone."""

    class Counted(toy.ToyModel):
        def flops_per_token(self):
            return 600

    monkeypatch.setattr(throughput, "get_available_flops", lambda *_: 1e4 if known else None)
    for i, others in enumerate(([], [MuECallback("sp", verbose=False, roles={"": "hidden"})])):
        logger = TensorBoardLogger(tmp_path, name=f"run{i}", default_hp_metric=False)
        trainer = toy.make_trainer([ThroughputMonitor(), *others], logger)
        trainer.fit(toy.make_model(cls=Counted), toy.tokens(3))
        events = EventAccumulator(logger.log_dir).Reload()
        (written,) = events.Tensors("custom_scalars__config__")
        page = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
        charts = {chart.title: list(chart.multiline.tag) for c in page.category for chart in c.chart}
        assert charts["Tokens per second"] == [f"({RATE})$"]
        assert charts.get("Model FLOPs utilization") == ([f"({MFU})$"] if known else None)
        assert (MFU in events.Tags()["scalars"]) is known
        assert RATE in events.Tags()["scalars"]
