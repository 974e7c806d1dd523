"""What StabilityGuard does about spikes, drifts and indicators: one line, one decision, and the action."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.guarded import Fault, Regression, batches, furthest, train, weights
from lightning.pytorch import Callback
from torch import nn

from lightning_mue import StabilityGuard
from lightning_mue.diagnostics import spike_share

SHORT = {"min_history": 16, "window": 32, "drift": None}


def kinds(guard):
    return [(d["step"], d["kind"], d["indicator"], d["action"]) for d in guard.decisions]


def spiking(action, *, at=40, factor=100.0, steps=60, **options):
    model, guard = Regression(scale={at: factor}), StabilityGuard(spike=action, **SHORT, **options)
    trainer = train(model, guard, batches(steps))
    return model, guard, trainer


def test_a_spike_is_one_line(caplog):
    model, guard, _ = spiking("warn")
    assert kinds(guard) == [(40, "spike", "loss", "warn"), (40, "spike", "gradient_norm", "warn")]
    lines = [r.getMessage() for r in caplog.records if "StabilityGuard" in r.getMessage()]
    assert lines[0].startswith("StabilityGuard: step 40: spike: loss is ")
    assert "expected about" in lines[0]
    assert lines[0].endswith("nothing done")
    assert guard.skipped_steps == 0
    other = Regression(scale={40: 100.0})
    train(other, None, batches(60))
    assert furthest(weights(model), weights(other)) == 0


@pytest.mark.slow
def test_a_healthy_run_has_none_and_is_not_changed():
    model, guard, _ = spiking("rollback", factor=1.0, steps=150)
    assert guard.decisions == []
    other = Regression()
    train(other, None, batches(150))
    assert furthest(weights(model), weights(other)) == 0


def test_nothing_is_a_spike_before_there_is_a_history():
    _, guard, _ = spiking("stop", at=10, steps=14)
    assert guard.decisions == []


def test_a_spike_is_skipped():
    model, guard, _ = spiking("skip")
    assert guard.skipped_steps == 1
    other = Regression()
    train(other, None, batches(60, without=(40,)))
    assert furthest(weights(model), weights(other)) == 0


class Decaying(Regression):
    """One layer: where it ends does not depend on which batches it saw."""

    def __init__(self, **options):
        super().__init__(optimizer=torch.optim.SGD, lr=0.05, **options)
        self.net = nn.Sequential(nn.Linear(4, 1))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def validation_loss(model):
    model.eval()
    with torch.no_grad():
        return sum(float(model.loss(b, int(b["number"]))) for b in batches(40, seed=7)) / 40


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_rollback(tmp_path, keep):
    """Three batches in a row are corrupt: one rollback, and the steps of the others are skipped."""
    bad = dict.fromkeys(range(203, 206), 300.0)

    def run(action, scale, name):
        model = Decaying(scale=scale)
        folder = tmp_path / name
        guard = StabilityGuard(spike=action, every_n_steps=50, keep=keep, dirpath=folder, **SHORT)
        train(model, guard, batches(400))
        return model, guard, folder

    undisturbed, none, _ = run("rollback", {}, "undisturbed")
    assert none.decisions == []
    model, guard, folder = run("rollback", bad, "rollback")
    ruined, _, _ = run("warn", bad, "warn")
    assert ruined.losses[206] > 10 * undisturbed.losses[206]  # the control
    assert guard.skipped_steps == 3
    assert [d["done"][:9] for d in guard.decisions] == ["went back", "see spike"]
    first = guard.decisions[0]
    assert (first["step"], first["kind"], first["action"]) == (203, "spike", "rollback")
    assert "went back to the weights after 200 steps" in first["done"]
    assert validation_loss(model) < 1.01 * validation_loss(undisturbed)
    assert model.ids == list(range(400))  # every batch is seen once: the data goes on
    rows = [json.loads(line) for line in (folder / "skipped_samples.jsonl").read_text().splitlines()]
    assert [row["total_batch"] for row in rows if row["rollback"] == 1] == [200, 201, 202, 203]
    assert rows[3]["ids"] == [[20300 + 8 * r + i for i in range(8)] for r in range(2)]
    assert [(row["kind"], row["total_batch"]) for row in rows if row["rollback"] is None] == [
        ("skip", 204),
        ("skip", 205),
    ]
    if keep == "disk":
        assert len(list(folder.glob("guard-step=*"))) == 2


def test_rollback_restores_what_it_says():
    """Weights, moments and the guard's series of the kept state; counters and rates go on."""
    at = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state[pl_module.net[0].weight]
            at[batch_idx] = (pl_module.net[0].weight.clone(), state["exp_avg"].clone(), float(state["step"]))

    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model, guard = Scheduled(scale={45: 100.0}), StabilityGuard(spike="rollback", every_n_steps=20, **SHORT)
    from helpers.guarded import trainer as make

    trainer = make([guard, Look()])
    trainer.fit(model, batches(60))
    assert all(torch.equal(a, b) for a, b in zip(at[45][:2], at[39][:2], strict=True))
    assert (at[39][2], at[45][2], at[46][2]) == (40, 40, 41)
    assert trainer.global_step == 60
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-8  # the schedule ended with the run


def test_after_the_last_rollback_the_run_is_stopped(tmp_path):
    scale = dict.fromkeys((30, 45, 60, 75), 100.0)
    model = Regression(scale=scale)
    guard = StabilityGuard(spike="rollback", every_n_steps=10, max_rollbacks=2, dirpath=tmp_path, **SHORT)
    trainer = train(model, guard, batches(100))
    first = [d for d in guard.decisions if d["indicator"] == "loss"]
    assert [d["step"] for d in first] == [30, 45, 60]
    assert "2 rollbacks were made" in first[-1]["done"]
    assert trainer.global_step == 61


def test_stop_saves_and_ends_the_run(tmp_path):
    _, _, trainer = spiking("stop", dirpath=tmp_path)
    assert trainer.global_step == 41
    saved = torch.load(tmp_path / "stop-step=40.ckpt", weights_only=True)
    assert saved["callbacks"]["StabilityGuard"]["acting"]["skipped"] == 1
    assert all(bool(w.isfinite().all()) for w in saved["state_dict"].values())


class Rates(torch.optim.SGD):
    used: list[float]

    def step(self, closure=None):
        loss = super().step(closure)
        self.used = [*getattr(self, "used", []), self.param_groups[0]["lr"]]
        return loss


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60, eta_min=1e-3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=61, cycle_momentum=False),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_lower_lr_stays_under_any_schedule(name):
    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": SCHEDULES[name](optimizer), "interval": "step"},
            }

    def run(cool_down, scale):
        model = Scheduled(scale=scale, optimizer=Rates, lr=0.01)
        guard = StabilityGuard(spike="lower_lr", lr_factor=0.25, cool_down=cool_down, **SHORT)
        trainer = train(model, guard, batches(60))
        return trainer.optimizers[0], guard

    plain, _ = run(None, {})
    for cool_down in (None, 5):
        lowered, guard = run(cool_down, {40: 100.0})
        assert [d["step"] for d in guard.decisions][:1] == [40]
        used = [*lowered.used[:40], None, *lowered.used[40:]]  # step 40 is skipped
        for step, (rate, usual) in enumerate(zip(used, plain.used, strict=True)):
            low = step > 40 and (cool_down is None or step <= 40 + cool_down)
            assert rate is None or math.isclose(rate, usual * (0.25 if low else 1), rel_tol=1e-9), step
        assert lowered.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


class Indicator(Callback):
    """Another callback's metric, which is sampled every fifth step."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 5 == 0:
            trainer.callback_metrics["stability/z/lm_logits"] = torch.tensor(float(self.value(batch_idx)))


def watched(value, steps=60, **options):
    from helpers.guarded import trainer as make

    model, guard = Regression(), StabilityGuard(spike=None, **{**SHORT, **options})
    trainer = make([guard, Indicator(value)])
    trainer.fit(model, batches(steps))
    return guard, trainer


@pytest.mark.parametrize("tag", ["stability/z/lm_logits", "stability/z/.*"])
def test_a_threshold_is_crossed_once(tag):
    guard, _ = watched(lambda n: 150.0 if 20 <= n < 40 or n >= 50 else 50.0, thresholds={tag: 100.0})
    assert kinds(guard) == [(step, "threshold", "stability/z/lm_logits", "warn") for step in (21, 51)]
    assert guard.decisions[0]["value"] == 150.0
    assert guard.decisions[0]["expected"] == "at most 100"


@pytest.mark.parametrize(("bound", "value"), [([10, None], 5.0), ([10, 100], 5.0), (100, math.nan)])
def test_ranges_and_nan(bound, value):
    guard, trainer = watched(
        lambda n: value if n >= 20 else 50.0, thresholds={"stability/z/lm_logits": bound}, threshold="stop"
    )
    assert [d["kind"] for d in guard.decisions] == ["threshold"]
    assert trainer.global_step == 22


@pytest.mark.slow
def test_an_indicator_creeps():
    options = {"drift": "warn", "drifts": ["stability/.*"], "min_history": 16, "window": 64}
    guard, _ = watched(lambda n: 10 + 0.3 * math.sin(n) + 0.02 * max(0, n - 250), steps=450, **options)
    assert kinds(guard)[0][1:3] == ("drift", "stability/z/lm_logits")
    assert 250 < guard.decisions[0]["step"] < 450
    healthy, _ = watched(lambda n: 10 + 0.3 * math.sin(n), steps=450, **options)
    assert healthy.decisions == []


def test_a_name_that_no_indicator_has_is_told():
    with pytest.warns(UserWarning, match="no indicator called stability/zz"):
        watched(lambda n: 1.0, steps=3, thresholds={"stability/zz": 1.0})


def test_metrics():
    from callbacks.conftest import MemoryLogger

    logger = MemoryLogger()
    model, guard = Regression(Fault("gradient", math.nan, (20,))), StabilityGuard(**SHORT)
    trainer = train(model, guard, batches(30), logger=logger, log_every_n_steps=5)
    assert logger.steps("guard/skipped_steps") == [4, 9, 14, 19, 20, 24, 29]
    assert logger.values("guard/skipped_steps") == [0, 0, 0, 0, 1, 1, 1]
    assert logger.steps("guard/spike_score_loss") == [19, 20, 24, 29]
    assert abs(logger.values("guard/loss")[-1] - model.losses[-1]) < 1e-6
    assert float(trainer.callback_metrics["guard/skipped_steps"]) == 1


@pytest.mark.slow
def test_spike_score_is_that_of_the_steps_so_far():
    from callbacks.conftest import MemoryLogger

    logger, model = MemoryLogger(), Regression(scale={131: 300.0, 136: 0.0, 138: 300.0})
    train(model, StabilityGuard(spike=None, drift=None), batches(140), logger=logger, log_every_n_steps=1)
    assert logger.steps("guard/SpikeScore") == list(range(127, 140))
    series = [torch.tensor(logger.values(f"guard/{name}"), dtype=torch.float64) for name in ("loss", "gradient_norm")]
    expected = [float(spike_share(*(values[: step + 1] for values in series))) for step in range(127, 140)]
    assert logger.values("guard/SpikeScore") == pytest.approx(expected, rel=1e-6)
    assert expected[0] == 0 < expected[-1]


def test_gradient_norm_is_that_of_the_unclipped_gradient():
    model, guard = Regression(), StabilityGuard()
    seen = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = torch.cat([p.grad.double().flatten() for p in pl_module.parameters()])
            seen.append(float(grads.norm()))

    from helpers.guarded import trainer as make

    make([guard, Norm()], gradient_clip_val=1e-3).fit(model, batches(3))
    assert guard._reader.last.values[1] == pytest.approx(seen[-1], rel=1e-5)


def test_sparse_gradients_are_looked_at():
    class Sparse(Regression):
        def __init__(self):
            super().__init__(Fault("gradient", math.nan, (2,)), optimizer=torch.optim.SGD)
            self.table = nn.Embedding(5, 4, sparse=True)

        def loss(self, batch, number):
            bad = math.nan if number == 2 else 0.0
            out = self.table(torch.tensor([1, 2]))
            out.register_hook(lambda g: g + bad)
            return (self.net(batch["x"][0][:2] + out) ** 2).mean()

    model, guard = Sparse(), StabilityGuard()
    train(model, guard, batches(5))
    assert guard.skipped_steps == 1
    assert model.table.weight.isfinite().all()
