"""The grouped SwiGLU operator and its worker threads."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mue.moe import Experts, MoELayer, Router, grouped
from lightning_mue.moe._workers import run_over_experts
from lightning_mue.moe.dispatch import plan_dispatch
from lightning_mue.moe.grouped import grouped_swiglu


def op_inputs(counts, top_k=2, d=5, h=3, dtype=torch.float64):
    """Inputs of the operator for a random routing with the given counts (their sum a multiple of top_k)."""
    assignments = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = assignments[torch.randperm(len(assignments))].view(-1, top_k)
    plan = plan_dispatch(ids, torch.tensor(counts))
    shapes = [(len(ids), d), (len(ids), top_k), (len(counts), h, d), (len(counts), h, d), (len(counts), d, h)]
    floats = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    return (*floats, plan.order, plan.inverse, torch.tensor(counts))


def test_dispatch_plan_is_a_stable_sort():
    ids = torch.tensor([[2, 0], [2, 1], [0, 2]])
    plan = plan_dispatch(ids, torch.tensor([2, 1, 3, 0]))
    assert plan.order.tolist() == [1, 4, 3, 0, 2, 5]
    assert plan.offsets.tolist() == [0, 2, 3, 6, 6]
    assert torch.equal(plan.order[plan.inverse], torch.arange(6).view(3, 2))


def test_gradcheck_with_an_empty_expert():
    assert torch.autograd.gradcheck(lambda *a: grouped_swiglu(*a)[0], op_inputs([3, 0, 1, 4]))


def test_gradcheck_bites():
    """Negative control: a gradient that is one per cent too large is caught."""
    inputs = op_inputs([3, 0, 1, 4])

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gates):
            return gates.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, g, *rest: grouped_swiglu(x, Wrong.apply(g), *rest)[0], inputs)


def test_operator_contract():
    """Schema, autograd registration, fake implementation and AOT dispatch, as PyTorch checks them."""
    torch.library.opcheck(grouped_swiglu, op_inputs([3, 0, 1, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(two_threads, monkeypatch, dtype):
    """Ten small experts go to workers and one large one to the caller. GEMM kernels may differ in the last bits."""
    counts, results = [900, *range(3, 13)], []
    inputs = op_inputs(counts, top_k=1, d=16, h=24, dtype=dtype)
    for threshold in (0, 0, float("inf")):
        monkeypatch.setattr(grouped, "_PARALLEL_FLOPS", threshold)
        y = grouped_swiglu(*inputs)[0]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs[:5])])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for threaded, again, serial in zip(*results, strict=True):
        assert torch.equal(threaded, again)
        assert (threaded - serial).norm() <= tolerance * serial.norm()
    assert torch.get_num_threads() == 2


def test_every_expert_with_rows_runs_exactly_once(two_threads):
    seen = []
    run_over_experts(seen.extend, [500, 0, *[7] * 40, 0], parallel=True)
    assert sorted(seen) == [0, *range(2, 42)]


def test_errors_in_a_worker_reach_the_caller(two_threads):
    def fail(experts):
        for e in experts:
            raise RuntimeError(f"expert {e}")

    with pytest.raises(RuntimeError, match="expert"):
        run_over_experts(fail, [5] * 16, parallel=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_after_fork(two_threads, monkeypatch):
    """A forked child has none of its parent's threads."""
    monkeypatch.setattr(grouped, "_PARALLEL_FLOPS", 0)
    calls = []
    run_over_experts(calls.extend, [5] * 16, parallel=True)
    child = os.fork()
    if child == 0:
        run_over_experts(calls.extend, [5] * 16, parallel=True)
        os._exit(0 if len(calls) == 32 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_inference_mode(two_threads, monkeypatch):
    monkeypatch.setattr(grouped, "_PARALLEL_FLOPS", 0)
    inputs = op_inputs([8] * 16, dtype=torch.float32)
    with torch.inference_mode():
        y = grouped_swiglu(*inputs)[0]
    torch.testing.assert_close(y, grouped_swiglu(*inputs)[0].detach())


def test_only_what_is_needed_is_saved():
    """Beside its inputs the operator keeps two [S, h] pre-activations (performance.md, section 1: the minimum)."""
    inputs, saved = op_inputs([8] * 4, d=6, h=10), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        grouped_swiglu(*inputs)
    extra = [t.shape for pointer, t in saved.items() if pointer not in {i.data_ptr() for i in inputs}]
    assert extra == [(32, 10), (32, 10)]


def test_frozen_weights_and_input():
    layer = MoELayer(8, 16, 4)
    layer.experts.requires_grad_(False)
    layer(torch.randn(6, 8)).sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.experts.w_up.grad is None


def test_compiles_without_a_graph_break():
    layer = MoELayer(8, 16, 4, shared_width=8, gate="sqrt")
    compiled = torch.compile(copy.deepcopy(layer).forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).square().sum(), x)[0])


def test_flops_are_counted_on_the_meta_device():
    with torch.device("meta"):
        router, experts, x = Router(64, 8, 2), Experts(64, 32, 8), torch.empty(100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        experts(x, router(x)).sum().backward()
    expert_flops = 18 * 100 * 2 * 64 * 32
    router_flops = 6 * 100 * 64 * 8
    assert counter.get_total_flops() == expert_flops + router_flops


def test_dtype_mismatch_is_explained():
    layer = MoELayer(8, 16, 4)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, but the experts' weights are torch\.float32"):
        layer(torch.randn(6, 8).bfloat16())
