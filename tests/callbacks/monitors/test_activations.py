"""ActivationOutlierMonitor logs exactly what a float64 computation from the branch outputs gives."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor

METRICS = ("rms", "outlier_percent", "max_over_rms", "kurtosis")


def reference(x, threshold):
    x = x.double()
    rms = x.pow(2).mean().sqrt()
    token = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    z = (x - x.mean()) / x.std(correction=0)
    values = (rms, 100 * (token.abs() > threshold).double().mean(), x.abs().max() / rms, z.pow(4).mean())
    return dict(zip(METRICS, (value.item() for value in values), strict=True))


def test_exact_values_and_keys(toy):
    model, logger = toy.fit([ActivationOutlierMonitor(threshold=2.0)])
    ends = (
        "attention/00",
        "attention/01",
        "attention_max",
        "attention_mean",
        "ffn/00",
        "ffn/01",
        "ffn_max",
        "ffn_mean",
    )
    keys = [f"stability/{metric}/{end}" for metric in METRICS for end in ends]
    keys += [f"stability/massive_channels/{end}" for end in ends if not end.endswith("mean")]
    keys = sorted(keys + [f"stability/largest_channel/{end}" for end in ends if "/" in end])
    assert [tag for tag in logger.tags() if tag.startswith("stability")] == keys
    outliers = 0.0
    for step in range(6):
        for branch in ("attention", "ffn"):
            layers = [reference(x, 2.0) for x in model.seen[branch][step]]
            for metric in METRICS:
                expected = [layer[metric] for layer in layers]
                expected += [sum(expected) / 2, max(expected)]
                found = [
                    logger.values(f"stability/{metric}/{branch}{end}")[step] for end in ("/00", "/01", "_mean", "_max")
                ]
                assert found == pytest.approx(expected, rel=1e-5), (step, branch, metric)
                outliers += sum(expected) * (metric == "outlier_percent")
    assert outliers > 0  # the threshold is low enough for the toy to have outliers at all


def test_massive_channels_are_named(toy):
    """One entry of the second of two passes is far above the mean magnitude of both: its channel is named, no other is massive."""
    model, factors = toy.make_model(passes=2), iter([1.0, 1e4])
    plain = model.blocks[1].ffn.forward

    def grown(x, keep):
        factor = torch.ones(2, 5, 8)
        factor[1, 3, 5] = next(factors)
        return plain(x, keep) * factor

    model.blocks[1].ffn.forward = grown
    monitor, names = ActivationOutlierMonitor(), {}

    class Named(Callback):
        def on_train_batch_end(self, *_):
            names.update(monitor.massive())

    _, logger = toy.fit([monitor, Named()], model=model, n_batches=1)
    x = torch.cat(model.seen["ffn"][0][1::2]).double().flatten(0, -2)
    massive = x.abs().amax(0) > 100 * x.abs().mean()
    assert massive.tolist() == [channel == 5 for channel in range(8)]
    assert logger.values("stability/largest_channel/ffn/01") == [5]
    assert (
        logger.values("stability/massive_channels/ffn/01") == logger.values("stability/massive_channels/ffn_max") == [1]
    )
    assert logger.values("stability/massive_channels/ffn/00") == [0]
    assert names == {"ffn/01": [5]}


def test_several_forward_passes_are_one_tensor(toy):
    model = toy.make_model(passes=2)
    plain = model.blocks[0].ffn.forward
    scales = iter([1.0, 5.0] * 2)
    model.blocks[0].ffn.forward = lambda x, keep: plain(x, keep) * next(scales)  # two passes of different spread
    _, logger = toy.fit([ActivationOutlierMonitor()], model=model, n_batches=2)
    outputs = model.seen["ffn"][1][0::2]  # block 0 of each pass
    expected = reference(torch.cat(outputs), 5.0)["kurtosis"]
    assert logger.values("stability/kurtosis/ffn/00")[1] == pytest.approx(expected, rel=1e-5)
    average = sum(reference(x, 5.0)["kurtosis"] for x in outputs) / 2
    assert average != pytest.approx(expected, rel=1e-2)  # negative control: not the mean over passes


def test_nan_is_logged(toy):
    model = toy.make_model()
    plain = model.blocks[1].attention.forward
    model.blocks[1].attention.forward = lambda x, keep: plain(x, keep) * float("nan")
    _, logger = toy.fit([ActivationOutlierMonitor()], model=model, n_batches=1)
    for metric in METRICS:
        assert torch.tensor(logger.values(f"stability/{metric}/attention/01")).isnan().all()
        assert torch.tensor(logger.values(f"stability/{metric}/attention_max")).isnan().all()


def test_any_module_may_be_a_branch(toy):
    class Gate(nn.Module):
        mue_branch = "gate"

        def forward(self, x):
            return (2 * x, None)  # a tuple's first tensor is the output

    model = toy.make_model()
    model.gate = Gate()
    model.loss = lambda tokens, plain=model.loss: plain(tokens) + 0 * model.gate(model.embedding(tokens))[0].sum()
    before = model.embedding.weight.detach().clone()
    _, logger = toy.fit([ActivationOutlierMonitor()], model=model, n_batches=1)
    output = 2 * before[next(iter(toy.tokens(1)))]
    expected = output.double().pow(2).mean().sqrt().item()
    assert logger.values("stability/rms/gate/gate") == pytest.approx([expected], rel=1e-6)


def test_bad_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold: found 0"):
        ActivationOutlierMonitor(threshold=0)


def test_the_branch_after_its_multiplier(toy):
    """What is added to the stream: the RMS times the block's own multiplier; a model that declares none has no such tag."""
    model = toy.make_model()
    for block, m in zip(model.blocks, (0.5, -0.25), strict=True):
        block.mue_multipliers, block.m = {"residual": "m"}, m
    _, logger = toy.fit([ActivationOutlierMonitor()], model=model, n_batches=1)
    for layer, m in (("00", 0.5), ("01", 0.25)):
        for branch in ("attention", "ffn"):
            before, after = (
                logger.values(f"stability/{n}/{branch}/{layer}")[0] for n in ("rms", "rms_after_multiplier")
            )
            assert after == pytest.approx(m * before, rel=1e-6)
            assert after != pytest.approx(before, rel=0.1)
