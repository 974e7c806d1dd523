"""Runs a part of a script on several CPU processes: `script.py part rank world_size folder`, once for each rank, or forked."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def launch(script, part, world, folder):
    """Run a part of a script on so many processes and return the ranks' reports; for the tests."""
    logs = [Path(folder) / f"log-{part}-{rank}" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, script, part, str(rank), str(world), str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(Path(folder) / f"{part}{rank}.pt", weights_only=True) for rank in range(world)]


def main(parts, part, rank, world, folder):
    """Run `parts[part](rank, folder)` as one of the ranks, and save its report; for the scripts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{part}", rank=int(rank), world_size=int(world))
    report = parts[part](int(rank), Path(folder))
    torch.save(report, Path(folder) / f"{part}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fork(name, world, act, folder):
    """Forks ranks that share this process's imports, in a process group and as torchrun's workers; each acts.

    For scripts, which must not have computed before.
    """
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            torch.set_num_threads(1)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
            names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "fork"}
            os.environ.update({name: str(value) for name, value in names.items()})
            dist.init_process_group("gloo", f"file://{folder}/store-{name}", rank=rank, world_size=world)
            act(rank)
            dist.barrier()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"{name} failed")
