"""The experts on the CPU: against a dense SwiGLU of equal active FLOPs, and against what others offer.

Forward and backward, T = 4096 tokens. Inputs and routings are made before the clock starts, and no two calls of a contender
see the same routing: row counts change at every step of a training run, and an implementation may have to pay for that.
Within a round all contenders see the same input, in an order that turns round from round to round. Figures are medians over
rounds of ratios within a round. Gradients are freed before each call, as `zero_grad` does.

    python benchmarks/moe.py [--dtypes float32 bfloat16] [--routings balanced skewed] [--only 0 8] [--rounds 9]

Part of the table replaces its rows in results/moe_cpu_<processor>.json and leaves the others. What is slow depends on the
processor: with AMX a bfloat16 GEMM is fast once its shape has been seen, without it nothing but arithmetic counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from common import Claim, isa, parse, result_name, save
from moe_peers import Loop, Transformers
from torch import Tensor, nn

from lightning_mue.moe import Experts, FeedForward, MoELayer, RoutingInfo

SHAPES = [  # width, experts, top_k, expert width
    (256, 8, 2, 256),
    (256, 32, 4, 128),
    (256, 64, 8, 128),
    (512, 8, 2, 512),
    (512, 8, 2, 256),
    (512, 32, 4, 256),
    (512, 64, 2, 256),
    (512, 64, 8, 128),
    (512, 64, 8, 256),
]
TOKENS = 4096
SKEW = 1.0  # standard deviation of a bias over experts, beside logits of standard deviation 1
EVERY = {"eager": 3}  # takes part in every third round only: it is that slow
PEERS = ("loop", "grouped_mm", "eager")


class Batch(NamedTuple):
    """One input, and where its tokens go."""

    x: Tensor
    dy: Tensor
    routing: RoutingInfo


def batches(shape: tuple[int, ...], dtype: torch.dtype, skew: float, n: int) -> list[Batch]:
    """As many different ones."""
    width, n_experts, top_k, _ = shape
    made, popularity = [], skew * torch.randn(n_experts)  # which changes slowly, unlike the counts
    for _ in range(n):
        logits = torch.randn(TOKENS, n_experts) + popularity
        values, ids = logits.topk(top_k)
        counts = torch.bincount(ids.flatten(), minlength=n_experts)
        routing = RoutingInfo(ids, values.softmax(-1).requires_grad_(), logits, counts)
        made.append(
            Batch(torch.randn(TOKENS, width).to(dtype).requires_grad_(), torch.randn(TOKENS, width).to(dtype), routing)
        )
    return made


def contenders(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Callable[[Batch], None]], nn.ModuleList]:
    """What runs forward and backward on a batch, by name; and all their modules."""
    width, n_experts, top_k, hidden = shape
    experts = Experts(width, hidden, n_experts, init_std=None).to(dtype)
    routed = {
        "ours": experts,
        "loop": Loop(experts),
        "grouped_mm": Transformers(experts, "grouped_mm"),
        "eager": Transformers(experts, "eager"),
    }
    dense = FeedForward(width, top_k * hidden, init_std=None).to(dtype)
    layer = MoELayer(width, hidden, n_experts, top_k, init_std=None).to(dtype)

    def whole_layer(batch: Batch) -> None:
        y = layer(batch.x)
        torch.autograd.backward([y, layer.aux_loss], [batch.dy, None])

    runs = {
        name: lambda batch, m=module: m(batch.x, batch.routing).backward(batch.dy) for name, module in routed.items()
    }
    runs["dense"] = lambda batch: dense(batch.x).backward(batch.dy)
    runs["layer"] = whole_layer
    return runs, nn.ModuleList([*routed.values(), dense, layer])


def race(shape: tuple[int, ...], dtype: torch.dtype, skew: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, NaN where it did not take part. The first round does not count."""
    torch.manual_seed(0)
    runs, modules = contenders(shape, dtype)
    data = batches(shape, dtype, skew, rounds + 1)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i, batch in enumerate(data):
        order = list(runs)[i % len(runs) :] + list(runs)[: i % len(runs)]
        for name in order if i % 2 else reversed(order):
            if (i - 1) % EVERY.get(name, 1) and i:
                seconds[name].append(math.nan)
                continue
            modules.zero_grad()
            batch.x.grad = batch.routing.gates.grad = None
            start = time.perf_counter()
            runs[name](batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over rounds of name's time over the reference's."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return statistics.median(a / b for a, b in pairs if not math.isnan(a / b))


def saved_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Bytes that the experts keep for the backward pass, over the 2d + 4Kh numbers a token that it cannot do without."""
    width, n_experts, top_k, hidden = shape
    experts = Experts(width, hidden, n_experts).to(dtype)
    (batch,) = batches(shape, dtype, 0.0, 1)
    weights = {w.untyped_storage().data_ptr() for w in experts.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = experts(batch.x, batch.routing)
    del y
    return sum(saved.values()) / (dtype.itemsize * TOKENS * (width + 2 * top_k * hidden))


def measure(shape: tuple[int, ...], dtype: torch.dtype, routing: str, rounds: int) -> dict[str, object]:
    """One row of the table."""
    seconds = race(shape, dtype, SKEW if routing == "skewed" else 0.0, rounds)
    row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "routing": routing}
    row |= dict(zip(("width", "experts", "top_k", "expert width"), shape, strict=True))
    row["time / dense"] = ratio(seconds, "ours", "dense")
    row |= {f"{peer} / ours": ratio(seconds, peer, "ours") for peer in PEERS}
    row["layer / dense"] = ratio(seconds, "layer", "dense")
    row["layer / experts"] = ratio(seconds, "layer", "ours")
    row["saved / minimum"] = saved_bytes(shape, dtype)
    row["dense ms"] = 1e3 * statistics.median(seconds["dense"])
    return row


def geomean(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    """The geometric mean of every ratio of some rows."""
    ratios = [key for key in rows[0] if " / " in key]
    means = {key: statistics.geometric_mean(float(str(row[key])) for row in rows) for key in ratios}
    return {
        **dict.fromkeys(rows[0], ""),
        "dtype": rows[0]["dtype"],
        "routing": f"{rows[0]['routing']}, geomean",
        **means,
    }


#: Speed-up over grouped_mm and over loop, geometric means.
FASTER = {"float32": (1.9, 1.35), "bfloat16": (2.7, 2.1)}
#: Time of the whole layer over dense, by the processor's instructions.
LAYER = {"avx512bf16": {"float32": 1.15, "bfloat16": 1.5}}


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """Of the experts and of the whole layer: geometric means over the shapes, and the worst shape against each peer."""
    made = []
    for row in (r for r in rows if r["routing"] == "balanced, geomean"):
        dtype, kind = str(row["dtype"]), f"{row['dtype']}, balanced, geomean"
        experts = {"float32": 1.30, "bfloat16": 1.8}[dtype]
        made.append(Claim(f"time of the experts over dense, {kind}", "at most", experts, row["time / dense"]))
        # Rows measured before there was this column: the quotient of two medians.
        quotient = float(str(row["layer / dense"])) / float(str(row["time / dense"]))
        over = row.get("layer / experts", quotient)
        made.append(Claim(f"time of the layer over the experts, {kind}", "at most", 1.08, over))
        if layer := LAYER.get(isa()):
            made.append(Claim(f"time of the layer over dense, {kind}", "at most", layer[dtype], row["layer / dense"]))
        for peer, target in zip(("grouped_mm", "loop"), FASTER[dtype], strict=True):
            made.append(Claim(f"speed-up over {peer}, {kind}", "at least", target, row[f"{peer} / ours"]))
    for kind in dict.fromkeys((str(r["dtype"]), str(r["routing"])) for r in rows if "geomean" not in str(r["routing"])):
        shapes = [r for r in rows if (r["dtype"], r["routing"]) == kind]
        worst = min(float(str(r[f"{peer} / ours"])) for r in shapes for peer in PEERS)
        made.append(Claim(f"speed-up over the best peer, worst shape, {', '.join(kind)}", "at least", 1.0, worst))
        saved = max(float(str(r["saved / minimum"])) for r in shapes)
        made.append(Claim(f"saved bytes over the least, worst shape, {', '.join(kind)}", "at most", 1.15, saved))
    return made


def main() -> None:
    """Run the parts asked for, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--routings", nargs="+", default=["balanced", "skewed"], choices=["balanced", "skewed"])
    parser.add_argument(
        "--only", nargs="+", type=int, default=range(len(SHAPES)), help="indices of shapes; saves nothing"
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parse(parser)
    rows: list[dict[str, object]] = []
    for name in args.dtypes:
        for routing in args.routings:
            part = []
            for i in args.only:
                part.append(measure(SHAPES[i], getattr(torch, name), routing, args.rounds))
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in part[-1].items()}, flush=True)
            rows += [*part, geomean(part)]
            print(rows[-1])
    if len(args.only) == len(SHAPES):
        save(result_name("moe_cpu"), rows, claims, part=["dtype", "routing"], strict=args.strict)


if __name__ == "__main__":
    main()
