"""Monitors and what else a run may be: half precision throughout, a compiled LightningModule, callbacks that serve a second run."""

from __future__ import annotations

import pytest
import torch
from helpers.zoo_layouts import shifted_loss
from helpers.zoo_models import tokens
from helpers.zoo_routers import ROUTERS
from lightning.pytorch import LightningModule

from lightning_mue import ActivationOutlierMonitor, LogitsZMonitor, RouterMonitor, StabilityGuard
from lightning_mue.callbacks import HealthMonitor, SpectralMonitor, UpdateMonitor
from lightning_mue.callbacks.monitors.probes import measuring
from lightning_mue.health.departures import Level

pytestmark = pytest.mark.filterwarnings("ignore:.*saw no forward pass")


class Half(LightningModule):
    """Keeps the logits of its last pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = ROUTERS["tutel"].make(32, 2, 4)
        self.model.lm_head.register_forward_hook(lambda module, x, y: setattr(self, "logits", y.detach().double()))

    def training_step(self, batch, batch_idx):
        return shifted_loss(self.model, tokens())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_bf16_true_rounds_no_statistics(toy):
    """The Trainer makes bfloat16 the default of new tensors then: QR has no kernel for it, and channel 257 becomes 256."""
    monitors = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor(), UpdateMonitor(), SpectralMonitor()]
    model, logger = Half(), toy.MemoryLogger()
    data = torch.utils.data.DataLoader(torch.zeros(2, 1))
    toy.make_trainer(monitors, logger, precision="bf16-true").fit(model, data)
    assert model.model.lm_head.weight.dtype == torch.bfloat16
    expected = model.logits.logsumexp(-1).square().mean().item()
    assert logger.values("stability/z/lm_logits")[-1] == pytest.approx(expected, rel=1e-6)
    rounded = float(torch.tensor(expected).bfloat16())  # the control
    assert rounded != pytest.approx(expected, rel=1e-6)
    assert any(tag.startswith("spectral/") for tag in logger.tags())


def test_what_is_measured_is_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with measuring(torch.device("cpu")):
            assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_compiled_lightning_module_is_sampled_eagerly(toy):
    class Quiet(toy.ToyModel):
        def training_step(self, tokens, batch_idx):
            return self.loss(tokens)

        def keep(self, kind, tensor): ...

    torch._dynamo.reset()
    logger, monitors = toy.MemoryLogger(), [LogitsZMonitor(2), ActivationOutlierMonitor(2), RouterMonitor(2)]
    model = torch.compile(toy.make_model(cls=Quiet), backend="eager")
    with pytest.warns(UserWarning, match="eagerly"):
        toy.make_trainer(monitors, logger).fit(model, toy.tokens(6))
    for tag in ("stability/z/lm_logits", "stability/rms/ffn/00", "routing/max_violation/00"):
        assert logger.steps(tag) == [1, 3, 5]


def test_a_second_run_is_judged_by_nothing_of_the_first(toy):
    class Spoilt(toy.ToyModel):
        def training_step(self, tokens, batch_idx):
            loss = super().training_step(tokens, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    health, guard = HealthMonitor(heat_maps=False), StabilityGuard(nonfinite="lower_lr")
    callbacks = [LogitsZMonitor(), health, guard]
    toy.fit(callbacks, model=toy.make_model(cls=Spoilt))
    assert (guard.skipped_steps, guard.acting.lr_factor, len(guard.decisions)) == (1, 0.5, 1)
    trained, _ = toy.fit(callbacks)
    assert (guard.skipped_steps, guard.acting.lr_factor, guard.decisions) == (0, 1.0, [])
    assert (health.verdict.level, health.verdict.samples) == (Level.HEALTHY, 6)
    alone, _ = toy.fit([])
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), alone.parameters(), strict=True))


def test_a_fit_that_goes_on_keeps_what_it_knows(toy):
    """The control: the same run, longer."""
    health, guard = HealthMonitor(heat_maps=False), StabilityGuard()
    trainer = toy.make_trainer([LogitsZMonitor(), health, guard], toy.MemoryLogger())
    model = toy.make_model()
    trainer.fit(model, toy.tokens(6))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, toy.tokens(6))
    assert health.verdict.samples == 12
