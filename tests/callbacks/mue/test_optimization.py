"""MuECallback under automatic and manual optimization, several optimizers, precisions, accumulation and clipping."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_mue import MuECallback, param_groups

WIDTH, BASE_WIDTH = 64, 16


def data(count=64):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(zip(x, x[:, :4].argmax(1), strict=True)), batch_size=8)


def noting(make):
    """The optimizer class, noting at every update what group each parameter was in and its gradient's norm."""

    class Noting(make):
        mue_family = {"AdamW": "adam", "SGD": "sgd", "Muon": "muon"}[make.__name__]

        def __init__(self, *args, **kwargs):
            self.notes = []
            super().__init__(*args, **kwargs)

        def _init_group(self, group, *args, **kwargs):
            grads = [p.grad.norm() for p in group["params"] if p.grad is not None]
            self.notes += [(id(p), group["lr"], g.item()) for p, g in zip(group["params"], grads, strict=False)]
            return super()._init_group(group, *args, **kwargs)

    Noting.__name__ = make.__name__
    return Noting


class Net(LightningModule):
    """As anyone has it: nothing of it is declared for this package."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return noting(AdamW)(self.parameters(), lr=0.01)


class Manual(Net):
    """Muon for the hidden matrix, AdamW for the rest, stepped by hand."""

    def __init__(self, width=WIDTH, frequency=1, both=AdamW):
        super().__init__(width)
        self.automatic_optimization = False
        self.frequency, self.both = frequency, both

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if (batch_idx + 1) % self.frequency == 0:
            second.step()

    def configure_optimizers(self):
        hidden = [self.net[2].weight]
        rest = [p for p in self.parameters() if p is not hidden[0]]
        return [noting(self.both)(hidden, lr=0.02), noting(AdamW)(rest, lr=0.01)]


def fit(model, *, rule="mup", callbacks=(), max_steps=4, mue=None, plugins=None, **kwargs):
    callback = mue or MuECallback(rule=rule, base={"width": BASE_WIDTH}, verbose=False)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": max_steps,
            "callbacks": [callback, *callbacks],
            "plugins": plugins,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )
    torch.manual_seed(1)
    trainer.fit(model, data())
    return callback, trainer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def used_rates(trainer, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[key]: lr for optimizer in trainer.optimizers for key, lr, _ in optimizer.notes}


def check_rates(callback, trainer, model):
    used = used_rates(trainer, model)
    assert used.keys() == {entry.name for entry in callback.plan.parameters}
    for optimizer in trainer.optimizers:
        assert len(optimizer.param_groups) == 1
    rates = {"net.2.weight": 0.02 if isinstance(model, Manual) else 0.01}
    for entry in callback.plan.parameters:
        if entry.kind != "muon":
            assert used[entry.name] == pytest.approx(rates.get(entry.name, 0.01) * entry.lr, rel=1e-12)
    assert len(set(used.values())) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_automatic_optimization(settings):
    model = Net()
    callback, trainer = fit(model, **settings)
    check_rates(callback, trainer, model)
    assert callback.plan["net.2.weight"].lr == pytest.approx(BASE_WIDTH / WIDTH)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {}], ids=str)
def test_it_is_what_explicit_groups_give(settings):
    """The callback's run, and a run of the same weights with param_groups: equal to the last bit.

    Clipping adds the parameters' norms up in the order of the groups, which is another one: float32 round-off.
    """
    model = Net()
    callback, _ = fit(model, **settings)

    class Explicit(Net):
        def configure_optimizers(self):
            return AdamW(param_groups(self, callback.plan, lr=0.01, weight_decay=0.01))

    explicit = Explicit()
    fit(model := Net(), max_steps=0)  # draws the same initial weights
    explicit.load_state_dict(model.state_dict())
    plain = MuECallback(rule="mup", base={}, verbose=False)  # base size: nothing is changed
    fit(explicit, mue=plain, **settings)
    fit(model := Net(), **settings)
    tolerance = 1e-6 if "gradient_clip_val" in settings else 0.0
    assert all(float((weights(model)[n] - p).abs().max()) <= tolerance for n, p in weights(explicit).items())


def test_norm_clipping_sees_all_gradients_at_once():
    """Clipping goes by the user's one group: the norm over all parameters is the given one, not one a scaled group."""
    model = Net()
    _, trainer = fit(model, gradient_clip_val=0.01, max_steps=1)
    norms = [norm for _, _, norm in trainer.optimizers[0].notes]
    assert len(norms) == 6
    assert sum(n * n for n in norms) ** 0.5 == pytest.approx(0.01, rel=1e-4)


def test_a_rate_changed_by_hand_counts_at_once():
    """In training_step and in a callback's hook, both of which run inside optimizer.step."""

    class ByHand(Net):
        def training_step(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 0.1 / (1 + batch_idx)
            return super().training_step(batch, batch_idx)

    class Decay(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append((len(optimizer.param_groups), optimizer.param_groups[0]["lr"]))
            optimizer.param_groups[0]["lr"] *= 2

    seen = []
    model = ByHand()
    callback, trainer = fit(model, callbacks=[Decay()], max_steps=3)
    lr = 0.2 / 3
    assert seen == [(1, 0.1), (1, 0.05), (1, pytest.approx(0.1 / 3))]
    used = used_rates(trainer, model)
    assert all(used[e.name] == pytest.approx(lr * e.lr, rel=1e-12) for e in callback.plan.parameters)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


class Scaler(torch.amp.GradScaler):
    pass


def mixed(scale=2.0**10):
    return MixedPrecision("16-mixed", "cpu", Scaler("cpu", init_scale=scale))


def test_grad_scaler_and_a_skipped_step():
    """16-mixed: the scaler calls step without a closure, and not at all where a gradient is infinite."""

    class Overflows(Net):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.global_step == skipped_at and not skips else 1.0)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before, self.updates = weights(pl_module), len(trainer.optimizers[0].notes)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if len(trainer.optimizers[0].notes) == self.updates:
                skips.append(batch_idx)
                assert all(torch.equal(self.before[n], p) for n, p in pl_module.named_parameters())
            assert len(trainer.optimizers[0].param_groups) == 1

    skipped_at, skips = 2, []
    model = Overflows()
    callback, trainer = fit(model, plugins=mixed(), callbacks=[Watch()], max_steps=5)
    assert skips == [2]
    check_rates(callback, trainer, model)
    # An ordinary run, whose gradients are unscaled when they are clipped.
    _, trainer = fit(Net(), plugins=mixed(), max_steps=1, gradient_clip_val=0.01)
    assert sum(n * n for _, _, n in trainer.optimizers[0].notes) ** 0.5 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "eps", "warns"), [("16-true", 1e-8, True), ("16-true", 1e-3, False), ("bf16-true", 1e-8, False)]
)
def test_eps_that_is_zero_in_float16_is_warned_of(precision, eps, warns):
    class Eps(Net):
        def configure_optimizers(self):
            return AdamW(self.parameters(), lr=0.001, eps=eps)

    expected = pytest.warns(UserWarning, match="eps.*is 0.*bf16-true") if warns else nullcontext()
    with expected, warnings.catch_warnings():
        if not warns:
            warnings.filterwarnings("error", message=".*eps.*is 0.*")
        fit(Eps(), precision=precision, max_steps=1)


@pytest.mark.parametrize("both", [AdamW, SGD, Muon])
def test_several_optimizers(both):
    """Of one family, and of two."""
    model = Manual(both=both)
    start = []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(weights(pl_module))

    callback, trainer = fit(model, callbacks=[Spy()], rule="hyperp" if both is Muon else "mup", max_steps=8)
    check_rates(callback, trainer, model)
    kinds = {entry.name: entry.kind for entry in callback.plan.parameters}
    hidden = {AdamW: "adamw", SGD: "sgd", Muon: "muon"}[both]
    assert kinds.pop("net.2.weight") == hidden
    assert set(kinds.values()) == {"adamw"}
    assert all(not torch.equal(start[0][n], p) for n, p in model.named_parameters())
    # Hidden matrices keep their rate under SGD and lose it with the width under Adam (docs/derivations/mup.md).
    if both is SGD:
        assert callback.plan["net.2.weight"].lr == pytest.approx(1.0)
        assert callback.plan["net.4.weight"].lr == pytest.approx(BASE_WIDTH / WIDTH)


class Gan(LightningModule):
    """Two networks with the same roles, each with its own optimizer and schedule."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator, self.critic = Net(width).net, Net(width).net

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        x, y = batch
        for optimizer, net in ((critic, self.critic), (generator, self.generator)):
            if optimizer is generator and batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        critic = AdamW(self.critic.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(critic, 0.5)
        return [AdamW(self.generator.parameters(), lr=0.01), critic], [schedule]


def test_rates_of_two_optimizers_are_told_apart():
    callback = MuECallback(rule="mup", base={"width": BASE_WIDTH}, verbose=False)
    seen = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(callback.effective_rates())

    fit(Gan(), mue=callback, callbacks=[Spy()], max_steps=6)
    assert seen[0]["mue/lr/hidden/AdamW"] == pytest.approx(0.01 / 4)
    assert [rates["mue/lr/hidden/AdamW-1"] for rates in seen[:3]] == pytest.approx([0.005, 0.0025, 0.00125])
    assert {tag.split("/")[2] for tag in seen[0]} == {"hidden", "embedding", "unembedding", "bias"}
    assert len({frozenset(rates) for rates in seen}) == 1  # tags are stable


def test_logged_with_several_optimizers_of_other_frequencies(tmp_path):
    """global_step counts the steps of all optimizers."""
    from lightning.pytorch.loggers import CSVLogger

    fit(Manual(frequency=2), max_steps=12, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert "mue/lr/hidden" in lines[0]
    assert len(lines) == 1 + 3


class Syncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_of_a_fit_reads_no_tensor():
    """The number of device synchronizations of a training step does not change with the callback."""

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.mode = Syncs()
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)
            counts[-1].append(self.mode.count)

    class Plain(Net):
        def configure_optimizers(self):
            return AdamW(self.parameters(), lr=torch.tensor(0.01), capturable=False, foreach=False)

    counts = []
    for base in ({"width": WIDTH}, {"width": BASE_WIDTH}):
        counts.append([])
        callback = MuECallback(rule="mup", base=base, verbose=False)
        fit(Plain(), mue=callback, callbacks=[Count()], max_steps=4)
        assert callback.plan.same_size is (base["width"] == WIDTH)
    assert counts[0] == counts[1]
