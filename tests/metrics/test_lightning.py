"""Metrics in a Trainer and over two processes: the same figures as one definition in float64 over all data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.metric_cases import CASES, batches_of, logits
from helpers.processes import launch
from metrics import _ranks as ranks


def expected_of_fit():
    x = torch.cat([logits(n, seed)[0] for seed, n in enumerate((3, 6, 40, 17))]).double()
    batches, model = ranks.text(), ranks.language_model()
    scores = [model(batch["tokens"]).detach().double().flatten(0, 1) for batch in batches]
    loss = F.cross_entropy(torch.cat(scores), torch.cat([b["targets"].flatten() for b in batches])).item()
    of_means = [F.cross_entropy(s, b["targets"].flatten()).item() for s, b in zip(scores, batches, strict=True)]
    assert abs(sum(of_means) / 4 - loss) > 1e-3 * loss  # negative control: not the mean over batches
    values = {"loss": loss, "bits_per_byte": loss / math.log(2) / 3.5, "perplexity": math.exp(loss)}
    return {
        "train_z_epoch": x.logsumexp(-1).square().mean().item(),
        "val_entropy": torch.special.entr(x.softmax(-1)).sum(-1).mean().item(),
        **{f"{stage}/{name}": value for stage in ("val", "test") for name, value in values.items()},
    }


def check(found):
    for name, value in expected_of_fit().items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_one_process(tmp_path):
    found = ranks.fit(tmp_path, range(4))
    check(found)
    last = logits(17, 3)[0].double().logsumexp(-1).square().mean().item()
    assert found["train_z_step"] == pytest.approx(last, rel=1e-5)  # forward logs the batch's own


@pytest.mark.slow
def test_two_processes(tmp_path):
    for report in launch(ranks.__file__, "report", 2, tmp_path):
        check(report["by Lightning"])
        for name, (_, draw, define) in CASES.items():
            batches, more = batches_of(draw), [draw(7, 5)] * 2
            for layout in ("uneven", "one rank has nothing"):
                for what, value in ((layout, define(batches)), (f"{layout}, more", define([*batches, *more]))):
                    found = report["by hand"][f"{name}, {what}"]
                    assert found.item() == pytest.approx(value.item(), rel=2e-6), f"{name}, {what}"
