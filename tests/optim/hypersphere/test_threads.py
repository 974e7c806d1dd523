"""Batches of matrices side by side, one in a thread: the same step as in one thread, and nothing kept from a failure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.optim import matrices as matrices_module
from lightning_mue.optim import step as step_module

SHAPES = [(12, 20)] * 5 + [(9, 12, 20), (20, 12), (4, 20, 12), (6, 6)]


@pytest.fixture
def threads():
    """Sets the number of threads; conftest resets it."""
    return torch.set_num_threads


@pytest.fixture
def in_threads(monkeypatch):
    """Numbers of threads in which batches were worked on."""
    found = []
    run = step_module.run_in_threads

    def watched(work, items, n):
        found.append(n)
        run(work, items, n)

    monkeypatch.setattr(step_module, "run_in_threads", watched)
    return found


def trained(kind, steps=3, seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in SHAPES]
    optimizer = HyperSphereOptimizer([{"params": params, "kind": kind}], lr=0.05, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize("options", [{}, {"normalize": "neuron"}, {"retraction": "geodesic"}], ids=str)
def test_a_step_does_not_depend_on_the_number_of_threads(threads, in_threads, kind, options):
    """Products of other batch sizes may add in another order: float64, 1e-12."""
    alone, _ = trained(kind, **options)
    assert not in_threads
    threads(3)
    beside, optimizer = trained(kind, **options)
    assert set(in_threads) == {3}
    other, _ = trained(kind, seed=1, **options)
    for a, b, c in zip(alone, beside, other, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert (a - c).abs().max() > 0.1  # what the comparison would find
        assert not optimizer.state[b]["momentum"].is_inference()


def test_autograd_sees_that_weights_changed(threads, in_threads):
    """Workers run in inference mode; a backward pass through an earlier value must still be refused."""
    threads(2)
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(4)]
    optimizer = HyperSphereOptimizer([{"params": params, "kind": "sphere"}], lr=0.05)
    x = torch.randn(3, 8, requires_grad=True)
    loss = sum(((x @ p).sum() for p in params), torch.zeros(()))
    for p in params:
        p.grad = torch.randn(8, 8)
    optimizer.step()
    assert in_threads
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_a_thread_raises_reaches_the_caller(threads, monkeypatch):
    threads(2)

    def broken(*args, **kwargs):
        raise ArithmeticError("from a worker")

    monkeypatch.setattr(step_module, "orthogonalize_chunk", broken)
    with pytest.raises(ArithmeticError, match="from a worker"):
        trained("sphere", 1)


@pytest.mark.parametrize("why", ["large", "compile", "few"])
def test_operators_use_the_threads_where_batches_do_not(threads, in_threads, monkeypatch, why):
    threads(64 if why == "few" else 3)
    if why == "large":
        monkeypatch.setattr(step_module, "_LARGEST_SIDE_BY_SIDE", 20)
    if why == "compile":
        monkeypatch.setattr("lightning_mue.optim.orthogonal.newton_schulz._compiled", lambda: lambda x, *_: x)
    trained("sphere", 1, compile=why == "compile")
    assert not in_threads


def test_scratch_grows_with_threads_not_with_matrices(threads, monkeypatch):
    monkeypatch.setattr(matrices_module, "chunk_bytes", lambda device: 4 * 16 * 16 * 4)
    found = {}
    for count in (16, 160):
        for n in (1, 2):
            threads(n)
            params = [nn.Parameter(torch.randn(16, 16)) for _ in range(count)]
            optimizer = HyperSphereOptimizer([{"params": params, "kind": "sphere"}], lr=0.05)
            for p in params:
                p.grad = torch.randn(16, 16)
            optimizer.step()
            found[count, n] = optimizer.memory()["scratch"]
    assert found[16, 1] == found[160, 1]
    assert found[160, 2] <= 2 * found[160, 1]
