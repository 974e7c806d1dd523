"""The scripts under benchmarks/ that need a device at least run, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_mue

BENCHMARKS = Path(lightning_mue.__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_gpu_optimizer_runs_all_its_sections(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_optimizer.py"), "--smoke", "--out", str(tmp_path)]
    # Without a device also where there is one; the tests that need it are others.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu_optimizer.json").read_text())
    assert {"date", "torch"} <= set(result["machine"])
    rows = {name: len(part) for name, part in result["sections"].items()}
    assert rows == {
        "Ceilings": 4,
        "Errors of symmetric_matmul": 9,
        "Orthogonality": 12,
        "Time of symmetric_matmul": 7,
        "Time of orthogonalize": 3,
        "Time of a step": 2,
        "CUDA graph": 1,
        "Targets": 6,
    }
    assert all(row["ms"] > 0 for row in result["sections"]["Time of a step"])
    assert "## Orthogonality" in (tmp_path / "gpu_optimizer.md").read_text()


def test_gpu_optimizer_refuses_to_time_a_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_optimizer.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_foreign_transfer_runs_all_figures_at_the_rates_that_the_base_chose():
    command = [sys.executable, str(BENCHMARKS / "foreign_transfer.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [line.removeprefix("row ") for line in done.stdout.splitlines() if line.startswith("row ")]
    found = [json.loads(row) for row in rows]
    labels = ["base", "target, callback", "target, no callback"]
    assert [(row["figure"], row["model"]) for row in found] == [
        (name, label) for name in ("mingpt", "experts", "tied") for label in labels
    ]
    for base, scaled, control in zip(*[iter(found)] * 3, strict=True):
        best = base["rates"][base["best index"]]
        assert scaled["rates"] == control["rates"] == pytest.approx([best, 2 * best], rel=1e-3)
        assert scaled["losses"] != control["losses"]
        assert scaled["rule"] != "sp" == control["rule"]
