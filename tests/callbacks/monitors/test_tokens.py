"""TokenMonitor: the entropies of the sequences that a model reads, over forward calls, and what it cannot measure."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mue.callbacks import TokenMonitor
from lightning_mue.callbacks.monitors.tokens import _TokenProbe


def entropy(ids):
    shares = [n / len(ids) for n in Counter(ids).values()]
    return -sum(p * math.log(p) for p in shares)


def test_values(toy):
    data = torch.randint(0, 11, (8, 24), generator=torch.Generator().manual_seed(0))
    data[5] = 3
    logger = toy.MemoryLogger()
    toy.make_trainer([TokenMonitor()], logger).fit(toy.make_model(), DataLoader(data, batch_size=2))
    expected = [[entropy(row.tolist()) for row in data[i : i + 2]] for i in range(0, 8, 2)]
    for name, of in {"max": max, "min": min, "mean": lambda e: sum(e) / len(e)}.items():
        found = logger.values(f"data/sequence_entropy_{name}")
        assert found == pytest.approx([of(each) for each in expected], abs=1e-5)
    assert logger.values("data/sequence_entropy_min")[2] == pytest.approx(0, abs=1e-6)


def test_ranks_and_calls_merge_exactly():
    probe = _TokenProbe(torch.nn.Embedding(50, 2), "tokens")
    rows = torch.randint(0, 50, (6, 32), generator=torch.Generator().manual_seed(1))
    whole = probe.measure((rows,), None)
    parts = [probe.measure((part,), None) for part in rows.split([1, 3, 2])]
    merged = probe.merge(probe.merge(parts[0], torch.zeros(4)), probe.merge(parts[1], parts[2]))
    assert merged.tolist() == pytest.approx(whole.tolist(), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (32,), (0, 32)])
def test_sequences_that_say_nothing(shape):
    probe = _TokenProbe(torch.nn.Embedding(50, 2), "tokens")
    assert probe.measure((torch.zeros(shape, dtype=torch.long),), None) is None
