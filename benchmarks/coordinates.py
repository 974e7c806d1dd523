"""Coordinate checks of every rule: the slope of each layer's update against size, 4 sizes x 3 seeds each.

Writes results/coordinates_<processor>: .md (verdicts and what they mean), .csv (every slope) and .json (the claims). Real text: the
standard library's sources. One experiment a line of EXPERIMENTS; run some of them with ``--only NAME ...``, which prints only.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import RESULTS, Claim, machine, parse, result_name, save
from rich.console import Console
from torch.optim import AdamW

from lightning_mue import HyperSphereOptimizer, MoELanguageModel
from lightning_mue.analysis import CoordinateCheck, coordinate_check
from lightning_mue.data import TextDataModule
from lightning_mue.parameterizations import Parameterization, Role, get_rule

CONTEXT = 64
HEAD_DIM = 16
SEEDS = 3


def adamw(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW as a language model uses it."""
    return lambda parameters: AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def sphere(lr: float, adamw_lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Muon on the sphere with the momentum of configs/quickstart.yaml."""
    return lambda parameters: HyperSphereOptimizer(parameters, lr=lr, adamw_lr=adamw_lr, momentum=0.8)


def unembedding_init(cell: str) -> Parameterization:
    """``hyperp`` with another cell for the unembedding's init std."""
    rule = get_rule("hyperp")
    table = dict(rule.tables["sphere"])
    table[Role.UNEMBEDDING] = replace(table[Role.UNEMBEDDING], init=cell)
    return replace(rule, name=f"hyperp, unembedding {cell}", tables={"sphere": table})


def fan_in() -> Parameterization:
    """``moe-dmft`` with the fan-in draw of the experts' down matrix, which is wrong: the control."""
    rule = get_rule("moe-dmft")
    table = dict(rule.tables["adam"])
    table[Role.EXPERT_DOWN] = replace(table[Role.EXPERT_DOWN], init="alpha_ffn^-1/2 d^-1/2")
    return replace(rule, name="moe-dmft-fan-in", tables={"adam": table})


@dataclass
class Experiment:
    """One coordinate check.

    ``kind``: ``claimed`` by the rule; ``control``, which must fail; ``diagnostic``, run to explain another line.
    """

    rule: str | Parameterization
    sizes: list[dict[str, Any]]
    kind: str
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(default_factory=lambda: adamw(3e-3))
    batch_size: int = 8
    hashed_vocabulary: int | None = None
    note: str = ""

    def run(self) -> CoordinateCheck:
        """Trains and measures."""
        return coordinate_check(
            self.make,
            self.sizes,
            batches(self.batch_size, self.hashed_vocabulary),
            rule=self.rule,
            optimizer=self.optimizer,
            seeds=SEEDS,
        )

    def make(self, **size: Any) -> MoELanguageModel:
        """The model at one size: dense by default, head dimension fixed, FFN 2 d and experts d wide."""
        given = {"width": 64, "depth": 2, "expert_width": size.get("width", 64), **self.model, **size}
        width = given["width"]
        return MoELanguageModel(
            **{"context_length": CONTEXT, "n_heads": width // HEAD_DIM, "ffn_width": 2 * width, **given},
            vocab_size=self.hashed_vocabulary or 256,
        )


def batches(batch_size: int, vocabulary: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Bytes of text; or hashes of three bytes each, which are many more different tokens in a batch."""
    data = TextDataModule(context_length=CONTEXT, batch_size=batch_size)
    data.prepare_data()
    data.setup("fit")
    for batch in data.train_dataloader():
        if vocabulary is None:
            yield batch
            continue
        stream = torch.cat((batch["tokens"], batch["targets"][:, -1:]), dim=1)
        three = stream[:, :-2] * 65536 + stream[:, 1:-1] * 256 + stream[:, 2:]
        tokens = three * 2654435761 % 2**32 % vocabulary
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


WIDTHS = [{"width": 64 * 2**i} for i in range(4)]
NARROW = [{"width": 32 * 2**i} for i in range(4)]
MOE = {"n_experts": 8, "top_k": 2}
SIGMOID = {"scoring": "sigmoid", "balance": "none"}
SPHERE = {
    "n_experts": 4,
    "top_k": 2,
    "gate": "sqrt",
    "residual_multiplier": 0.5,
    "embedding_std": 0.3,
    "unembedding_std": 0.12,
}
TUNED = sphere(0.08, 0.06)
DENSE_TO_MOE = [{"n_experts": n} for n in (0, 4, 8, 16)]
TWO_ACTIVE = {"top_k": 2, "expert_width": 64}
EXPERT_WIDTHS = [{"expert_width": 128 * 2**i} for i in range(4)]

EXPERIMENTS = {
    "sp, width, MoE": Experiment("sp", WIDTHS, "control", MOE),
    "complete-mue, width, MoE": Experiment("complete-mue", WIDTHS, "claimed", MOE),
    "complete-mue, dense to MoE": Experiment(
        "complete-mue",
        DENSE_TO_MOE,
        "diagnostic",
        {**TWO_ACTIVE, "balance": "none"},
        note="no auxiliary loss; dense FFN and experts in one line",
    ),
    "complete-mue, dense to MoE, switch loss": Experiment(
        "complete-mue",
        DENSE_TO_MOE,
        "claimed",
        TWO_ACTIVE,
        note="the default; the auxiliary loss drives the router",
    ),
    "complete-mue, depth, MoE": Experiment("complete-mue", [{"depth": 2 * 2**i} for i in range(4)], "claimed", MOE),
    "mup, width, dense": Experiment("mup", WIDTHS, "claimed"),
    "complete-p, width, dense": Experiment("complete-p", WIDTHS, "claimed"),
    "complete-p, depth, dense": Experiment("complete-p", [{"depth": 2 * 2**i} for i in range(4)], "claimed"),
    "mup, depth, dense": Experiment("mup", [{"depth": 2 * 2**i} for i in range(4)], "control", note="not claimed"),
    "moe-dmft, width and expert width": Experiment("moe-dmft", WIDTHS, "claimed", {**MOE, **SIGMOID}),
    "moe-dmft, expert width": Experiment(
        "moe-dmft", EXPERT_WIDTHS, "claimed", {"width": 32, "n_experts": 4, "top_k": 2, **SIGMOID}, adamw(1e-2)
    ),
    "moe-dmft-fan-in, expert width": Experiment(
        fan_in(),
        EXPERT_WIDTHS,
        "control",
        {"width": 32, "n_experts": 4, "top_k": 2, **SIGMOID},
        adamw(1e-2),
        note="the control: only the down init differs",
    ),
    "mssp-I, width and expert width": Experiment("mssp-I", WIDTHS, "claimed", {**MOE, **SIGMOID}),
    "mssp-II, width, experts, top-k": Experiment(
        "mssp-II",
        [{**n, "n_experts": 4 * 2**i, "top_k": 2 * 2**i, "expert_width": 32} for i, n in enumerate(NARROW)],
        "claimed",
        SIGMOID,
    ),
    "mssp-III, width, expert width, experts, top-k": Experiment(
        "mssp-III",
        [{**n, "n_experts": 4 * 2**i, "top_k": 2 * 2**i} for i, n in enumerate(NARROW)],
        "claimed",
        SIGMOID,
    ),
    "hyperp-paper, width, MoE": Experiment(
        "hyperp-paper", NARROW, "claimed", SPHERE, TUNED, 32, 2048, "radii of unembedding and router as printed"
    ),
    "hyperp, width, dense": Experiment(
        "hyperp",
        NARROW,
        "claimed",
        {**SPHERE, "n_experts": 0},
        TUNED,
        32,
        2048,
        "these radii fall with the width",
    ),
    "hyperp, width, MoE": Experiment(
        "hyperp", NARROW, "claimed", SPHERE, TUNED, 32, 2048, "these radii fall with the width"
    ),
    "hyperp, unembedding constant": Experiment(
        unembedding_init("1"), NARROW, "diagnostic", SPHERE, TUNED, 32, 2048, "as printed, the router's radius ours"
    ),
    "hyperp, unembedding d^-1/2": Experiment(
        unembedding_init("d^-1/2"), NARROW, "diagnostic", SPHERE, TUNED, 32, 2048, "fan-in"
    ),
    "hyperp, width, MoE, bytes": Experiment(
        "hyperp", NARROW, "diagnostic", SPHERE, TUNED, 8, None, "few different tokens: gradients of low rank"
    ),
}


def updates(check: CoordinateCheck) -> list[Any]:
    """The slopes that decide and exist."""
    return [slope for slope in check.slopes() if slope.decides and slope.status in ("pass", "FAIL")]


def halves(check: CoordinateCheck) -> tuple[float, float]:
    """Mean absolute slope over the lower and the upper half of the sizes."""
    both = [s for s in updates(check) if s.lower == s.lower]
    return tuple(statistics.mean(abs(getattr(s, half)) for s in both) for half in ("lower", "upper"))  # type: ignore[return-value]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What a rule claims stays within +-0.15, and the controls do not; diagnostics claim nothing."""
    directions = {"claimed": "at most", "control": "at least"}
    return [
        Claim(f"worst slope, {row['check']} ({row['kind']})", directions[row["kind"]], 0.15, abs(row["worst slope"]))
        for row in rows
        if row["kind"] in directions
    ]


def write(checks: dict[str, CoordinateCheck], seconds: float, strict: bool) -> None:
    """Writes the Markdown summary, the CSV of all slopes and the JSON of the claims."""
    RESULTS.mkdir(exist_ok=True)
    name = result_name("coordinates")
    columns = ("name", "role", "quantity", "slope", "error", "lower", "upper", "decides", "status")
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("experiment", *columns))
        for name, check in checks.items():
            for slope in check.slopes():
                cells = [getattr(slope, column) for column in columns]
                writer.writerow([name, *(f"{c:.4f}" if isinstance(c, float) else c for c in cells)])
    (RESULTS / f"{name}.md").write_text(summary(checks, seconds))
    worst = {check: updates(found)[0].slope for check, found in checks.items()}
    rows = [{"check": check, "kind": EXPERIMENTS[check].kind, "worst slope": slope} for check, slope in worst.items()]
    save(name, rows, claims, strict=strict)


def summary(checks: dict[str, CoordinateCheck], seconds: float) -> str:
    """The summary as Markdown."""
    where = machine()
    lines = [
        "# Coordinate checks",
        "",
        "Slope of log rms against log size after 5 steps, 4 sizes x 3 seeds, of every parameter's update and of the change of the",
        "residual stream and logits (`analysis.coordinate_check`; on the depth axis of the latter alone). A rule passes if all lie",
        "within +-0.15. Lower, upper: mean absolute slope over the smaller and the larger two sizes. Every slope:",
        "the .csv of the same name; what is learnt from it: docs/LOG.md. Made by `python benchmarks/coordinates.py` in "
        f"{seconds / 60:.0f} min;",
        f"{', '.join(f'{k} {v}' for k, v in where.items())}.",
        "",
        "Rates and data were chosen on smaller runs. Two slopes depend on that: the router's along the expert width (moe-dmft) is",
        "+0.18 +- 0.09 at rate 3e-3 instead of 1e-2; at rate 1e-2, 8 steps, widths 32-256 the router's of complete-mue is -0.29.",
        "",
        "| check | sizes | worst slope | of | +-0.15 | lower | upper | verdict | kind |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, check in checks.items():
        worst, experiment = updates(check)[0], EXPERIMENTS[name]
        inside = sum(s.status == "pass" for s in updates(check))
        low, high = halves(check)
        note = f" ({experiment.note})" if experiment.note else ""
        lines.append(
            f"| {name} | {', '.join(f'{x:g}' for x in check.sizes)} | {worst.slope:+.2f} +- {worst.error:.2f} | "
            f"{worst.quantity} of `{worst.name.removeprefix('transformer.')}` | {inside} of {len(updates(check))} | {low:.2f} | "
            f"{high:.2f} | {'pass' if check.passed else '**fail**'} | {experiment.kind}{note} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the experiments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="names, or parts of names, of experiments")
    args = parse(parser, threads=1)
    only = args.only
    chosen = {n: e for n, e in EXPERIMENTS.items() if not only or any(part in n for part in only)}
    logging.getLogger("lightning_mue").setLevel(logging.WARNING)
    checks, start = {}, time.perf_counter()
    for name, experiment in chosen.items():
        began = time.perf_counter()
        checks[name] = experiment.run()
        Console(width=150).print(f"\n## {name} ({time.perf_counter() - began:.0f} s)", checks[name])
    print(summary(checks, time.perf_counter() - start))
    if not only:
        write(checks, time.perf_counter() - start, args.strict)


if __name__ == "__main__":
    main()
