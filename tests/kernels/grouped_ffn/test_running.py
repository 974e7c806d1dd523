"""What the passes over blocks share."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_mue.kernels.grouped_ffn.pytorch.running import outer_product, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_columns_takes_no_longer_than_one_in_rows(dtype):
    dy, x = torch.randn(1, 64, 256).to(dtype), torch.randn(1, 64, 128).to(dtype)
    expected = dy.double().mT @ x.double()
    results = {"rows": torch.empty(1, 256, 128, dtype=dtype), "columns": torch.empty(1, 128, 256, dtype=dtype).mT}
    seconds = {}
    for name, out in results.items():
        times = []
        for _ in range(4):
            start = time.thread_time()
            outer_product(dy, x, out)
            times.append(time.thread_time() - start)
        seconds[name] = min(times)
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=0.3)
    # The way that this avoids takes 2000 times as long in bfloat16 with AVX512-BF16.
    assert seconds["columns"] <= 20 * seconds["rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("columns", [False, True])
def test_packed_weights_have_no_gaps_where_the_library_needs_none(dtype, n_batch, columns):
    fused = torch.randn(4, 10, 6).to(dtype)
    w = (fused.mT.contiguous().mT if columns else fused)[:n_batch, :5]  # an expert's half
    found = packed(w)
    assert torch.equal(found, w)
    if dtype == torch.float32:
        assert found is w
        return
    dense = found.mT if columns else found
    assert dense.stride() == (30, dense.shape[2], 1)
    if n_batch == 1 and not columns:
        assert found.data_ptr() == w.data_ptr()  # no copy
