"""Does the best learning rate stay, from a small base to a larger target, in a GPT that declares nothing?

The model is `foreign_models.GPT`, trained by a Trainer; with the plan, ``MuECallback(rule=..., base={...})`` is all that is added:

* ``mingpt``: width 32 -> 160 and depth 2 -> 6 under ``complete-p``.
* ``experts``: width 32 -> 96, depth 2 -> 4, dense FFN -> eight experts in a ModuleList, two active, under ``complete-mue``.
* ``tied``: tied embeddings, width 64 -> 512 under ``complete-p``.

Protocol. Text: the top-level sources of Python's standard library as bytes, the last tenth for validation. The base alone
chooses everything: how long, which warm-up and, as the best of its own sweep over powers of two, the middle of the five rates that
the target is trained at (`tied`: four, the second of them). The base passes if its best rate is the same in every seed. Only then
is the target trained, with the callback and, with one seed, without it (the standard parameterization, ``sp``). A seed fixes data,
their order and initial draws for all rates of a model. The loss is that of validation after the last step. ``noise`` is the
standard error, over seeds, of the difference to the best rate. Run as ``python benchmarks/foreign_transfer.py``; ``--quick`` is for
tests.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sysconfig
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from common import Claim, parse, result_name, save
from foreign_models import GPT
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue import MuECallback

Row = dict[str, object]


@dataclass(frozen=True)
class Figure:
    """What is trained: keyword arguments of the GPT that differ, the base's and the target's, and how long."""

    rule: str
    base: dict[str, int]
    target: dict[str, int]
    shared: dict[str, float]
    below: int = 2
    above: int = 2
    coarse: tuple[float, ...] = tuple(2.0**e for e in range(-9, -4))
    steps: int = 150
    rows: int = 16
    length: int = 32
    warmup: float = 0.3
    validation: int = 256
    verify: bool | None = None


BASE, TARGET = {"n_embd": 32, "n_head": 2, "n_layer": 2}, {"n_embd": 160, "n_head": 10, "n_layer": 6}
EXPERTS = {"n_embd": 96, "n_head": 6, "n_layer": 4, "n_experts": 8}
FIGURES = {
    "mingpt": Figure("complete-p", BASE, TARGET, {}),
    "experts": Figure("complete-mue", {**BASE, "n_experts": 0}, EXPERTS, {}),
    "tied": Figure(
        "complete-p",
        {"n_embd": 64, "n_head": 2, "n_layer": 2},
        {"n_embd": 512, "n_head": 16, "n_layer": 2},
        {"tied": True},
        below=1,
        steps=60,
        rows=8,
    ),
}


def text() -> Tensor:
    """The standard library's top-level sources as bytes, int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


DATA = text()
CUT = len(DATA) * 9 // 10


def windows(data: Tensor, count: int, length: int, seed: int) -> Tensor:
    """[count, length + 1] random windows."""
    starts = torch.randint(0, len(data) - length - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return data[starts[:, None] + torch.arange(length + 1)]


def train(figure: Figure, sizes: dict[str, int], rule: str, rate: float, seed: int) -> float:
    """Validation loss in nats after one run; 99 where it is not finite."""
    L.seed_everything(seed, verbose=False)
    model = GPT(**sizes, **figure.shared, block_size=figure.length, learning_rate=rate, warmup=figure.warmup)
    plan = MuECallback(rule=figure.rule, base=figure.base, seed=seed, verbose=False, verify=figure.verify)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[] if rule == "sp" else [plan],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(windows(DATA[:CUT], figure.steps * figure.rows, figure.length, seed))
    trainer.fit(model, DataLoader(data, batch_size=figure.rows))
    model.eval()
    with torch.no_grad():
        loss = model.loss(windows(DATA[CUT:], figure.validation, figure.length, 10**6)).item()
    print(f"{rule} {sizes} rate {rate:.3g} seed {seed}: {loss:.4f}", flush=True)
    return loss if math.isfinite(loss) else 99.0


def sweep(figure: Figure, label: str, sizes: dict[str, int], rule: str, rates: list[float], seeds: int) -> Row:
    """Losses by rate, the best rate, and the noise."""
    runs = [[train(figure, sizes, rule, rate, seed) for rate in rates] for seed in range(seeds)]
    losses = [list(of_rate) for of_rate in zip(*runs, strict=True)]
    means = [statistics.mean(values) for values in losses]
    best = means.index(min(means))
    gaps = [[a - b for a, b in zip(values, losses[best], strict=True)] for values in losses]
    return {
        "model": label,
        "rule": rule,
        "rates": [float(f"{rate:.4g}") for rate in rates],
        "losses": [round(value, 4) for value in means],
        "noise": [round(statistics.stdev(gap) / seeds**0.5, 4) if seeds > 1 else None for gap in gaps],
        "best rate": rates[best],
        "best index": best,
        "best index by seed": [run.index(min(run)) for run in runs],
        "seeds": seeds,
        "losses by seed": [[round(value, 4) for value in run] for run in runs],
    }


def measure(name: str, figure: Figure, base_seeds: int, seeds: int) -> list[Row]:
    """The base's sweep, then the target's with the plan and without."""
    base = sweep(figure, "base", figure.base, "sp", list(figure.coarse), base_seeds)
    middle = figure.coarse[base["best index"]]  # type: ignore[index]
    rates = [middle * 2.0**e for e in range(-figure.below, figure.above + 1)]
    rows = [base]
    rows.append(sweep(figure, "target, callback", figure.target, figure.rule, rates, seeds))
    rows.append(sweep(figure, "target, no callback", figure.target, "sp", rates, 1))
    protocol = {"steps": figure.steps, "batch": [figure.rows, figure.length], "warmup": figure.warmup}
    sizes = {"base sizes": figure.base, "target sizes": figure.target, "both": figure.shared}
    return [{"figure": name, **row, **protocol, **sizes} for row in rows]


def claims(rows: list[Row]) -> list[Claim]:
    """With the callback the best of the rates is the base's; a control without it shows whether it would have been anyway."""
    base, scaled = rows[:2]
    best = [dict(zip(row["rates"], row["losses"], strict=True)) for row in (base, scaled)]
    octaves = abs(math.log2(min(best[0], key=best[0].get) / min(best[1], key=best[1].get)))
    what = f"factors of two between the best rates of base and target, {base['figure']}, with the callback"
    return [Claim(what, "at most", 0.0, round(octaves, 2))]


def main() -> None:
    """Measures and saves one file for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", choices=list(FIGURES), help="one figure only")
    parser.add_argument("--base-seeds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2, help="of the target")
    parser.add_argument("--quick", action="store_true", help="two short steps, two rates, one seed, nothing saved")
    options = parse(parser, threads=1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    for name in [options.figure] if options.figure else FIGURES:
        figure = FIGURES[name]
        if options.quick:
            coarse = (2.0**-9, 2.0**-8, 2.0**-7)
            figure = replace(figure, coarse=coarse, below=0, above=1, steps=2, rows=2, validation=4, verify=False)
        rows = measure(name, figure, *((1, 1) if options.quick else (options.base_seeds, options.seeds)))
        if options.quick:
            print(*(f"row {json.dumps(row)}" for row in rows), sep="\n")
        else:
            save(result_name(f"foreign_transfer_{name}"), rows, claims, strict=options.strict)


if __name__ == "__main__":
    main()
