"""The order of DDP's buckets: it decides the last bit on four ranks, and a resumed run takes it up again (_buckets.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def seen(forked):
    """What rank 0 saw."""
    return torch.load(forked / "seen.pt", weights_only=True)


@pytest.mark.slow
def test_the_cause_is_that_ddp_makes_new_buckets_after_its_first_pass(seen):
    """So neither two ranks, whose sums have one order, nor find_unused_parameters, which keeps the buckets, are concerned."""
    for name in ("two", "four", "unused"):
        first, second, third = seen[name]
        assert torch.equal(second, third)
        assert torch.equal(first, second) == (name != "four")
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("view", [False, True])
def test_a_resumed_run_is_equal_bit_for_bit(seen, view):
    assert len(seen["order"]) == 10
    assert torch.equal(seen["resumed", view], seen["whole", view])
    assert torch.equal(seen["resumed again", view], seen["whole", view])
    # A control: as torch would go on.
    assert not torch.equal(seen["without", view], seen["whole", view])
