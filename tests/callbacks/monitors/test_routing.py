"""RouterMonitor logs exactly what the routers' own outputs give, over all ranks of a run."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor

METRICS = ("dead_experts", "load_entropy", "load_max_fraction", "max_violation", "token_entropy")
OTHERS = ("choice_churn", "expert_similarity", "gate_mass")
WORST = (
    "choice_churn_mean",
    "expert_similarity_max",
    "gate_mass_mean",
    "dead_experts_max",
    "load_entropy_min",
    "load_max_fraction_max",
    "max_violation_max",
    "max_violation_mean",
    "token_entropy_min",
)


def reference(logits, counts):
    p, load = logits.double().softmax(-1), counts.double() / counts.sum()
    busy = load[load > 0]
    values = (
        (counts == 0).sum(),
        -(busy * busy.log()).sum(),
        load.max(),
        load.max() * len(load) - 1,
        -(p * p.log()).sum(-1).mean(),
    )
    return dict(zip(METRICS, (float(value) for value in values), strict=True))


def test_exact_values_and_keys(toy):
    model, logger = toy.fit([RouterMonitor()])
    keys = [f"routing/{metric}/{layer}" for metric in METRICS + OTHERS for layer in ("00", "01")]
    keys += [f"routing/{name}" for name in WORST]
    assert [tag for tag in logger.tags() if tag.startswith("routing")] == sorted(keys)
    for step in range(6):
        routers = zip(model.seen["router_logits"][step], model.seen["counts"][step], strict=True)
        layers = [reference(logits, counts) for logits, counts in routers]
        expected = {f"{metric}/{i:02d}": layer[metric] for i, layer in enumerate(layers) for metric in METRICS}
        for name in WORST[3:]:
            metric, _, reduction = name.rpartition("_")
            values = [layer[metric] for layer in layers]
            expected[name] = {"max": max, "min": min, "mean": lambda v: sum(v) / len(v)}[reduction](values)
        for name, value in expected.items():
            assert logger.values(f"routing/{name}")[step] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)


def test_gate_mass_similarity_and_churn(toy):
    """The mass is the softmax of the chosen; the other two follow from the weights before each step, and move with them."""

    class Keeping(toy.ToyModel):
        def training_step(self, batch, batch_idx):
            self.weights = [*getattr(self, "weights", []), [b.ffn.router.weight.detach().clone() for b in self.blocks]]
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    model, logger = toy.fit([RouterMonitor()], model=toy.make_model(cls=Keeping))
    directions = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)).double()
    churns = []
    for step, weights in enumerate(model.weights):
        p = model.seen["router_logits"][step][1].double().softmax(-1)
        assert logger.values("routing/gate_mass/01")[step] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)
        w = torch.nn.functional.normalize(weights[1].double(), dim=1)
        cosines = (w @ w.T).fill_diagonal_(-1.0).amax(1)
        assert logger.values("routing/expert_similarity/01")[step] == pytest.approx(cosines.mean().item(), rel=1e-5)
        if step:
            before, now = ((directions @ each[1].double().T).argmax(1) for each in (model.weights[step - 1], weights))
            churns.append((before != now).double().mean().item())
    assert logger.values("routing/choice_churn/01") == pytest.approx(churns)
    assert max(churns) > 0.01  # the router does turn


def test_passes_are_summed_before_the_violation(toy):
    model, logger = toy.fit([RouterMonitor()], model=toy.make_model(passes=2), n_batches=1)
    counts = sum(model.seen["counts"][0][0::2])
    assert counts.sum() == 2 * 2 * 5  # both passes over 2 x 5 tokens
    expected = (counts.max() * 4 / counts.sum() - 1).item()
    assert logger.values("routing/max_violation/00") == pytest.approx([expected], rel=1e-6)


def test_dense_model_warns_once_and_logs_nothing(toy):
    class Plain(nn.Module):
        def forward(self, x, keep):
            return x

    model = toy.make_model()
    for block in model.blocks:
        block.ffn = Plain()
    monitor = RouterMonitor()
    with pytest.warns(UserWarning, match="RouterMonitor found nothing to watch.*mue_router"):
        _, logger = toy.fit([monitor], model=model)
    assert model.hooks_in_training == [0] * 6
    assert not any(tag.startswith("routing") for tag in logger.tags())


def test_number_of_experts_must_be_known_and_kept(toy):
    model = toy.make_model()
    model.blocks[0].ffn.router.n_experts = 5  # says five, counts four
    with pytest.raises(ValueError, match="router 00: found counts of 4 experts, expected 5"):
        toy.fit([RouterMonitor()], model=model)
    router = nn.Identity()
    router.mue_router = True
    model.extra = router
    with pytest.raises(ValueError, match="router extra: found Identity without a number of experts"):
        toy.fit([RouterMonitor()], model=model)


class GivenRouter(nn.Module):
    """Routes by the logits it is given."""

    mue_router = True
    n_experts = 4

    def forward(self, logits):
        return SimpleNamespace(logits=logits, counts=torch.bincount(logits.argmax(-1), minlength=4))


class Branch(nn.Identity):
    mue_branch = "ffn"


class RankModel(LightningModule):
    """Its modules see tensors that depend on nothing but rank and batch; ranks differ in tokens, skew and spread."""

    def __init__(self):
        super().__init__()
        self.router, self.branch, self.weight = GivenRouter(), Branch(), nn.Parameter(torch.ones(()))

    @staticmethod
    def logits(rank, batch_idx):
        generator = torch.Generator().manual_seed(10 * batch_idx + rank)
        return torch.randn(12 + 18 * rank, 4, generator=generator) * (1 + rank) + 2 * torch.eye(4)[rank]

    def training_step(self, batch, batch_idx):
        logits = self.branch(self.logits(self.global_rank, batch_idx))
        return self.weight * self.router(logits).logits.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def kurtosis(x):
    return ((x.double() - x.double().mean()) / x.double().std(correction=0)).pow(4).mean().item()


@pytest.mark.slow
def test_two_ranks_are_one_batch(toy, tmp_path):
    """Every metric is that of the joined batch of both ranks."""
    logger = CSVLogger(tmp_path, name="ddp", version=0)
    data = torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=1)
    monitors = [RouterMonitor(), ActivationOutlierMonitor(), LogitsZMonitor()]
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 2, "use_distributed_sampler": False}
    toy.make_trainer(monitors, logger, **options).fit(RankModel(), data)
    with open(tmp_path / "ddp" / "version_0" / "metrics.csv") as file:
        found = [{}, {}]
        for row in csv.DictReader(file):
            found[int(row["step"])] |= {tag: float(value) for tag, value in row.items() if value}
    for batch_idx, metrics in enumerate(found):
        ranks = [RankModel.logits(rank, batch_idx) for rank in range(2)]
        counts = [torch.bincount(logits.argmax(-1), minlength=4) for logits in ranks]
        whole = torch.cat(ranks)
        expected = {f"routing/{name}/router": value for name, value in reference(whole, sum(counts)).items()}
        expected["stability/z/router/router"] = whole.double().logsumexp(-1).square().mean().item()
        expected["stability/kurtosis/ffn/branch"] = kurtosis(whole)
        expected["stability/max_over_rms/ffn/branch"] = (whole.abs().max() / whole.square().mean().sqrt()).item()
        for tag, value in expected.items():
            assert metrics[tag] == pytest.approx(value, rel=1e-5, abs=1e-6), tag
        # Negative controls: a mean over the ranks would be another figure.
        each = [reference(logits, n)["max_violation"] for logits, n in zip(ranks, counts, strict=True)]
        assert abs(sum(each) / 2 - expected["routing/max_violation/router"]) > 0.05
        assert abs(sum(map(kurtosis, ranks)) / 2 - expected["stability/kurtosis/ffn/branch"]) > 0.05
