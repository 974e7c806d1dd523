"""What users of torchmetrics rely on: collections, devices and dtypes, checkpoints, copies; and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.metric_cases import CASES, batches_of, heavy, predictions
from metrics._ranks import language_model, text, trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_mue import metrics

cases = pytest.mark.parametrize("name", list(CASES))


def states(metric):
    return list(metric.metric_state.values())


def groups(collection):
    return sorted(sorted(group) for group in collection.compute_groups.values())


def test_a_collection_shares_what_is_the_same():
    branch = [metrics.OutputRMS(), metrics.OutlierPercent(), metrics.MaxOverRMS(), metrics.Kurtosis()]
    load = [metrics.MaxViolation(4), metrics.LoadEntropy(4), metrics.LoadMaxFraction(4), metrics.DeadExperts(4)]
    tokens = [metrics.CrossEntropy(), metrics.Perplexity(), metrics.BitsPerByte(2.0)]
    for members, batches in (
        (branch, batches_of(heavy)),
        (load, [(torch.tensor([0, 1, 2, 0]),), (torch.tensor([3, 0, 0, 0]),)]),
        (tokens, batches_of(predictions)),
    ):
        together, alone = MetricCollection(members), [copy.deepcopy(member) for member in members]
        for _ in range(2):  # a second epoch, after reset
            for batch in batches:
                together.update(*batch)
                for member in alone:
                    member.update(*batch)
            assert len(together.compute_groups) == 1
            assert list(together.compute().values()) == [member.compute() for member in alone]
            together.reset()
            for member in alone:
                member.reset()


@pytest.mark.parametrize(
    ("members", "first", "then"),
    [
        # No outlier in the first batch, 1 % at 3 deviations in the second.
        (
            {"low": metrics.OutlierPercent(3.0), "high": metrics.OutlierPercent(9.0), "default": metrics.Kurtosis()},
            torch.eye(100)[:, :20].repeat(1, 5) * 0 + torch.tensor([1.0, -1.0]).repeat(50),
            torch.eye(100) * 5 + torch.tensor([0.1, -0.1]).repeat(50),
        ),
        # Equal logits along both dimensions at first.
        ({"last": metrics.ZValue(), "other": metrics.ZValue(dim=0)}, torch.zeros(4, 4), torch.arange(16.0).view(4, 4)),
        ({"z": metrics.ZValue(), "entropy": metrics.RouterEntropy()}, torch.zeros(2, 1), torch.arange(4.0).view(2, 2)),
    ],
)
def test_a_collection_shares_nothing_else(members, first, then):
    """torchmetrics compares names and first values of states only; so the names hold the settings."""
    together = MetricCollection(copy.deepcopy(members))
    for x in (first, then):
        together.update(x)
        for member in members.values():
            member.update(x)
    assert groups(together) == [[name] for name in sorted(members)]
    assert together.compute() == {name: member.compute() for name, member in members.items()}


def test_other_settings_do_not_merge():
    for one, other in (
        (metrics.OutlierPercent(3.0), metrics.OutlierPercent(5.0)),
        (metrics.ZValue(), metrics.ZValue(dim=1)),
        (metrics.MaxViolation(4), metrics.MaxViolation(1)),
        (metrics.AttentionZValue(), metrics.AttentionZValue(causal=False)),
    ):
        with pytest.raises(ValueError, match="Expected state variable"):
            one.merge_state(other)


@cases
@pytest.mark.parametrize("move", ["to", "bfloat16", "half", "float", "apply"])
def test_sums_stay_wide_in_a_module_that_is_cast(name, move):
    """`precision="bf16-true"` casts the module by `.to(torch.bfloat16)`, and with it the states of a plain metric."""
    make, draw, _ = CASES[name]
    model = nn.Module()
    model.weight, model.metric, model.plain = nn.Parameter(torch.ones(2)), make(), PlainSum()
    batches = batches_of(draw)
    for batch in batches[:2]:
        model.metric.update(*batch)
    before = [state.clone() for state in states(model.metric)]
    cast = {"to": lambda: model.to(torch.bfloat16), "apply": lambda: model._apply(lambda t: t.bfloat16())}
    cast.get(move, lambda: getattr(model, move)())()
    assert all(torch.equal(a, b) for a, b in zip(before, states(model.metric), strict=True))
    model.metric.reset()
    assert [s.dtype for s in states(model.metric)] == [s.dtype for s in before]
    if move == "to":  # the trap is there
        assert model.plain.total.dtype == torch.bfloat16


class PlainSum(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x): ...

    def compute(self): ...


def test_set_dtype_is_obeyed():
    metric = metrics.CrossEntropy().set_dtype(torch.float32)
    assert metric.nats.dtype == torch.float32
    assert metric.tokens.dtype == torch.int64


@cases
def test_devices(name):
    """A model built without memory has metrics all the same; a metric that was sent there begins anew."""
    make, draw, define = CASES[name]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), make())
    for module in (model, nn.Sequential(make()).to("meta")):
        module.to_empty(device="cpu")
        metric = module[-1]
        for batch in batches_of(draw):
            metric.update(*batch)
        assert metric.compute().item() == pytest.approx(define(batches_of(draw)).item(), rel=1e-5)
    assert all(state.is_meta for state in states(make().to("meta")))


@cases
def test_checkpoints_and_copies(name):
    make, draw, define = CASES[name]
    metric = make()
    metric.update(*draw(9, 1))
    assert metric.state_dict() == {}
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        twin.update(*draw(5, 2))
        assert twin.compute().item() == pytest.approx(define([draw(9, 1), draw(5, 2)]).item(), rel=1e-5)
    metric.persistent(True)
    fresh = make()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    for each in (fresh, metric):
        each.update(*draw(5, 2))
    assert torch.equal(fresh.compute(), metric.compute())


@cases
def test_inference_mode_training_mode_and_gradients(name):
    """Lightning validates in inference mode; the same metric may go on in training, and keeps no graph."""
    make, draw, define = CASES[name]
    metric = make()
    with torch.inference_mode():
        metric.update(*draw(9, 1))
    batch = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in draw(5, 2)
    ]
    value = metric(*batch)
    assert not value.requires_grad
    assert not any(state.requires_grad for state in states(metric))
    assert metric.compute().item() == pytest.approx(define([draw(9, 1), draw(5, 2)]).item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["ZValue", "AttentionZValue", "RouterEntropy", "OutputRMS", "Kurtosis", "CrossEntropy"]
)
def test_half_precision_inputs_are_widened_also_under_autocast(name):
    make, draw, define = CASES[name]
    batch = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in draw(20, 1)]
    metric = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(*batch)
    assert metric.compute().item() == pytest.approx(define([batch]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (metrics.ZValue, [torch.tensor(1.0)], r"logits: found shape \[\], expected at least one class"),
        (metrics.RouterEntropy, [torch.empty(3, 0)], r"logits: found shape \[3, 0\], expected at least one expert"),
        (metrics.OutputRMS, [torch.tensor(1.0)], r"x: found a scalar"),
        (
            lambda: metrics.MaxViolation(4),
            [torch.ones(3, 4)],
            r"counts: found shape \[3, 4\].* each layer its own metric",
        ),
        (lambda: metrics.DeadExperts(4), [torch.ones(1)], r"counts: found shape \[1\], expected \[4\]"),
        (
            metrics.CrossEntropy,
            [torch.ones(2, 3, 8), torch.ones(2, 2).long()],
            r"logits, targets: found shapes \[2, 3, 8\]",
        ),
        (metrics.BitsPerByte, [torch.ones(2, 8), torch.ones(2)], r"targets: found torch.float32, expected token ids"),
        (metrics.AttentionZValue, [torch.ones(2, 3), torch.ones(2, 3)], r"q, k: found shapes \[2, 3\]"),
        (metrics.AttentionZValue, [torch.tensor(1.0), torch.ones(2, 3)], r"q, k: found shapes \[\]"),
    ],
)
def test_wrong_shapes_are_refused(make, inputs, message):
    with pytest.raises(ValueError, match=message):
        make().update(*inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.MaxViolation(0), "n_experts: found 0"),
        (lambda: metrics.OutlierPercent(0), "threshold: found 0"),
        (lambda: metrics.BitsPerByte(-1.0), "bytes_per_token: found -1.0"),
        (lambda: metrics.ZValue(dims=1), "Unexpected keyword arguments: `dims`"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_too_few_features_for_an_outlier_are_warned_of():
    with pytest.warns(UserWarning, match=r"OutlierPercent: found 26 features, .*= 26: .* Lower threshold"):
        metrics.OutlierPercent().update(torch.randn(4, 26))
    metric = metrics.OutlierPercent(5.0)
    metric.update(torch.eye(27)[:1])
    assert metric.compute().item() == pytest.approx(100 / 27)


class CompiledStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.z = nn.Linear(40, 40), metrics.ZValue()
        self.branch = MetricCollection([metrics.OutputRMS(), metrics.Kurtosis()])

    def forward(self, x):
        y = self.linear(x)
        self.z.update(y)
        self.branch.update(y)
        return y.relu()


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_anew_for_each_batch():
    from torch._dynamo.testing import CompileCounter  # slow to import

    step, counter = CompiledStep(), CompileCounter()
    run, batches = torch.compile(step, backend=counter), [torch.randn(4, 40) for _ in range(6)]
    with torch.no_grad():
        frames = [(run(x), counter.frame_count)[1] for x in batches]
        y = step.linear(torch.cat(batches)).double()
    assert frames == [frames[0]] * 6
    assert step.z.compute().item() == pytest.approx(y.logsumexp(-1).square().mean().item(), rel=1e-5)
    assert step.branch.compute()["OutputRMS"].item() == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_language_model_is_compiled_once(tmp_path):
    from torch._dynamo.testing import CompileCounter

    model, counter, batches = language_model(), CompileCounter(), DataLoader(text()[:1] * 12, batch_size=None)
    eager = trainer(tmp_path).validate(model, batches, verbose=False)
    compiled = trainer(tmp_path).validate(torch.compile(model, backend=counter), batches, verbose=False)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert counter.frame_count == 1
