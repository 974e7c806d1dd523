"""UpdateMonitor against weights, gradients and settings that another callback keeps whole, in float64."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, MuECallback
from lightning_mue.callbacks import UpdateMonitor
from lightning_mue.names import split_layer

#: Sums of some thousand squares in float32, and the difference of two float32 weights.
TIGHT = {"rel": 2e-5, "abs": 1e-12}
SIZES = {"vocab_size": 11, "context_length": 5, "width": 8, "n_heads": 2, "depth": 2, "n_experts": 3, "top_k": 2}


class Witness(Callback):
    """Whole weights before and after every batch, and gradients before the step, in float64; settings inside the step."""

    def __init__(self):
        self.before, self.after, self.grads, self.settings = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.kept = {n: p.detach().double().clone() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.kept)
        self.grads.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(self.after) < len(self.before):
            self.after.append({n: p.detach().double().clone() for n, p in pl_module.named_parameters()})


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names if name in tensors])


def expected(witness, step, names):
    before, after = flat(witness.before[step], names), flat(witness.after[step], names)
    grads = flat(witness.grads[step], names)
    cosine = F.cosine_similarity(before, after, dim=0).clamp(max=1)
    return {
        "update_ratio": ((after - before).norm() / before.norm()).item(),
        "angular_step": cosine.arccos().item(),
        "weight_rms": before.square().mean().sqrt().item(),
        "gradient_rms": grads.square().mean().sqrt().item(),
        "gradient_norm": grads.norm().item(),
    }


def by_layer(model):
    """Names of the parameters of each layer (-1: outside)."""
    found = defaultdict(list)
    for name, _ in model.named_parameters():
        found[split_layer(name)[1]].append(name)
    return found


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        tokens = torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(index))
        return {"tokens": tokens[:-1], "targets": tokens[1:]}


def train(toy, model, callbacks, logger, **options):
    trainer = toy.make_trainer(callbacks, logger, **{"num_sanity_val_steps": 0, "limit_train_batches": 3, **options})
    trainer.fit(model, torch.utils.data.DataLoader(Batches(), batch_size=2))


def fit(toy, model, **options):
    logger, witness = toy.MemoryLogger(), Witness()
    train(toy, model, [UpdateMonitor(), witness], logger, **options)
    return logger, witness


def language_model(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), cls=MoELanguageModel, **options):
    torch.manual_seed(0)
    return cls(**{**SIZES, **options}, optimizer=optimizer)


BLOCK = "transformer.blocks.1."
ROLES = {
    "hidden/01": [f"{BLOCK}attention.w_{x}.weight" for x in "qkvo"],
    "expert_up/01": [f"{BLOCK}ffn.experts.w_{x}" for x in ("gate", "up")],
    "expert_down/01": [f"{BLOCK}ffn.experts.w_down"],
    "router/01": [f"{BLOCK}ffn.router.weight"],
    "embedding/transformer.embedding": ["transformer.embedding.weight"],
}


def role_names(model):
    names = {name for name, _ in model.named_parameters()}
    return {
        label: [name if name in names else name.removesuffix(".weight") for name in group]
        for label, group in ROLES.items()
    }


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), {}),
        (
            lambda params: HyperSphereOptimizer(params, lr=0.02, adamw_lr=1e-3),
            {"accumulate_grad_batches": 2, "limit_train_batches": 4},
        ),
        (lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9), {"gradient_clip_val": 0.01}),
    ],
    ids=["adamw", "sphere-accumulated", "sgd-clipped"],
)
def test_every_step_is_what_the_weights_did(toy, optimizer, options):
    model = language_model(optimizer)
    logger, witness = fit(toy, model, **options)
    for label, names in role_names(model).items():
        for step in range(len(witness.after)):
            for metric, value in expected(witness, step, names).items():
                found = logger.values(f"updates/{metric}/{label}")[step]
                # The reference's arccosine loses digits in float64, too: 1e-16 / angle.
                assert found == pytest.approx(value, **TIGHT), (metric, label, step)
    norms = [math.hypot(*(g.norm().item() for g in grads.values())) for grads in witness.grads]
    assert logger.values("updates/gradient_norm/all") == pytest.approx(norms, rel=1e-5)


def test_on_the_sphere_every_matrix_turns_by_the_learning_rate(toy):
    logger, _ = fit(toy, language_model(lambda params: HyperSphereOptimizer(params, lr=0.02, retraction="geodesic")))
    for role in ("hidden", "router"):
        assert logger.values(f"updates/angular_step/{role}_max") == pytest.approx([0.02] * 3, rel=1e-3)
    assert not [tag for tag in logger.tags() if tag.startswith("updates/eps/hidden")]  # Muon has no such eps
    assert logger.values("updates/eps/embedding_mean") == pytest.approx([1e-8] * 3)


def test_settings_are_those_of_the_step_with_the_factors_of_the_plan(toy):
    """The callback swaps scaled groups in for the update alone; what is read before or after it is the user's."""
    optimizers = []

    def optimizer(params):
        optimizers.append(torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=1e-6))
        return optimizers[-1]

    model, mue = language_model(optimizer), MuECallback(base={"width": 4, "n_heads": 1}, verbose=False, verify=False)
    witness, logger = Witness(), toy.MemoryLogger()
    # Registered before and after MuECallback: both see the same.
    for callbacks in ([mue, UpdateMonitor(), witness], [UpdateMonitor(), mue, witness]):
        model, logger, witness.after, witness.before = language_model(optimizer), toy.MemoryLogger(), [], []
        train(toy, model, callbacks, logger)
        entries = {entry.name: entry for entry in mue.plan.parameters}
        for label, names in role_names(model).items():
            entry = entries[names[0]]
            assert entry.lr != 1 or label.startswith("embedding")
            for name, value in (
                ("lr", 1e-2 * entry.lr),
                ("weight_decay", 0.1 * entry.weight_decay),
                ("eps", 1e-6 * entry.eps),
            ):
                assert logger.values(f"updates/{name}/{label}") == pytest.approx([value] * 3, rel=1e-6), (name, label)
        names = role_names(model)["hidden/01"]
        found, wanted = (
            logger.values("updates/update_ratio/hidden/01")[-1],
            expected(witness, -1, names)["update_ratio"],
        )
        assert found == pytest.approx(wanted, **TIGHT)
    assert {group["lr"] for group in optimizers[-1].param_groups} == {1e-2}


class Two(LightningModule):
    """Two optimizers, stepped by hand: the second every other batch, twice."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)
        self.history = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(batch_idx))
        for optimizer, repeats in ((first, 1), (second, 2 if batch_idx % 2 else 0)):
            for _ in range(repeats):
                y = x
                for layer in self.layers:
                    y = layer(y).tanh()
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.head(y), torch.arange(6) % 3))
                before = [p.detach().clone() for p in self.parameters()]
                optimizer.step()
                self.history.append((batch_idx, before, [p.detach().clone() for p in self.parameters()]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.5), torch.optim.Adam(self.layers.parameters(), lr=0.01)


def test_several_optimizers_by_hand_each_by_its_first_step(toy):
    torch.manual_seed(0)
    model, logger = Two(), toy.MemoryLogger()
    toy.make_trainer([UpdateMonitor()], logger).fit(model, torch.utils.data.DataLoader(torch.zeros(6, 1), batch_size=1))
    for tag, at in (("updates/update_ratio/unembedding/head", 4), ("updates/update_ratio/hidden/01", 2)):
        steps = [h for h in model.history if (h[1][at] != h[2][at]).any()]
        firsts = [next(h for h in steps if h[0] == batch) for batch in dict.fromkeys(h[0] for h in steps)]
        wanted = [((h[2][at] - h[1][at]).double().norm() / h[1][at].double().norm()).item() for h in firsts]
        assert len(wanted) == (6 if at == 4 else 3)
        assert logger.values(tag) == pytest.approx(wanted, rel=1e-5)
    assert logger.values("updates/lr/hidden/01") == pytest.approx([0.01] * 3)
    assert not [tag for tag in logger.tags() if "noise" in tag]


class Regression(LightningModule):
    """Linear regression with the mean squared error of each sample: its gradients are known in closed form."""

    def __init__(self, noise=1.0):
        super().__init__()
        self.layer, self.noise = nn.Linear(6, 1, bias=False), noise
        self.per_sample = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        error = self.layer(x)[:, 0] - y
        self.per_sample.append((2 * error.detach()[:, None] * x).double())
        return error.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def regression_data(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, 0] + torch.randn(samples, generator=generator))


def noise_scale(steps, small, large):
    """McCandlish's estimate from [steps][micro-batch] -> per-sample gradients, of the last micro-batch and the whole batch."""
    trace = square = 0.0
    for micros in steps:
        one, whole = micros[-1].mean(0).square().sum(), torch.cat(micros).mean(0).square().sum()
        square = 0.95 * square + (large * whole - small * one) / (large - small)
        trace = 0.95 * trace + (one - whole) / (1 / small - 1 / large)
    return (trace / square).item()


def test_gradient_noise_scale_is_that_of_the_samples_gradients(toy):
    torch.manual_seed(0)
    model, logger = Regression(), toy.MemoryLogger()
    data = torch.utils.data.DataLoader(regression_data(4 * 3 * 40), batch_size=4)
    monitor = UpdateMonitor()
    toy.make_trainer([monitor], logger, accumulate_grad_batches=3).fit(model, data)
    micros = [model.per_sample[i : i + 3] for i in range(0, 120, 3)]
    tag = "updates/gradient_noise_scale/all"
    found = dict(zip(logger.steps(tag), logger.values(tag), strict=True))
    assert len(found) > 20
    for step, value in found.items():
        wanted = noise_scale(micros[: step + 1], 4, 12)
        assert value == pytest.approx(max(0.0, wanted), rel=1e-3)
    # The truth from all samples at one point is of the same size: the estimate is noisy, not biased by an order.
    gradients = torch.cat(model.per_sample)
    truth = (gradients.var(0).sum() / gradients.mean(0).square().sum()).item()
    assert 0.2 < found[max(found)] / truth < 5
    assert monitor.state_dict()["noise"]["all"][1] > 0
    resumed = UpdateMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.state_dict() == monitor.state_dict()


def test_equal_micro_batches_have_no_noise_and_one_batch_size_has_no_scale(toy):
    x, y = regression_data(4)[:]
    data = torch.utils.data.TensorDataset(x.repeat(6, 1), y.repeat(6))
    logger = toy.MemoryLogger()
    toy.make_trainer([UpdateMonitor()], logger, accumulate_grad_batches=2).fit(
        Regression(), torch.utils.data.DataLoader(data, batch_size=4)
    )
    assert logger.values("updates/gradient_noise_scale/all") == pytest.approx([0.0] * 3, abs=1e-4)
    logger = toy.MemoryLogger()
    toy.make_trainer([UpdateMonitor()], logger).fit(Regression(), torch.utils.data.DataLoader(data, batch_size=4))
    assert not [tag for tag in logger.tags() if "noise" in tag]


class Skipping(torch.amp.GradScaler):
    """A GradScaler on the CPU that skips the third step."""

    def __init__(self):
        super().__init__(device="cpu", init_scale=64.0)
        self.steps = 0

    def step(self, optimizer, *args, **kwargs):
        self.steps += 1
        return None if self.steps == 3 else super().step(optimizer, *args, **kwargs)


def test_a_step_that_a_scaler_skips_has_gradients_and_no_update(toy):
    from lightning.pytorch.plugins.precision import MixedPrecision

    precision = MixedPrecision("16-mixed", "cpu", Skipping())
    logger, plain = toy.MemoryLogger(), toy.MemoryLogger()
    for one, plugins in ((logger, [precision]), (plain, [])):
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(regression_data(4 * 2 * 5), batch_size=4)
        toy.make_trainer([UpdateMonitor()], one, accumulate_grad_batches=2, plugins=plugins).fit(Regression(), data)
    assert logger.steps("updates/update_ratio/hidden/layer") == [0, 1, 3, 4]
    assert len(logger.values("updates/gradient_norm/all")) == 5
    # Unscaled, and equal to those of the run without a scaler up to float16 products.
    assert logger.values("updates/gradient_norm/all")[:2] == pytest.approx(
        plain.values("updates/gradient_norm/all")[:2], rel=1e-2
    )


def test_share_of_entries_that_eps_slows_down(toy):
    model, logger = language_model(lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-3)), toy.MemoryLogger()
    shares = []

    class Share(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state[pl_module.transformer.blocks[1].ffn.router.weight]
            root = (state["exp_avg_sq"].double() / (1 - 0.999 ** int(state["step"]))).sqrt()
            shares.append((root <= 1e-3).sum().item() / (root > 0).sum().item())

    train(toy, model, [UpdateMonitor(), Share()], logger)
    assert logger.values("updates/eps_share/router/01") == pytest.approx(shares)
    assert max(shares) > 0
    assert min(shares) < 1


class Halving(torch.optim.Optimizer):
    """A wrapper that takes half of the inner optimizer's step."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        loss = closure()
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        self.inner.step()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.lerp_(old, 0.5)
        return loss


def test_what_a_wrapper_does_to_the_weights_belongs_to_the_step(toy):
    model = language_model(lambda params: Halving(torch.optim.AdamW(params, lr=0.02)))
    logger, witness = fit(toy, model)
    names = role_names(model)["hidden/01"]
    for step in range(3):
        value = expected(witness, step, names)["update_ratio"]
        assert logger.values("updates/update_ratio/hidden/01")[step] == pytest.approx(value, **TIGHT)
    assert logger.values("updates/lr/hidden/01") == pytest.approx([0.02] * 3)
    assert logger.values("updates/eps_share/hidden/01") == [0] * 3


def test_nothing_runs_in_steps_that_are_not_sampled(toy):
    hooks, logger, model = [], toy.MemoryLogger(), language_model()

    class Hooks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            on_weights = sum(len(p._backward_hooks or ()) for p in pl_module.parameters())
            hooks.append((len(optimizer._optimizer_step_post_hooks), on_weights))

    options = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    monitor = UpdateMonitor(every_n_steps=3)
    train(toy, model, [monitor, Hooks()], logger, **options)
    weights = len(list(model.parameters()))
    assert hooks == [(0, 0), (0, 0), (2, weights)]
    assert not model.trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    assert logger.steps("updates/gradient_norm/all") == [2]


def test_a_large_weight_is_sampled_and_the_sample_is_bounded(toy):
    model, logger, witness = language_model(width=64), toy.MemoryLogger(), Witness()
    train(toy, model, [UpdateMonitor(max_elements=4096), witness], logger, limit_train_batches=1)
    names = role_names(model)["expert_up/01"]
    wanted = expected(witness, 0, names)
    assert sum(witness.before[0][name].numel() for name in names) > 8 * 4096
    for metric in ("update_ratio", "angular_step", "weight_rms", "gradient_rms", "gradient_norm"):
        found = logger.values(f"updates/{metric}/expert_up/01")[0]
        # Relative error of an RMS of 4096 / 1.5 draws, five times; gradients have heavier tails.
        assert found == pytest.approx(wanted[metric], rel=0.07 if "gradient" not in metric else 0.3), metric
        assert found != pytest.approx(wanted[metric], rel=1e-6)
