"""What the passes over blocks share."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_mue.kernels.grouped_ffn.pytorch.running import outer_product


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
