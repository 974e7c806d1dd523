"""Killed processes: SIGKILL at random moments, SIGTERM on the command line, and torchrun's restart of two workers when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_mue
from lightning_mue import SafeCheckpoint

ROOT = Path(lightning_mue.__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("one:1", 8), ("ddp:2", 2)])
def test_kills_at_random_leave_the_trajectory_bit_for_bit(kind, kills):
    command = [sys.executable, ROOT / "benchmarks" / "kills.py", "--dry", "--kinds", kind, "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("'unreadable': 0, 'differing losses or weights': 0") == 2  # accumulation 1 and 2


CONFIG = """
trainer:
  accelerator: cpu
  devices: {devices}
  max_steps: {steps}
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy: {strategy}
  default_root_dir: {folder}
  callbacks:
    - {{class_path: lightning_mue.callbacks.MuECallback, init_args: {{rule: sp}}}}
    - {{class_path: lightning_mue.callbacks.SafeCheckpoint, init_args: {{every_n_train_steps: 5, keep_last: 100}}}}
model:
  class_path: lightning_mue.models.MoELanguageModel
  init_args: {{context_length: 8, width: 16, depth: 1, n_heads: 2, n_experts: 2, top_k: 1}}
data:
  class_path: lightning_mue.data.TextDataModule
  init_args: {{path: {folder}/text.txt, context_length: 8, batch_size: 2, cache_dir: {folder}/cache}}
ckpt_path: auto
"""


def command(tmp_path, *, steps, devices=1):
    """The command line of a run that goes on from its newest checkpoint; each call may ask for more steps."""
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
    ddp = "{class_path: DDPStrategy, init_args: {process_group_backend: gloo}}"
    strategy = ddp if devices > 1 else "auto"
    config = CONFIG.format(folder=tmp_path, steps=steps, devices=devices, strategy=strategy)
    (tmp_path / "config.yaml").write_text(config)
    return ["-m", "lightning_mue.cli.lightning_cli", "fit", "--config", tmp_path / "config.yaml"]


def wait_for(found, process, seconds=60):
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)
    return found()


@pytest.mark.slow
def test_sigterm_on_the_command_line_and_the_same_command_again(tmp_path):
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, steps=100_000)], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log
    )
    assert wait_for(lambda: list((tmp_path / "checkpoints").glob("step-*[0-9]")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    text = (tmp_path / "log").read_text()
    assert "no checkpoint in" in text
    assert "SIGTERM: the run ends after step" in text
    path = SafeCheckpoint.latest(tmp_path / "checkpoints")
    step = int(Path(path).parent.name[5:])
    again = subprocess.run(
        [sys.executable, *command(tmp_path, steps=step + 3)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        check=True,
    )
    assert f"the run goes on from {Path(path).parent}" in again.stderr.decode() + again.stdout.decode()
    assert SafeCheckpoint.latest(tmp_path / "checkpoints").endswith(f"step-{step + 3:06d}/checkpoint.ckpt")


@pytest.mark.slow
def test_torchrun_restarts_both_workers_when_one_dies(tmp_path):
    log = (tmp_path / "log").open("w")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    # A store for each attempt: in that of torchrun, the new workers find the addresses of the dead ones.
    environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [*torchrun, *command(tmp_path, steps=100, devices=2)], cwd=tmp_path, env=environment, stdout=log, stderr=log
    )
    assert wait_for(lambda: list((tmp_path / "checkpoints").glob("step-*[0-9]")), process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    workers = [pid for pid in children if "lightning_cli" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "the run goes on from" in (tmp_path / "log").read_text()
    assert SafeCheckpoint.latest(tmp_path / "checkpoints").endswith("step-000100/checkpoint.ckpt")
