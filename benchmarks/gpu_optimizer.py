"""The optimizer on a GPU: orthogonality against float64, and times against torch.optim.Muon and the device's ceilings.

    python benchmarks/gpu_optimizer.py [--out FOLDER]        # a few minutes on an H200
    python benchmarks/gpu_optimizer.py --smoke --out FOLDER  # tiny sizes, on a CPU too: only shows that the script runs

Times are by device events, medians over alternating rounds; random inputs, several sets in turn. FLOPs of the symmetric
kernel are those that it must do, n (n + 1) k a matrix. Targets: orthogonalization from n = 2048 on at least 1.8x
torch.optim.Muon at aspect 2.75, 2.0x at 4, 1.3x square; whole steps at least 6x; largest singular value at most 1.17; error at
most 1.2 times the standard form's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import torch
from common import RESULTS, ratio
from gpu_common import (
    Row,
    alternate_on,
    copy_bandwidth,
    float32_products,
    matmul_peak,
    median_ms,
    relative_error,
    spread,
    write,
)
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from lightning_mue.kernels.symmetric.op import kernel_fits, symmetric_matmul, symmetric_matmul_torch
from lightning_mue.optim import PRESETS, HyperSphereOptimizer, orthogonalize
from lightning_mue.optim.orthogonal import newton_schulz

TORCH_COEFFICIENTS, TORCH_STEPS, TORCH_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # torch.optim.Muon's defaults
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Sizes:
    """What is measured; `smoke` keeps the shapes' kinds and makes them tiny."""

    def __init__(self, smoke: bool) -> None:
        self.rounds = 3 if smoke else 15
        self.peak, self.copy = (64, 1 << 16) if smoke else (8192, 2 << 30)
        self.products = (  # B, n, k
            [(1, 24, 24), (3, 16, 40)]
            if smoke
            else [(1, 2048, 2048), (1, 4096, 4096), (1, 4096, 16384), (48, 512, 512), (36, 512, 1408), (128, 768, 2048)]
        )
        self.ragged = (2, 13, 27) if smoke else (2, 1023, 1999)
        self.matrices = [(64, 64), (64, 176)] if smoke else [(1024, 1024), (1024, 2816), (512, 1408)]
        self.sides = [16] if smoke else [2048, 4096]
        dense, expert = ((16, 44), (3, 8, 24)) if smoke else ((512, 1408), (128, 768, 2048))
        layers = 2 if smoke else 12
        n, m = dense
        self.sets = {
            f"{layers} layers, {n} x {m}": [(n, n)] * 4 * layers + [(m, n)] * 2 * layers + [(n, m)] * layers,
            f"3 stacks of {'x'.join(map(str, expert))}": [expert] * 3,
        }
        self.captured = (4, 16, 16) if smoke else (48, 512, 512)


def without_kernel() -> AbstractContextManager[object]:
    """Let orthogonalize use the library's products only, in the form that is cheapest with them."""
    stand_ins = {
        "symmetric_matmul": symmetric_matmul_torch,
        "kernel_fits": lambda a: False,
    }
    return patch.multiple(newton_schulz, **stand_ins)


def types(device: torch.device) -> list[tuple[torch.dtype, str]]:
    """Types of products, with the setting for float32; without a GPU there is no tf32."""
    half = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee")]
    return [*half, (torch.float32, "tf32")] if device.type == "cuda" else half


def label(dtype: torch.dtype, precision: str) -> str:
    """Name of a type of products."""
    return precision if dtype == torch.float32 and precision == "tf32" else NAMES[dtype]


def ceilings(sizes: Sizes, device: torch.device) -> tuple[list[Row], dict[str, float]]:
    """The library's rate on a large product in each type, and the bandwidth of a large copy."""
    rates = {}
    for dtype, precision in types(device):
        with float32_products(precision):
            rates[label(dtype, precision)] = matmul_peak(dtype, device, sizes.peak, sizes.rounds)
    rates["copy"] = copy_bandwidth(device, sizes.copy, sizes.rounds)
    rows = [{"of": name, "TFLOP/s": rate / 1e12} for name, rate in rates.items() if name != "copy"]
    return [*rows, {"of": "copy", "TB/s, read and written": rates["copy"] / 1e12}], rates


def product_errors(sizes: Sizes, device: torch.device) -> list[Row]:
    """symmetric_matmul against float64, on an output full of NaN, beside torch.baddbmm."""
    rows = []
    for dtype, precision in types(device):
        for batch, n, k in [*sizes.products[:2], sizes.ragged]:
            a = torch.randn(batch, n, k, device=device).to(dtype)
            c = torch.randn(batch, n, n, device=device).to(dtype)
            c, out = c + c.mT, torch.full_like(c, torch.nan)
            exact = 0.5 * a.double() @ a.double().mT - c.double()
            with float32_products(precision):
                symmetric_matmul(a, a.mT, c, alpha=0.5, beta=-1.0, out=out)
                library = torch.baddbmm(c, a, a.mT, alpha=0.5, beta=-1.0)
            error = relative_error(out, exact)
            rows.append(
                {
                    "products": label(dtype, precision),
                    "B x n x k": f"{batch} x {n} x {k}",
                    "kernel": kernel_fits(a),
                    "error": error,
                    "library's": relative_error(library, exact),
                    "symmetric bit by bit": torch.equal(out, out.mT),
                    "same in all tilings": same_in_all_tilings(a, c, out, precision),
                    "ok": error <= 1.2 * relative_error(library, exact) + 1e-7,
                }
            )
    return rows


def same_in_all_tilings(a: Tensor, c: Tensor, expected: Tensor, precision: str) -> object:
    """Whether all tilings give the same bits, so that ranks that choose different ones still agree."""
    if not kernel_fits(a):
        return ""
    from lightning_mue.kernels.symmetric import triton as symmetric

    same, out = True, torch.empty_like(expected)
    for tiling in symmetric.tilings_for(a.dtype, precision):
        symmetric.launch(a, a.mT, c, 0.5, -1.0, out, precision, tiling)
        same &= torch.equal(out, expected)
    return same


def polynomial(g: Tensor, dtype: torch.dtype, preset: str) -> Tensor:
    """The standard form, written without fusing, with products in `dtype`."""
    x = (g / g.norm(dim=(-2, -1), keepdim=True)).to(dtype)
    for a, b, c in PRESETS[preset].steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def spectrum(o: Tensor) -> tuple[float, float, float]:
    """Smallest and largest singular value of a batch of wide matrices, and |O O^T - I| over |I|."""
    gram = o.double() @ o.double().mT
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    one = torch.eye(o.shape[1], dtype=gram.dtype, device=o.device).expand_as(gram)
    return float(values.min()), float(values.max()), relative_error(gram, one)


def ill_conditioned(n: int, m: int, device: torch.device) -> Tensor:
    """A matrix whose singular values run evenly, on a logarithmic scale, from 1 down to 1e-6."""
    left, right = (torch.linalg.qr(torch.randn(rows, n, device=device).double())[0] for rows in (n, m))
    return (left * torch.logspace(0, -6, n, device=device) @ right.mT)[None].float()


def orthogonality(sizes: Sizes, device: torch.device) -> list[Row]:
    """Orthogonalize in every type, beside the standard form: singular values, orthogonality, and rounding (to float64)."""
    rows = []
    for n, m in sizes.matrices:
        for kind, g in (("gaussian", torch.randn(1, n, m, device=device)), ("1e6", ill_conditioned(n, m, device))):
            exact = polynomial(g.double(), torch.float64, "scheduled")
            for dtype, precision in types(device):
                with float32_products(precision):
                    o = orthogonalize(g, dtype="tf32" if precision == "tf32" else dtype)
                    standard = polynomial(g, dtype, "scheduled")
                low, high, error = spectrum(o)
                error_standard = spectrum(standard)[2]
                rows.append(
                    {
                        "matrix": f"{n} x {m} {kind}",
                        "products": label(dtype, precision),
                        "smallest": low,
                        "largest singular value": high,
                        "orthogonality": error,
                        "standard form's": error_standard,
                        "rounding": relative_error(o, exact),
                        "standard form's rounding": relative_error(standard, exact),
                        "ok": high <= 1.17 and error <= 1.2 * error_standard,
                    }
                )
    return rows


def product_times(sizes: Sizes, device: torch.device, rates: dict[str, float]) -> list[Row]:
    """symmetric_matmul against torch.bmm: the Gram product, and the square of a symmetric matrix plus itself."""
    rows = []
    for dtype, precision in types(device):
        shapes = sizes.products if dtype == torch.float16 else sizes.products[:2]
        for batch, n, k in [*shapes, *([sizes.ragged] if dtype == torch.float16 else [])]:
            sets = [torch.randn(batch, n, k, device=device).to(dtype) for _ in range(3)]
            out = torch.empty(batch, n, n, dtype=dtype, device=device)
            with float32_products(precision):
                seconds = alternate_on(
                    {
                        "kernel": lambda i, sets=sets, out=out: symmetric_matmul(sets[i % 3], sets[i % 3].mT, out=out),
                        "bmm": lambda i, sets=sets, out=out: torch.bmm(sets[i % 3], sets[i % 3].mT, out=out),
                    },
                    device,
                    sizes.rounds,
                )
            taken = statistics.median(seconds["kernel"])
            work = batch * n * (n + 1) * k
            moved = batch * (n * k + n * n) * dtype.itemsize
            floor = max(work / rates[label(dtype, precision)], moved / rates["copy"])
            rows.append(
                {
                    "products": label(dtype, precision),
                    "B x n x k": f"{batch} x {n} x {k}",
                    "ms": 1e3 * taken,
                    "spread": spread(seconds["kernel"]),
                    "TFLOP/s": work / taken / 1e12,
                    "of the roofline": floor / taken,
                    "times bmm": ratio(seconds, "bmm", "kernel"),
                    "tiling": tiling_of(sets[0], out, precision),
                }
            )
    return rows


def tiling_of(a: Tensor, out: Tensor, precision: str) -> str:
    """The tiling that was measured fastest; empty where the kernel does not run."""
    if not kernel_fits(a):
        return ""
    from lightning_mue.kernels.symmetric import triton as symmetric

    strides = tuple(t.stride() for t in (a, a.mT, out, out))
    case = symmetric.Case(a.shape, strides, False, a.dtype, a.device, precision)
    return str(tuple(symmetric._known.get(case, ())))


def orthogonalize_times(sizes: Sizes, device: torch.device) -> list[Row]:
    """One matrix, float32 in, against torch.optim.Muon's function."""
    rows = []
    for n in sizes.sides:
        for aspect in (1, 2.75, 4):
            m = int(n * aspect)
            sets = [torch.randn(n, m, device=device) for _ in range(3)]

            def plain(i: int, sets: list[Tensor] = sets) -> Tensor:
                with without_kernel():
                    return orthogonalize(sets[i % 3])

            seconds = alternate_on(
                {
                    "ours": lambda i, sets=sets: orthogonalize(sets[i % 3]),
                    "bfloat16": lambda i, sets=sets: orthogonalize(sets[i % 3], dtype=torch.bfloat16),
                    "without the kernel": plain,
                    "torch": lambda i, sets=sets: _zeropower_via_newtonschulz(
                        sets[i % 3], TORCH_COEFFICIENTS, TORCH_STEPS, TORCH_EPS
                    ),
                },
                device,
                sizes.rounds,
            )
            rows.append(
                {
                    "n": n,
                    "aspect": aspect,
                    "ms": median_ms(seconds["ours"]),
                    "spread": spread(seconds["ours"]),
                    "torch ms": median_ms(seconds["torch"]),
                    "times torch": ratio(seconds, "torch", "ours"),
                    "in bfloat16": ratio(seconds, "torch", "bfloat16"),
                    "without the kernel": ratio(seconds, "torch", "without the kernel"),
                }
            )
    return rows


def parameters(shapes: list[tuple[int, ...]], device: torch.device, stacks: bool) -> list[torch.nn.Parameter]:
    """Weights; without stacks every expert is a parameter, as torch.optim.Muon wants them."""
    weights = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
    if not stacks:
        weights = [matrix for w in weights for matrix in w.view(-1, *w.shape[-2:])]
    return [torch.nn.Parameter(w) for w in weights]


def step_times(sizes: Sizes, device: torch.device) -> list[Row]:
    """Whole steps, with other gradients at every step."""
    rows = []
    for name, shapes in sizes.sets.items():
        stacked, single = parameters(shapes, device, True), parameters(shapes, device, False)
        adam = parameters(shapes, device, True)
        gradients = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(3)]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "sphere": HyperSphereOptimizer([{"params": stacked, "kind": "sphere"}], lr=1e-4),
            "torch.optim.Muon": torch.optim.Muon(single, lr=1e-4, weight_decay=0.0),
            "AdamW": torch.optim.AdamW(adam, lr=1e-4, fused=True),
        }

        def prepare(i: int, gradients=gradients, stacked=stacked, adam=adam, single=single) -> None:
            chosen = gradients[i % 3]
            parts = [part for g in chosen for part in g.view(-1, *g.shape[-2:])]
            for params, grads in ((stacked, chosen), (adam, chosen), (single, parts)):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g

        steps: dict[str, Callable[[int], object]] = {
            key: lambda i, optimizer=value: optimizer.step() for key, value in optimizers.items()
        }
        seconds = alternate_on(steps, device, sizes.rounds, prepare)
        rows.append(
            {
                "set": name,
                "ms": median_ms(seconds["sphere"]),
                "spread": spread(seconds["sphere"]),
                "torch.optim.Muon ms": median_ms(seconds["torch.optim.Muon"]),
                "times torch.optim.Muon": ratio(seconds, "torch.optim.Muon", "sphere"),
                "AdamW ms": median_ms(seconds["AdamW"]),
            }
        )
    return rows


def capture(sizes: Sizes, device: torch.device) -> list[Row]:
    """A CUDA graph of orthogonalize: replayed on new input it must give what a call gives."""
    g = torch.randn(sizes.captured, device=device)
    orthogonalize(g)
    if device.type != "cuda":
        return [{"of": "x".join(map(str, g.shape)), "captured": "needs CUDA"}]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = orthogonalize(g)
    g.normal_()
    captured.fill_(torch.nan)
    graph.replay()
    same = torch.equal(captured, orthogonalize(g))
    contenders = {"replay": lambda i: graph.replay(), "call": lambda i: orthogonalize(g)}
    seconds = alternate_on(contenders, device, sizes.rounds)
    return [
        {
            "of": "x".join(map(str, g.shape)),
            "captured": True,
            "same as a call": same,
            "replay ms": median_ms(seconds["replay"]),
            "call ms": median_ms(seconds["call"]),
            "ok": same,
        }
    ]


def main() -> None:
    """Run all sections; each is written as soon as it is complete, and failed checks are listed at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.smoke:
        parser.error("no CUDA device here; --smoke runs tiny sizes on the CPU")
    torch.manual_seed(0)
    sizes, sections = Sizes(options.smoke), {}
    rows, rates = ceilings(sizes, device)
    parts: dict[str, Callable[[], list[Row]]] = {
        "Ceilings": lambda: rows,
        "Errors of symmetric_matmul": lambda: product_errors(sizes, device),
        "Orthogonality": lambda: orthogonality(sizes, device),
        "Time of symmetric_matmul": lambda: product_times(sizes, device, rates),
        "Time of orthogonalize": lambda: orthogonalize_times(sizes, device),
        "Time of a step": lambda: step_times(sizes, device),
        "CUDA graph": lambda: capture(sizes, device),
    }
    for name, part in parts.items():
        start = time.perf_counter()
        sections[name] = part()
        write("gpu_optimizer", "HyperSphereOptimizer on a GPU", device, sections, options.out)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    failed = [f"{name}: {row}" for name, part in sections.items() for row in part if row.get("ok") is False]
    raise SystemExit("\n".join(["failed checks:", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
