"""What StabilityGuard costs: an optimizer step of the quickstart's model with it over one without it, in one run.

Trainer and model are those of configs/quickstart.yaml, without its other callbacks but MuECallback's optimizer. The guard works
at every second batch only: plain and guarded steps alternate, on the same weights and threads. The third row is the time inside of
the guard's hooks.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from common import Claim, parse, result_name, save
from lightning.pytorch import Callback, Trainer

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, StabilityGuard
from lightning_mue.optim.schedule import WarmupDecay


def _is_guarded(trainer: Trainer) -> bool:
    """Guarded, plain, plain, guarded, ...: each pair of steps has one of each, in both orders."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready % 4 in (0, 1)


class Alternating(Callback):
    """Lets the guard work at every second batch, and notes the seconds of each batch."""

    def __init__(self, guard: StabilityGuard) -> None:
        self.guard, self.seconds = guard, {"plain": [], "guarded": []}
        self.inner: dict[str, list[float]] = {"guard alone": []}
        self.start = 0.0

    def __getattribute__(self, name: str):
        """Every hook of the guard, at guarded batches only."""
        if name not in _PASSED:
            return super().__getattribute__(name)
        guard, inner = super().__getattribute__("guard"), super().__getattribute__("inner")

        def hook(trainer, *args):
            if _is_guarded(trainer):
                start = time.perf_counter()
                getattr(guard, name)(trainer, *args)
                inner.setdefault("now", []).append(time.perf_counter() - start)

        return hook

    def on_train_start(self, trainer, pl_module):
        """The guard's."""
        self.guard.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        """The guard's."""
        self.guard.on_train_end(trainer, pl_module)


_PASSED = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Clock(Callback):
    """Seconds from before the first callback's work to after the last one's."""

    def __init__(self, alternating: Alternating) -> None:
        self.of = alternating


class First(Clock):
    """Starts it."""

    def on_train_batch_start(self, *_):
        """Notes the time."""
        self.of.start = time.perf_counter()
        self.of.inner["now"] = []


class Last(Clock):
    """Stops it."""

    def on_train_batch_end(self, trainer, *_):
        """Notes the seconds since."""
        kind = "guarded" if _is_guarded(trainer) else "plain"
        self.of.seconds[kind].append(time.perf_counter() - self.of.start)
        if kind == "guarded":
            self.of.inner["guard alone"].append(sum(self.of.inner["now"]))


def model() -> MoELanguageModel:
    """The quickstart's."""
    return MoELanguageModel(
        context_length=256,
        width=128,
        depth=3,
        n_heads=4,
        n_experts=8,
        top_k=2,
        expert_width=128,
        gate="sqrt",
        residual_multiplier=0.5,
        embedding_std=0.3,
        unembedding_std=0.25,
        optimizer=lambda params: HyperSphereOptimizer(params, lr=0.01, momentum=0.8),
        scheduler=WarmupDecay,
    )


def measure(rounds: int, batch_size: int) -> list[dict[str, object]]:
    """Medians over pairs of neighbouring steps."""
    torch.manual_seed(0)
    tokens = [torch.randint(0, 256, (batch_size, 257)) for _ in range(2 * rounds + 6)]
    batches = [{"tokens": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()} for t in tokens]
    guard = StabilityGuard(min_history=4)
    alternating = Alternating(guard)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=len(batches),
        callbacks=[First(alternating), alternating, Last(alternating)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model(), torch.utils.data.DataLoader(batches, batch_size=None))
    # The first steps pay for warm-up.
    times = {key: values[3:] for key, values in {**alternating.seconds, **alternating.inner}.items() if key != "now"}
    plain = statistics.median(times["plain"])
    pairs = zip(times["guarded"], times["plain"], strict=False)
    step = f"quickstart, {batch_size} x 256 tokens a step, HyperSphereOptimizer"
    return [
        {"part": "step", "what": f"{step}: plain step", "ms": 1e3 * plain, "of a plain step": 1.0},
        {
            "part": "step",
            "what": f"{step}: guarded step",
            "ms": 1e3 * statistics.median(times["guarded"]),
            "of a plain step": statistics.median(a / b for a, b in pairs),
        },
        {
            "part": "step",
            "what": f"{step}: the guard's own work",
            "ms": 1e3 * statistics.median(times["guard alone"]),
            "of a plain step": statistics.median(times["guard alone"]) / plain,
        },
    ]


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """The guard's work is a small part of a step."""
    by_name = {str(row["what"]).split(": ")[-1]: float(str(row["of a plain step"])) for row in rows}
    return [Claim("time of the guard's own work / plain step", "at most", 0.005, by_name["the guard's own work"])]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parse(parser)
    warnings.simplefilter("ignore")
    save(result_name("guard"), measure(args.rounds, args.batch_size), claims, part=["part"], strict=args.strict)


if __name__ == "__main__":
    main()
