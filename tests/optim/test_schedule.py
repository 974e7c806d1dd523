from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.optim import SGD

from lightning_mue.optim.schedule import WarmupDecay


def make(**kwargs):
    optimizer = SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)])
    return optimizer, WarmupDecay(optimizer, **kwargs)


def rates(optimizer, scheduler, steps):
    out = []
    for _ in range(steps):
        out.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return out


def test_shape():
    values = [lr for lr, _ in rates(*make(total_steps=100, warmup=0.1, decay=0.5, final=0.2), 100)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[10:50] == [1.0] * 40
    assert values[75] == pytest.approx(0.2 + 0.8 * 0.5)
    assert values[-1] == pytest.approx(0.2 + 0.8 * 0.02)
    assert all(b <= a for a, b in pairwise(values[50:]))


def test_cosine_halves_in_the_middle():
    values = [lr for lr, _ in rates(*make(total_steps=100, warmup=0.0, shape="cosine"), 100)]
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[25] > 0.75


def test_groups_keep_their_ratio():
    for first, second in rates(*make(total_steps=20, warmup=0.2), 20):
        assert second == pytest.approx(0.1 * first, rel=1e-12)


def test_steps_may_be_told_later():
    optimizer, scheduler = make(warmup=0.5)
    scheduler.total_steps = 10
    expected = rates(*make(total_steps=10, warmup=0.5), 10)
    assert rates(optimizer, scheduler, 10) == expected
    with pytest.raises(ValueError, match=r"total_steps: found inf, .* trainer\.max_steps"):
        scheduler.total_steps = float("inf")


def test_resumes_exactly():
    optimizer, scheduler = make(total_steps=30, warmup=0.1)
    rates(optimizer, scheduler, 7)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = rates(optimizer, scheduler, 10)
    optimizer, scheduler = make(total_steps=30, warmup=0.1)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert rates(optimizer, scheduler, 10) == expected


def test_run_that_is_lengthened_decays_towards_its_new_end():
    optimizer, scheduler = make(total_steps=10, warmup=0.0)
    rates(optimizer, scheduler, 10)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.0
    optimizer, scheduler = make(total_steps=20, warmup=0.0)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert [lr for lr, _ in rates(optimizer, scheduler, 2)] == [pytest.approx(0.5), pytest.approx(0.45)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup": 1.5}, "warmup: found 1.5"),
        ({"warmup": 1.0}, "warmup: found 1.0"),
        ({"decay": -0.1}, "decay: found -0.1"),
        ({"final": 2.0}, "final: found 2.0"),
        ({"total_steps": 0}, "total_steps: found 0"),
        ({"shape": "step"}, "shape: found 'step'"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
