"""Runs that are killed by SIGKILL at random moments, during saves too, and started again by the same command.

Each kind of run (ranks, strategy, accumulation) is first trained without a kill. Then processes are killed at random times, one
of the ranks or all, and the run goes on from `SafeCheckpoint.latest`, until it is through and there were as many kills as asked
for; a run that gets through is followed by another. What must hold: every checkpoint that has its final name can be read, and
every loss of every micro-batch, repeated ones too, and the final weights equal those of the undisturbed run bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Claim, parse, result_name, save
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_mue import MoELanguageModel, MuECallback, SafeCheckpoint
from lightning_mue.callbacks.checkpointing import folder
from lightning_mue.data import TextDataModule
from lightning_mue.sharded import whole

SIZES = {"context_length": 16, "width": 64, "depth": 2, "n_heads": 2, "n_experts": 4, "top_k": 1, "scoring": "sigmoid"}
STEPS = 30


class Noisy(MoELanguageModel):
    """Its loss depends on random numbers, as with dropout."""

    def training_step(self, batch, batch_idx):
        """The loss, with noise."""
        return super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand(()))


class Trajectory(Callback):
    """Appends the loss of each micro-batch to a file of this rank, with its place in the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """One line, written at once."""
        place = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with self.path.open("a") as file:
            file.write(f"{place} {float(outputs['loss']).hex()}\n")


def train(where: Path, kind: str, ranks: int, accumulate: int) -> None:
    """One attempt of one rank: goes on from the newest checkpoint, and notes the final weights."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    strategies = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
    }
    model = Noisy(**SIZES, balance="bias")
    data = TextDataModule(where.parent / "text.txt", context_length=16, batch_size=2, cache_dir=where.parent / "cache")
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies[kind](),
        max_steps=STEPS,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SafeCheckpoint(where / "safe", every_n_train_steps=2),
            MuECallback(rule="sp"),
            Trajectory(where / f"losses{rank}"),
        ],
    )
    trainer.fit(model, datamodule=data, ckpt_path=SafeCheckpoint.latest(where / "safe"))
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(whole(tensor).detach().contiguous().numpy().tobytes())
    (where / f"weights{rank}").write_text(digest.hexdigest())


class Attempt:
    """The processes of one attempt, forked from this one, which has their imports already."""

    def __init__(self, where: Path, kind: str, ranks: int, accumulate: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = where / "log0"
        self.children = [self._fork(rank, port, where, kind, ranks, accumulate) for rank in range(ranks)]
        self.statuses: dict[int, int] = {}

    @staticmethod
    def _fork(rank: int, port: int, where: Path, kind: str, ranks: int, accumulate: int) -> int:
        if child := os.fork():
            return child
        status = 1
        try:
            log = os.open(where / f"log{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                names = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "LOCAL_WORLD_SIZE": ranks,
                    "GROUP_RANK": 0,
                }
                names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
                os.environ.update({name: str(value) for name, value in names.items()})
            train(where, kind, ranks, accumulate)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def ended(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Whether all end within some seconds, or before it is time to `stop` waiting.

        Raises:
            RuntimeError: One failed, and nobody had killed another.
        """
        end = time.monotonic() + seconds
        while len(self.statuses) < len(self.children) and time.monotonic() < end and not stop():
            for child in self.children:
                if child not in self.statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                    self.statuses[child] = found[1]
            time.sleep(0.005)
        if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in self.statuses.values()) and not any(
            os.WIFSIGNALED(status) for status in self.statuses.values()
        ):
            self._kill(self.children)
            raise RuntimeError(self.log.read_text()[-3000:])
        return len(self.statuses) == len(self.children)

    def kill(self, draw: random.Random) -> None:
        """Kills one rank or all; those that are left are killed after a while, as torchrun does."""
        self._kill(self.children if draw.random() < 0.5 else [draw.choice(self.children)])
        if not self.ended(1.0):
            self._kill(self.children)
            self.ended(10.0)

    def _kill(self, victims: list[int]) -> None:
        for child in victims:
            if child not in self.statuses:
                os.kill(child, signal.SIGKILL)


def losses(where: Path, ranks: int) -> dict[tuple[int, str], set[str]]:
    """(rank, place) -> all losses that were seen there; a last line that was cut by a kill does not count."""
    seen: dict[tuple[int, str], set[str]] = {}
    for rank in range(ranks):
        path = where / f"losses{rank}"
        for line in path.read_text().splitlines() if path.exists() else ():
            place, _, loss = line.partition(" ")
            seen.setdefault((rank, place), set()).add(loss)
    return seen


def saving(where: Path, after: float = 0.0) -> bool:
    """Whether a save is under way, or was when the run was killed."""
    return time.monotonic() > after and any((where / "safe").glob(f"*{folder.UNFINISHED}"))


def unreadable(where: Path) -> int:
    """Checkpoints with their final name that are damaged."""
    count = 0
    for _, found in folder.complete(where / "safe"):
        try:
            count += bool(list(folder.damages(found)))
        except ValueError:
            count += 1
    return count


def disturbed(base: Path, kind: str, ranks: int, accumulate: int, kills: int, seed: int) -> dict[str, object]:
    """Kills so many times, and compares with the undisturbed run."""
    draw, case = random.Random(seed), (kind, ranks, accumulate)
    calm = base / f"{kind}-{ranks}-{accumulate}-calm"
    calm.mkdir()
    began = time.monotonic()
    Attempt(calm, *case).ended(300)
    seconds = time.monotonic() - began
    wanted, weights = losses(calm, ranks), (calm / "weights0").read_text()
    done = bad = during = runs = differing = 0
    while done < kills:
        where = base / f"{kind}-{ranks}-{accumulate}-{runs}"
        where.mkdir()
        runs += 1
        while not all((where / f"weights{rank}").exists() for rank in range(ranks)):
            attempt = Attempt(where, *case)
            # Every other kill aims at a save; past the start, where nothing is at stake.
            aims = partial(saving, where, after=time.monotonic() + draw.uniform(0.2, 0.5) * seconds)
            stop = aims if done % 2 and done < kills else lambda: False
            if not attempt.ended(draw.uniform(0.2, 0.9) * seconds if done < kills and not done % 2 else 300, stop):
                time.sleep(draw.uniform(0, 0.01) * (done % 2))
                attempt.kill(draw)
                done += 1
                during += saving(where)
                bad += unreadable(where)
        seen = losses(where, ranks)
        differing += sum(seen[place] != loss for place, loss in wanted.items())
        differing += set(seen) != set(wanted)
        differing += sum((where / f"weights{rank}").read_text() != weights for rank in range(ranks))
        shutil.rmtree(where)
    return {
        "what": f"{kind}, {ranks} rank(s), accumulation {accumulate}",
        "kills": done,
        "during a save": during,
        "runs": runs,
        "unreadable": bad,
        "differing losses or weights": differing,
    }


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """No kill does harm."""
    total = {key: sum(int(str(row[key])) for row in rows) for key in ("unreadable", "differing losses or weights")}
    return [Claim(f"{key}, of all kills", "at most", 0, value) for key, value in total.items()]


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", default=["one:1", "ddp:2", "fsdp2:2", "ddp:4"], help="strategy:ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="store nothing")
    args = parse(parser, threads=1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
        kinds = [(*kind.split(":"), accumulate) for kind in args.kinds for accumulate in (1, 2)]
        shares = [args.kills // len(kinds) + (i < args.kills % len(kinds)) for i in range(len(kinds))]
        rows = []
        for (kind, ranks, accumulate), share in zip(kinds, shares, strict=True):
            rows.append(disturbed(base, kind, int(ranks), accumulate, share, args.seed))
            print(rows[-1], flush=True)
            if not args.dry:
                save(result_name("kills"), rows[-1:], claims, part=["what"], strict=args.strict)
    raise SystemExit(any(row["unreadable"] or row["differing losses or weights"] for row in rows))


if __name__ == "__main__":
    main()
