"""Two ranks measure what one process measures: whole weights under DDP, shards under FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from callbacks.transfer import _ranks

from lightning_mue.callbacks.transfer.fingerprint import Fingerprint

SCRIPT = _ranks.__file__


@pytest.mark.slow
def test_ddp_and_fsdp2_record_what_one_process_does(tmp_path):
    _ranks.fit(tmp_path / "alone.json", "auto", 1)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(SCRIPT),
            str(tmp_path),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    alone = Fingerprint.load(tmp_path / "alone.json")
    assert alone.progress == [1 / _ranks.STEPS, 1.0]
    for rank in (0, 1):
        for name, (calls, sharded) in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True).items():
            assert calls == [1, _ranks.STEPS], name  # one collective a sampled step (the first and the last), else none
            assert sharded == (name == "fsdp2")
    for name in ("ddp", "fsdp2"):
        found = Fingerprint.load(tmp_path / f"{name}.json")
        assert found.curves.keys() == alone.curves.keys()
        for key, curve in alone.curves.items():
            # Adam's first steps are signs: where a gradient is round-off, its sign is too. The rest is four digits.
            assert found.curves[key] == pytest.approx(curve, rel=2e-3), (name, key)
