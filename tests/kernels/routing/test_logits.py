"""`router_logits`: full float32 whatever the types and switches, and nothing saved but its inputs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_mue.kernels.routing.logits as module
from lightning_mue.kernels.routing.op import router_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(x_dtype=torch.float32, w_dtype=torch.float32, tokens=37, width=96, experts=5):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, width, generator=generator), torch.randn(experts, width, generator=generator)
    return x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def check(x, w):
    logits = router_logits(x, w)
    wide = torch.float64 in (x.dtype, w.dtype)
    assert logits.dtype == (torch.float64 if wide else torch.float32)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    exact = exact_x @ exact_w.T
    tolerance = 1e-14 if wide else 4e-7  # float32 sums of 96 products; bfloat16 or tf32 products would give 1e-3
    assert relative(logits, exact) < tolerance
    dlogits = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(logits, (x, w), dlogits.to(logits.dtype))
    for ours, true, like in zip(grads, torch.autograd.grad(exact, (exact_x, exact_w), dlogits), (x, w), strict=True):
        assert ours.dtype == like.dtype
        assert relative(ours, true) < max(tolerance, torch.finfo(like.dtype).eps)


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_types(x_dtype, w_dtype):
    check(*inputs(x_dtype, w_dtype))


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype, product, monkeypatch):
    """Where oneDNN multiplies, of a view too; on processors with fast and with slow bfloat16."""
    monkeypatch.setattr(module, "cpu_product_dtype", lambda: product)
    x, w = inputs(dtype, dtype, tokens=module._MANY + 3)
    check(x, w)
    wide = torch.cat([x.detach(), x.detach()], 1)[:, 1:97].requires_grad_()
    check(wide, w)


@pytest.mark.parametrize("tokens", [37, 1100])
def test_autocast_changes_nothing(tokens):
    x, w = inputs(torch.bfloat16, tokens=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(x, w)
        low = torch.nn.functional.linear(x.float(), w)  # negative control: this is what autocast does
    assert relative(low.float(), x.double() @ w.double().T) > 1e-4


@pytest.mark.parametrize("tokens", [256, 1100])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_lower_precision_elsewhere_changes_nothing(precision, tokens):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        states = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        assert ("bf16" in states) == (precision == "medium")
        check(*inputs(tokens=tokens, width=256, experts=64))
        assert states == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "medium")  # still readable
    finally:
        torch.set_float32_matmul_precision(before)


def test_saves_its_inputs_and_nothing_else():
    x, w = inputs(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        router_logits(x, w)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), w.data_ptr()]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.nn.functional.linear(x.float(), w)
    assert any(t.data_ptr() not in (x.data_ptr(), w.data_ptr()) for t in saved)  # negative control: a copy


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_wanted_is_computed(wanted):
    x, w = (t.detach().requires_grad_(want) for t, want in zip(inputs(), wanted, strict=True))
    logits = router_logits(x, w)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * 37 * 5 * 96
    assert [t.grad is not None for t in (x, w)] == list(wanted)


def test_flops():
    x, w = inputs()
    with FlopCounterMode(display=False) as counter:
        router_logits(x, w).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 37 * 5 * 96


def test_no_tokens_strides_and_meta():
    x, w = inputs()
    assert router_logits(x[:0], w).shape == (0, 5)
    router_logits(x[:0], w).sum().backward()
    assert (w.grad == 0).all()
    view = x.T.contiguous().T[::2]
    assert torch.allclose(router_logits(view, w), view @ w.T, atol=1e-5)
    meta = router_logits(x.bfloat16().to("meta"), w.to("meta"))
    assert meta.shape == (37, 5)
    assert meta.dtype == torch.float32


def test_operators_are_well_formed():
    x, w = inputs(torch.bfloat16)
    torch.library.opcheck(torch.ops.lightning_mue.router_logits.default, (x, w))
    for wanted in ([True, True], [False, True]):
        args = (torch.randn(37, 5), x.detach(), w.detach(), wanted)
        torch.library.opcheck(torch.ops.lightning_mue.router_logits_backward.default, args)


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [
        (
            torch.zeros(2, 3, 8),
            torch.zeros(4, 8),
            r"x_Td and weight_Ed: found shapes \[2, 3, 8\] and \[4, 8\].*reshape",
        ),
        (torch.zeros(3, 8), torch.zeros(8, 4), r"\[3, 8\] and \[8, 4\]"),
    ],
)
def test_what_is_refused(x, w, words):
    with pytest.raises(ValueError, match=words):
        router_logits(x, w)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The products as tensor cores take them: on the CPU `torch.mm` has no `out_dtype`, but these are exact in float32."""
    sizes = []

    def product(x, weight):
        assert x.dtype == weight.dtype
        assert x.dtype.itemsize == 2
        sizes.append(len(weight))
        return x.float() @ weight.float().T

    monkeypatch.setattr(module, "_mm_16", product)
    monkeypatch.setattr(module, "_on_tensor_cores", lambda x, weight: True)
    return sizes


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_products_of_16_bits_lose_nothing(as_on_a_gpu, x_dtype, w_dtype):
    x, w = inputs(x_dtype, w_dtype, tokens=512, width=512, experts=64)
    exact = (x.double() @ w.double().T).detach()
    logits = router_logits(x, w)
    assert as_on_a_gpu == [64 * (3 if w_dtype == torch.float32 else 1)]
    # No further from float64 than float32 matrices are; the choice can differ only where logits are equal to float32's rounding.
    assert relative(logits, exact) < 1.5 * relative(x.float() @ w.float().T, exact)
    assert same_choice(logits, exact)
    assert not same_choice(x.float() @ w.to(torch.float8_e4m3fn).float().T, exact)  # it would notice
    if w_dtype == torch.float32:
        assert not same_choice(x.float() @ w.bfloat16().float().T, exact)  # what one part of three would give


def same_choice(logits, exact, top_k=8):
    """Whether the same experts are chosen wherever float64 tells the last chosen from the first not chosen by 1e-5."""
    best = exact.topk(top_k + 1).values
    clear = best[:, -2] - best[:, -1] > 1e-5
    assert clear.float().mean() > 0.99
    ours, true = (t.topk(top_k).indices.sort().values for t in (logits, exact))
    return torch.equal(ours[clear], true[clear])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32])
def test_tensor_cores_keep_float32_sums(w_dtype):
    x, w = (t.detach().cuda() for t in inputs(torch.bfloat16, w_dtype, tokens=4096, width=2048, experts=128))
    exact = x.double() @ w.double().T
    assert relative(router_logits(x, w), exact) < 1e-5  # tensor cores cut sums off; bfloat16 sums would give 1e-3
