"""Times, memory and kernels of the experts on a GPU, as sections of a report.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token, S = T K rows sorted by expert.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import ratio
from gpu_common import (
    Row,
    alternate_on,
    copy_bandwidth,
    float32_products,
    matmul_peak,
    median_ms,
    relative_error,
    seconds_of,
    spread,
)
from gpu_moe_checks import BACKENDS, captured, fixed_tilings
from gpu_sections import Report, failure, in_parallel
from moe_peers_fused import Guarded, fused_contenders
from moe_peers_gpu import Contender, Routed, Shape, Weights, contenders, our_layer, random_routing, transformers_layer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

INPUT_SETS = 4
_SAME = 3e-2  # of bfloat16, in which gradients of gates may be summed


class Sizes:
    """What is measured; `smoke` keeps the kinds and makes them tiny."""

    def __init__(self, smoke: bool) -> None:
        self.smoke, self.rounds = smoke, 2 if smoke else 12
        self.peak, self.copy = (64, 1 << 16) if smoke else (8192, 2 << 30)
        self.target = Shape(32, 32, 16, 4, 2) if smoke else Shape(32768, 2048, 768, 128, 8)
        self.two_choices = Shape(32, 16, 16, 8, 2) if smoke else Shape(32768, 512, 256, 64, 2)
        self.others = (
            [Shape(16, 24, 8, 3, 1)]
            if smoke
            else [
                Shape(32768, 4096, 512, 128, 8),
                Shape(32768, 1536, 256, 128, 8),
                Shape(32768, 512, 128, 64, 8),
                Shape(32768, 1024, 2816, 8, 2),
            ]
        )
        #: Processes that compile kernels at the same time.
        self.workers = 1 if smoke else 10
        #: The interpreter takes seconds a call, compilation on a CPU too: in a smoke run only the first calls are Triton's.
        self.skipped = {"triton", "dense fused"} if smoke else set()
        self.single = self.target._replace(tokens=8 if smoke else 8192)


class Bench:
    """The device, the sizes and the sections that need both."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device

    def parts(self) -> dict[str, Callable[[Report], Iterator[Row]]]:
        """The sections by name."""
        target, pair = self.sizes.target, [self.sizes.target, self.sizes.two_choices]
        return {
            "Ceilings": self.ceilings,
            "Compilation": lambda report: self.compilation(),
            "First calls": self.first_calls,
            "Times": lambda report: self.times(report, [target]),
            "Skewed": lambda report: self.skewed(pair),
            "Memory": lambda report: self.memory(),
            "Kernels": lambda report: self.kernels(),
            "Whole layer": self.layers,
            "Routing times": lambda report: self.routing_times(pair),
            "Other shapes": lambda report: self.times(report, [self.sizes.two_choices, *self.sizes.others]),
            "float32": self.float32_times,
        }

    def ceilings(self, report: Report) -> Iterator[Row]:
        """The library's rate on a large product in each type, and the bandwidth of a large copy."""
        for name, dtype, precision in (
            ("bfloat16", torch.bfloat16, "ieee"),
            ("float32", torch.float32, "ieee"),
            ("tf32", torch.float32, "tf32"),
        ):
            with float32_products(precision):
                rate = matmul_peak(dtype, self.device, self.sizes.peak, self.sizes.rounds)
            yield {"of": name, "TFLOP/s": rate / 1e12}
        yield {"of": "copy", "TB/s": copy_bandwidth(self.device, self.sizes.copy, self.sizes.rounds) / 1e12}

    def sets(self, shape: Shape, dtype: torch.dtype = torch.bfloat16, kind: str = "balanced") -> list[Routed]:
        """Inputs, each with another routing."""
        return [random_routing(shape, dtype, self.device, kind) for _ in range(INPUT_SETS)]

    def compilation(self) -> Iterator[Row]:
        """Kernels compiled with each tiling that is tried, in parallel and into Triton's cache, so that trying is quick."""
        kinds = [(torch.bfloat16, "ieee", 5), (torch.float32, "tf32", 4), (torch.float32, "ieee", 2)]
        shape = self.sizes.others[0] if self.sizes.smoke else self.sizes.target._replace(tokens=2048)
        jobs = [(shape, dtype, precision, i, self.device) for dtype, precision, n in kinds for i in range(n)]
        for job, row in in_parallel(compile_tiling, jobs[:1] if self.sizes.smoke else jobs, self.sizes.workers, 120):
            yield {"type": str(job[1]), "products": job[2], "tiling": job[3], **row}

    def first_calls(self, report: Report) -> Iterator[Row]:
        """The kernels' first forward and backward at each size: compilation and the choice of tilings."""
        shapes = [self.sizes.target, self.sizes.two_choices, *self.sizes.others]
        for shape in shapes[-1:] if self.sizes.smoke else shapes:
            weights = Weights.random(shape, torch.bfloat16, self.device)
            made, rows = self.usable({"triton": contenders(shape, weights)["triton"]}, self.sets(shape)[0])
            again = {"again ms": 1e3 * self.call(made["triton"], self.sets(shape)[1])} if made else {}
            yield {"shape": str(shape), **rows["triton"], **again}

    def contenders(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Contender]]:
        """All that are to be timed, with weights of their own."""
        weights = Weights.random(shape, dtype, self.device)
        makers = {**contenders(shape, weights), **fused_contenders(shape, weights)}
        if shape != self.sizes.target:  # it is compiled for each shape
            del makers["dense fused"]
        return {name: make for name, make in makers.items() if name not in self.sizes.skipped}

    def call(self, contender: Contender, routed: Routed) -> float:
        """Seconds of forward and backward."""
        return seconds_of(lambda: contender.train(routed), self.device)

    def usable(
        self, makers: Mapping[str, Callable[[], Contender]], routed: Routed
    ) -> tuple[dict[str, Contender], dict[str, Row]]:
        """Those that can be made and run, and a row for each: seconds of the first call, or what is wrong.

        "differs" is how far an output is from the first one's; the dense layer computes something else. Of other people's fused
        kernels the gradients of x, the gates and the last weight count, too, and what differs by more than `_SAME` is not timed.
        """
        made: dict[str, Contender] = {}
        rows: dict[str, Row] = {}
        first: list[Any] = []
        for name, make in makers.items():
            try:
                contender, start = make(), time.perf_counter()
                found = contender.train(routed)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                rows[name] = {"first call s": time.perf_counter() - start}
                made[name] = contender
            except Exception as error:
                rows[name] = failure(error)
                continue
            compared = [*found[:3], found[-1]] if isinstance(contender, Guarded) else found[:1]
            if first and not name.startswith("dense"):
                rows[name]["differs"] = max(relative_error(t, r) for t, r in zip(compared, first, strict=False))
                if isinstance(contender, Guarded) and not rows[name]["differs"] <= _SAME:
                    rows[name]["missing"] = "it computes something else, and is not timed"
                    del made[name]
            first = first or [t if t is None else t.double() for t in (*found[:3], found[-1])]
        return made, rows

    def compare(
        self, makers: Mapping[str, Callable[[], Contender]], sets: list[Routed]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Row]]:
        """Seconds of forward (keeping what backward needs), seconds of both passes, and the rows of `usable`."""
        made, rows = self.usable(makers, sets[0])
        runs: dict[str, Callable[[int], object]] = {}
        for name, contender in made.items():
            runs[f"{name} forward"] = lambda i, c=contender: c.forward(sets[i % len(sets)])
            runs[name] = lambda i, c=contender: c.train(sets[i % len(sets)])
        seconds = alternate_on(runs, self.device, self.sizes.rounds)
        return {name: seconds[f"{name} forward"] for name in made}, {name: seconds[name] for name in made}, rows

    def rated(
        self,
        report: Report,
        shape: Shape,
        makers: Mapping[str, Callable[[], Contender]],
        sets: list[Routed],
        precision: str = "bfloat16",
    ) -> Iterator[Row]:
        """A row for each contender: times, rates, fractions of the roofline, and how much slower than our kernels."""
        forward, both, rows = self.compare(makers, sets)
        ours = next(iter(both), "")
        for name in makers:
            row: Row = {"shape": str(shape), "of": name}
            if name in both:
                for label, seconds, backward in (("forward", forward[name], False), ("both", both[name], True)):
                    flops = shape.flops * (3 if backward else 1)
                    ms = median_ms(seconds)
                    least = roofline_ms(
                        report, flops, shape.rows * shape.row_bytes(backward, sets[0].x.itemsize), precision
                    )
                    row[f"{label} ms"] = ms
                    row[f"{label} TFLOP/s"] = flops / ms / 1e9
                    row[f"{label} of roofline"] = least / ms
                row |= {"spread": spread(both[name]), f"time / {ours}": ratio(both, name, ours)}
            yield row | rows[name]

    def times(self, report: Report, shapes: list[Shape]) -> Iterator[Row]:
        """All contenders in bfloat16. One that is compiled comes last, for it may take the rest of the time."""
        for shape in shapes:
            makers, sets = self.contenders(shape), self.sets(shape)
            fused = makers.pop("dense fused", None)
            yield from self.rated(report, shape, makers, sets)
            if fused is not None:
                ours = next(iter(makers))  # what the others are compared with
                rows = self.rated(report, shape, {ours: makers[ours], "dense fused": fused}, sets)
                yield from (row for row in rows if row["of"] != ours)

    def float32_times(self, report: Report) -> Iterator[Row]:
        """The same in float32, multiplied exactly and in tf32, on fewer tokens."""
        shape = self.sizes.single
        for precision in ("ieee", "tf32"):
            named = "float32" if precision == "ieee" else "tf32"
            with float32_products(precision):
                makers, sets = self.contenders(shape, torch.float32), self.sets(shape, torch.float32)
                rows = self.rated(report, shape, makers, sets, named)
                yield from ({"products": named, **row} for row in rows)

    def skewed(self, shapes: list[Shape]) -> Iterator[Row]:
        """One expert with a quarter of the rows, and with a row of every token, over balanced; in the same rounds."""
        for shape in shapes:
            makers = self.contenders(shape)
            kinds = {kind: self.sets(shape, kind=kind) for kind in ("balanced", "hot", "everybody")}
            made, rows = self.usable(
                {name: make for name, make in makers.items() if name not in ("torch", "loop", "dense", "dense fused")},
                kinds["balanced"][0],
            )
            runs: dict[str, Callable[[int], object]] = {
                f"{name} {kind}": lambda i, c=contender, sets=sets: c.train(sets[i % len(sets)])
                for name, contender in made.items()
                for kind, sets in kinds.items()
            }
            seconds = alternate_on(runs, self.device, self.sizes.rounds)
            for name, row in rows.items():
                found = {
                    key: value
                    for kind in (kinds if name in made else ())
                    for key, value in (
                        (f"{kind} ms", median_ms(seconds[f"{name} {kind}"])),
                        (f"{kind} / balanced", ratio(seconds, f"{name} {kind}", f"{name} balanced")),
                    )
                    if key != "balanced / balanced"
                }
                yield {"shape": str(shape), "of": name, **found, **row}

    def memory(self) -> Iterator[Row]:
        """What forward saves for backward, weights not counted, over the least, 2d + 4Kh bytes a token; peak of both."""
        shape = self.sizes.target
        routed = self.sets(shape)[0]
        least = 2 * shape.width + 4 * shape.top_k * shape.hidden
        layers = {f"MoELayer {name}": make for name, make in self.layer_makers(shape).items()}
        for name, make in {**self.contenders(shape), **layers}.items():
            made, rows = self.usable({name: make}, routed)
            row: Row = {"of": name}
            if made:
                saved = saved_bytes(made[name], routed) / shape.tokens
                row |= {"saved bytes a token": saved, "over the least": saved / least}
                if name in BACKENDS or name in layers:
                    row["activation_memory() says"] = stated_bytes(shape, whole=name in layers)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    made[name].train(routed)
                    row["peak of both passes MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            yield row | {key: value for key, value in rows[name].items() if key in ("missing", "error")}

    def layer_makers(self, shape: Shape) -> dict[str, Callable[[], Contender]]:
        """Whole layers, by backend."""
        return {
            backend: lambda b=backend: our_layer(shape, self.device, b)
            for backend in BACKENDS
            if backend not in self.sizes.skipped
        }

    def kernels(self) -> Iterator[Row]:
        """Device time of each kernel in a forward and backward pass, the largest first."""
        shape, sets = self.sizes.target, self.sets(self.sizes.target)
        name, make = next(iter(self.contenders(shape).items()))
        contender = make()
        contender.train(sets[0])
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            for routed in sets:
                contender.train(routed)
            if cuda:
                torch.cuda.synchronize()
        column = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(((getattr(e, column), e) for e in profiler.key_averages()), key=lambda pair: -pair[0])
        total = sum(taken for taken, _ in events)
        for taken, e in events[:20]:
            ms, calls = taken / len(sets) / 1e3, e.count / len(sets)
            yield {"of": name, "kernel": e.key[:80], "calls": calls, "ms": ms, "share": taken / total}

    def routing_times(self, shapes: list[Shape]) -> Iterator[Row]:
        """Logits, choice, gates and statistics, and the sorting; called, and replayed from a graph without the host's share."""
        for shape in shapes:
            sets = self.sets(shape)
            weight_Ed = torch.randn(shape.experts, shape.width, device=self.device).mul_(shape.width**-0.5)
            runs: dict[str, Callable[[int], object]] = {}
            rows: dict[str, Row] = {}
            for backend in ("triton", "torch"):
                for steps, part in enumerate(("logits", "logits, route", "logits, route, plan"), 1):
                    name = f"{part} ({backend})"
                    run = partial(self.route, sets, weight_Ed, shape.top_k, backend, steps)
                    rows[name] = {"shape": str(shape), "of": name}
                    try:
                        run(0)
                        runs[name] = run
                        if self.device.type == "cuda":
                            graph = graph_of(partial(run, 0))
                            runs[f"{name} replayed"] = lambda i, graph=graph: graph.replay()
                    except Exception as error:
                        rows[name] |= failure(error)
            seconds = alternate_on(runs, self.device, self.sizes.rounds)
            for name, row in rows.items():
                times = {"ms": name, "replayed ms": f"{name} replayed"}
                yield row | {key: median_ms(seconds[run]) for key, run in times.items() if run in seconds}

    def route(self, sets: list[Routed], weight_Ed: Tensor, top_k: int, backend: str, steps: int, index: int) -> None:
        """The router's first `steps` steps, forward, on one of the inputs."""
        from lightning_mue.kernels.dispatch.op import plan_dispatch
        from lightning_mue.kernels.routing.op import route, router_logits

        with torch.no_grad():
            logits_TE = router_logits(sets[index % len(sets)].x, weight_Ed)
            if steps == 1:
                return
            bias_E = torch.zeros(len(weight_Ed), device=self.device)
            routed = route(logits_TE, bias_E, top_k=top_k, scoring="softmax-topk", gate="linear", backend=backend)
            if steps == 3:
                plan_dispatch(routed.expert_ids, routed.counts.sum(0), backend=backend)

    def layers(self, report: Report) -> Iterator[Row]:
        """MoELayer with router and auxiliary loss, against transformers' block; then its forward and backward in a graph."""
        shape = self.sizes.target
        sets = self.sets(shape)
        makers = {f"MoELayer {name}": make for name, make in self.layer_makers(shape).items()}
        makers["transformers"] = lambda: transformers_layer(shape, self.device)
        for row in self.rated(report, shape, makers, sets):
            row.pop("differs", None)  # other weights
            yield row
        if self.device.type == "cuda":
            for backend in ("triton", "grouped_mm"):
                row = {"shape": str(shape), "of": f"MoELayer {backend} in a graph"}
                try:
                    row["ok"] = captured(our_layer(shape, self.device, backend), shape, torch.bfloat16, self.device)
                except Exception as error:
                    row |= failure(error)
                yield row


def compile_tiling(shape: Shape, dtype: torch.dtype, precision: str, index: int, device: torch.device) -> Row:
    """Compile all kernels of both passes with the tiling of this index, of those that are tried; its seconds."""
    from lightning_mue.kernels.grouped_ffn.triton import tuning

    every, start = tuning.candidates, time.perf_counter()
    one = lambda kind: every(kind)[min(index, len(every(kind)) - 1) :][:1]  # noqa: E731
    contender = contenders(shape, Weights.random(shape, dtype, device))["triton"]()
    with mock.patch.object(tuning, "candidates", one), fixed_tilings(), float32_products(precision):
        contender.train(random_routing(shape, dtype, device))
    return {"s": time.perf_counter() - start}


def roofline_ms(report: Report, flops: float, nbytes: float, precision: str) -> float:
    """The least time by the ceilings of this run; NaN if they were not measured."""
    ceilings = {row["of"]: row.get("TFLOP/s", row.get("TB/s")) for row in report["Ceilings"] if "of" in row}
    if not {precision, "copy"} <= ceilings.keys():
        return math.nan
    return 1e3 * max(flops / ceilings[precision], nbytes / ceilings["copy"]) / 1e12


def saved_bytes(contender: Contender, routed: Routed) -> int:
    """Bytes of what autograd saves in a forward pass: each piece of memory once, and weights not at all."""
    weights = {w.untyped_storage().data_ptr() for w in contender.weights}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = contender.forward(routed)
    del y
    return sum(saved.values())


def stated_bytes(shape: Shape, whole: bool) -> float:
    """Bytes per token that the experts, or the whole layer, save by `activation_memory()`."""
    from lightning_mue.moe import MoELayer

    with torch.device("meta"):
        layer = MoELayer(shape.width, shape.hidden, shape.experts, shape.top_k)
    return (layer.activation_memory() if whole else layer.experts.activation_memory(shape.top_k))["total"]


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` launches; it has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
