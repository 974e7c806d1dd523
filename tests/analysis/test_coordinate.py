from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import pytest
import torch
from helpers.controls import moe_dmft_fan_in
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue.analysis import CoordinateCheck, coordinate_check
from lightning_mue.callbacks import MuECallback
from lightning_mue.models import MoELanguageModel
from lightning_mue.optim import HyperSphereOptimizer

CONTEXT = 64


def text_batches(count, size=8):
    """Random windows of real text: the top-level modules of the standard library, as bytes."""
    data = b"".join(path.read_bytes() for path in sorted(Path(argparse.__file__).parent.glob("*.py")))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - CONTEXT - 1, (count, size), generator=generator).tolist()
    windows = torch.tensor([[list(data[at : at + CONTEXT + 1]) for at in row] for row in starts])
    return [{"tokens": one[:, :-1], "targets": one[:, 1:]} for one in windows]


def language_model(width=32, depth=2, n_experts=0, **more):
    return MoELanguageModel(
        **{
            "width": width,
            "depth": depth,
            "n_heads": width // 16,
            "ffn_width": 2 * width,
            "expert_width": width,
            "n_experts": n_experts,
            "context_length": CONTEXT,
            "optimizer": lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95)),
            **more,
        }
    )


def mlp(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def regression_batches(count=1, rows=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, rows, 8, generator=generator)
    return [(one, one.prod(-1, keepdim=True).tanh() + one[:, :1]) for one in x]


def by_role(check, quantity="update"):
    roles = {}
    for slope in check.slopes():
        if slope.quantity == quantity:
            roles.setdefault(slope.role, []).append(slope.slope)
    return roles


WIDTHS = [{"width": width} for width in (32, 64, 128)]
#: Two seeds over a factor of 4 in size leave slopes of noisy layers (queries, keys) a standard error of about 0.1.
FEW_SEEDS = {"seeds": 2, "tolerance": 0.25}


def test_complete_mue_passes_and_sp_fails_on_a_transformer():
    """Positive and negative control. SP's hidden updates grow with the width (mup: slope 1 under Adam)."""
    batches = text_batches(10)
    good = coordinate_check(language_model, WIDTHS, batches, rule="complete-mue", lr=1e-2, **FEW_SEEDS)
    assert good.passed, good.verdict
    assert good.verdict.startswith("PASSED: complete-mue along width = 32, 64, 128: all 16 slopes")
    bad = coordinate_check(language_model, WIDTHS, batches, rule="sp", lr=1e-2, **FEW_SEEDS)
    assert not bad.passed
    roles = by_role(bad)
    for role in ("hidden", "ffn_up", "ffn_down"):
        assert min(roles[role]) >= 0.3, roles
    assert bad.verdict.startswith("FAILED: sp along width")


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.AdamW, 3e-3), (torch.optim.SGD, 0.1)], ids=["adam", "sgd"])
def test_a_plain_module_with_a_loss(optimizer, lr):
    """mup's table for both families on an MLP whose roles are inferred; SP fails."""
    sizes = [{"width": width} for width in (64, 128, 256, 512)]
    settings = {"loss": mse, "optimizer": lambda params: optimizer(params, lr=lr), "steps": 4, "seeds": 3}
    good = coordinate_check(mlp, sizes, regression_batches(12), rule="mup", **settings)
    bad = coordinate_check(mlp, sizes, regression_batches(12), rule="sp", **settings)
    assert good.passed, good.verdict
    assert not bad.passed
    assert good.family == ("adam" if optimizer is torch.optim.AdamW else "sgd")
    names = {slope.name for slope in good.slopes() if slope.decides and slope.quantity == "change"}
    assert names >= {"*"}  # the numbered layers of the Sequential


def test_dense_to_moe_in_one_line():
    check = coordinate_check(
        lambda n_experts: language_model(n_experts=n_experts, top_k=2, expert_width=32),
        [{"n_experts": 0}, {"n_experts": 2}, {"n_experts": 4}],
        text_batches(2),
        steps=2,
        seeds=1,
    )
    assert list(check.sizes) == [1, 2, 4]
    slope = next(s for s in check.slopes() if s.name.endswith("ffn.w_down") and s.quantity == "update")
    assert slope.sizes == (1, 2, 4)
    router = next(s for s in check.slopes() if s.name.endswith("router.weight"))
    assert router.sizes == (2, 4)


def test_depth():
    """The residual multiplier L^-1 keeps the stream's change; without it the stream grows with the depth."""
    sizes = [{"depth": depth} for depth in (2, 4, 8)]
    good = coordinate_check(language_model, sizes, text_batches(10), rule="complete-p", lr=1e-2, **FEW_SEEDS)
    assert good.depth_moves
    assert good.passed, good.verdict
    deciding = {(s.name, s.quantity) for s in good.slopes() if s.decides}
    assert deciding == {
        ("transformer.blocks.* @ 1/2", "change"),
        ("transformer.blocks.* @ 2/2", "change"),
        ("transformer.unembedding", "change"),
    }
    bad = coordinate_check(language_model, sizes, text_batches(10), rule="sp", lr=1e-2, **FEW_SEEDS)
    assert not bad.passed
    assert bad.slopes()[0].slope > 0.3


def test_same_data_new_weights_and_nothing_outside_is_touched():
    """Base and other sizes are drawn alike under each seed; the random state of the caller stays."""
    seen = []

    def loss(model, batch):
        if model.training:
            seen.append((model[0].out_features, batch[0].clone(), model[2].weight.detach().clone()))
        return mse(model, batch)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sizes = [{"width": 16}, {"width": 32}]
    coordinate_check(mlp, sizes, regression_batches(4), rule="mup", loss=loss, steps=2, seeds=2)
    assert torch.equal(torch.rand(3), expected)
    data = {width: [x for w, x, _ in seen if w == width] for width in (16, 32)}
    for a, b in zip(data[16], data[32], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(data[16][0], data[16][2])  # another seed, other batches
    first = [w for width, _, w in seen if width == 16]
    assert not torch.equal(first[0], first[2])
    # fan-in: the measured std of the base, not a constant of this package's
    assert first[0].std() == pytest.approx(16**-0.5 / 3**0.5, rel=0.25)


def test_steps_rates_and_schedulers():
    """The rate is the optimizer's own, or lr on its first group, times lr_factor; what a scheduler has begun is undone."""
    rates = []

    class Module(LightningModule):
        def __init__(self, width):
            super().__init__()
            self.net = mlp(width)

        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0)
            if self.training:
                rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
            return mse(self.net, batch)

        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[2:].parameters(), "lr": 0.03}]
            optimizer = torch.optim.AdamW(groups, lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)]

    sizes = [{"width": 16}, {"width": 32}]
    settings = {"rule": "mup", "seeds": 1, "roles": None}
    check = coordinate_check(Module, sizes, regression_batches(), steps=6, **settings)
    assert check.measured == (1, 2, 4, 6)
    assert {tuple(rate) for rate in rates[:6]} == {(0.01, 0.03)}
    rates.clear()
    coordinate_check(Module, sizes, regression_batches(), steps=1, lr=0.1, lr_factor=0.5, **settings)
    assert rates[0] == pytest.approx([0.05, 0.15])


def test_the_sphere_and_loss_free_balance():
    """Another optimizer family; the module's own callback (LossFreeBalance) takes part."""
    check = coordinate_check(
        lambda width: language_model(width, n_experts=4, top_k=2, gate="sqrt", balance="bias"),
        [{"width": 16}, {"width": 32}],
        text_batches(1),
        rule="hyperp",
        optimizer=lambda params: HyperSphereOptimizer(params, lr=0.02),
        steps=2,
        seeds=1,
    )
    assert check.family == "sphere"
    assert {"router", "expert_up", "expert_down", "unembedding"} <= set(by_role(check))


def test_manual_optimization_needs_another_way_to_run():
    class Manual(LightningModule):
        def __init__(self, width):
            super().__init__()
            self.automatic_optimization = False
            self.net = mlp(width)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(mse(self.net, batch))
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Validated(Manual):
        def validation_step(self, batch, batch_idx):
            mse(self.net, batch)

    sizes = [{"width": 16}, {"width": 32}]
    with pytest.raises(
        ValueError, match=r"loss: found none, and Manual optimizes manually in its training_step.*validation_step"
    ):
        coordinate_check(Manual, sizes, regression_batches(), rule="mup", steps=1, seeds=1)
    check = coordinate_check(Validated, sizes, regression_batches(), rule="mup", steps=2, seeds=1)
    assert all(s.rms[0] > 0 for s in check.slopes() if s.quantity == "update")
    with_loss = coordinate_check(
        Manual,
        sizes,
        regression_batches(),
        rule="mup",
        steps=2,
        seeds=1,
        loss=lambda model, batch: mse(model.net, batch),
    )
    updates = [[s.rms for s in c.slopes() if s.quantity == "update"] for c in (check, with_loss)]
    assert updates[0] == updates[1]


def test_a_module_that_brings_its_own_callback_is_not_scaled_twice():
    class Scaled(MoELanguageModel):
        def configure_callbacks(self):
            return [MuECallback(base={"width": 32, "n_heads": 2}, verbose=False)]

    settings = {"context_length": CONTEXT, "depth": 1, "ffn_width": 32}
    sizes = [{"width": 32, "n_heads": 2}, {"width": 64, "n_heads": 4}]
    plain, scaled = (
        coordinate_check(
            lambda width, n_heads, cls=cls: cls(width=width, n_heads=n_heads, **settings),
            sizes,
            text_batches(1),
            steps=1,
            seeds=1,
        )
        for cls in (MoELanguageModel, Scaled)
    )
    assert plain.records == scaled.records


def test_a_run_that_breaks_fails():
    check = coordinate_check(
        mlp,
        [{"width": 16}, {"width": 32}],
        regression_batches(),
        rule="sp",
        loss=lambda model, batch: mse(model, batch) * math.inf,
        steps=2,
        seeds=1,
    )
    assert not check.passed
    assert "FAILED" in check.verdict


def test_csv_plot_and_table(tmp_path):
    sizes = [{"width": 16}, {"width": 32}, {"width": 64}]
    check = coordinate_check(mlp, sizes, regression_batches(), rule="mup", loss=mse, steps=2, seeds=2)
    check.to_csv(tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert list(rows[0]) == ["size", "seed", "step", "name", "role", "quantity", "rms", "base"]
    assert len(rows) == len(check.records)
    assert {(float(r["size"]), r["seed"], r["step"]) for r in rows} == {
        (x, s, t) for x in (16, 32, 64) for s in "01" for t in "12"
    }
    check.plot(tmp_path / "c.png")
    content = (tmp_path / "c.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000  # panels with lines in them
    from rich.console import Console

    console = Console(width=150, record=True, file=(tmp_path / "out").open("w"))
    console.print(check)
    lines = console.export_text().splitlines()
    assert lines[0].startswith("Coordinate check: mup (adam) after 2 steps, 2 seeds")
    assert lines[-1] == check.verdict
    rows = [line.split("│") for line in lines if line.startswith("│")]
    slopes = [abs(float(row[5].split()[0])) for row in rows]
    assert len(slopes) == sum(s.decides for s in check.slopes())
    failing = [s for s in slopes if s > 0.15]
    assert slopes == failing + sorted(slopes[len(failing) :], reverse=True)


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    import sys

    check = CoordinateCheck("mup", "adam", "width", {1.0: {}, 2.0: {}}, (0,), (1,), 0.15, False, ())
    with pytest.raises(ValueError, match="plot: found no measured quantity"):
        check.plot(tmp_path / "c.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot: found no matplotlib.*pip install matplotlib"):
        check.plot(tmp_path / "c.png")


def test_a_check_that_measured_nothing_does_not_pass():
    check = CoordinateCheck("mup", "adam", "width", {1.0: {}, 2.0: {}}, (0,), (1,), 0.15, False, ())
    assert not check.passed
    assert "no slope could be fitted" in check.verdict
    with pytest.raises(ValueError, match=r"step: found 3, expected one of 1\. These are the measured steps"):
        check.slopes(3)


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        ([{"width": 16}], {}, "sizes: found 1, expected at least 2"),
        ([{"width": 16}, {"depth": 2}], {}, "sizes: found {'depth': 2}, expected the axis 'width' in every size"),
        (
            [{"width": 16}, {"width": 16}],
            {},
            "sizes: found models at width = 16, 16, expected a different width for every size",
        ),
        ([{"width": 16}, {"width": 32}], {"batches": []}, "batches: found none"),
        ([{"width": 16}, {"width": 32}], {"steps": 0}, "steps: found 0, expected an integer of at least 1"),
        ([{"width": 16}, {"width": 32}], {"seeds": 0}, "seeds: found 0, expected an integer of at least 1"),
        ([{"width": 16}, {"width": 32}], {"seeds": ()}, "seeds: found none, expected at least one seed"),
        ([{"width": 16}, {"width": 32}], {"rule": "mop"}, "rule: found 'mop'"),
        ([{"width": 16}, {"width": 32}], {"alpha": 3.0}, "alpha: found 3"),
    ],
)
def test_bad_arguments(sizes, more, message):
    arguments = {"batches": regression_batches(), "rule": "mup", "loss": mse, "steps": 1, "seeds": 1, **more}
    with pytest.raises(ValueError, match=message):
        coordinate_check(mlp, sizes, **arguments)


def test_a_module_without_a_loss():
    with pytest.raises(TypeError, match="loss: found none, for a Sequential, which is not a LightningModule"):
        coordinate_check(mlp, [{"width": 16}, {"width": 32}], regression_batches(), rule="mup", seeds=1)


def test_what_cannot_be_placed_on_the_x_axis():
    with pytest.raises(ValueError, match="sizes: found activation='relu', expected a positive number"):
        coordinate_check(
            lambda activation: mlp(), [{"activation": "relu"}, {"activation": "gelu"}], regression_batches(), loss=mse
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "passes"), [("moe-dmft", True), (moe_dmft_fan_in(), False)], ids=["moe-dmft", "fan-in control"]
)
def test_the_down_initialization_of_moe_dmft_matters(rule, passes):
    """Expert width alone grows: with fan-in init of the down matrix the update of the up matrix grows as its square root."""
    check = coordinate_check(
        lambda expert_width: language_model(
            32, n_experts=4, top_k=2, expert_width=expert_width, scoring="sigmoid", balance="none"
        ),
        [{"expert_width": 128 * 2**i} for i in range(4)],
        text_batches(15),
        rule=rule,
        lr=1e-2,
    )
    roles = by_role(check)
    if passes:
        assert max(map(abs, roles["expert_up"] + roles["expert_down"])) <= 0.15, roles
    else:
        assert not check.passed
        assert min(roles["expert_up"]) > 0.2, roles


@pytest.mark.slow
def test_complete_mue_on_a_mixture_of_experts_at_four_widths():
    check = coordinate_check(
        lambda width: language_model(width, n_experts=8, top_k=2),
        [{"width": 64 * 2**i} for i in range(4)],
        text_batches(15),
    )
    assert check.passed, check.verdict
    updates = [s for s in check.slopes() if s.decides]
    lower, upper = (sum(abs(getattr(s, half)) for s in updates) for half in ("lower", "upper"))
    assert upper < lower


def test_prints_as_a_table_without_rich_too():
    from lightning_mue.analysis import CoordinateCheck

    check = CoordinateCheck(
        rule="mup", family="adam", axis="width", sizes={1.0: {}, 2.0: {}}, seeds=(0,), measured=(1,), tolerance=0.15,
        depth_moves=False, records=(), unseen=(), notes=(),
    )  # fmt: skip
    assert "Coordinate check: mup (adam)" in str(check)
    assert "records=" not in f"{check}"
