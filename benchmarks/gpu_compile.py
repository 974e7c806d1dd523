"""Compile the kernels for NVIDIA architectures without a device; print what the compiler made of them, as JSON lines.

    python benchmarks/gpu_compile.py                                         # defaults, all architectures and types
    python benchmarks/gpu_compile.py --arch 80 --types bfloat16 --tilings all
    python benchmarks/gpu_compile.py --tilings all --out benchmarks/results  # also writes gpu_compile.md and .json

Launches stop after compilation; tensors are on the meta device, so that sizes are those of a real problem. Per kernel: shared
memory a block, registers a thread, bytes of spilled registers, and the matrix instructions. What it cannot say is how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import triton
from gpu_common import float32_products
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lightning_mue.kernels.combine import triton as combine
from lightning_mue.kernels.dispatch import triton as dispatch
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.triton import experts, tilings, tuning, weights
from lightning_mue.kernels.routing import triton as routing
from lightning_mue.kernels.routing.op import Settings
from lightning_mue.kernels.symmetric import triton as symmetric
from lightning_mue.kernels.triton_tools import launching

#: Shared memory a block, in bytes: CUDA programming guide, compute capabilities.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {"bfloat16": (torch.bfloat16, "ieee"), "float16": (torch.float16, "ieee")}
TYPES |= {"float32": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32")}
#: The most bytes of registers that a default may spill, a thread.
SPILLS = {"bfloat16": 0, "float16": 0, "float32": 16, "tf32": 16}
ACTIVATIONS = ("swiglu", "gelu")
Row = dict[str, Any]
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 32768, 2048, 768, 128, 8
MATRIX = re.compile(r"\b(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)\b")


class NoDevice:
    """As much of a driver as compilation asks for. The device's number is the architecture: compiled code is kept by it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number of its own for each architecture."""
        return self.arch

    def get_current_stream(self, device: object = None) -> int:
        """The default one."""
        return 0


def new(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(dtype: torch.dtype, activation: str) -> Problem:
    """The experts' problem of the targets, with biases."""
    rows, gated = TOKENS * TOP_K, "glu" in activation
    up = new(EXPERTS, HIDDEN, WIDTH, dtype=dtype)
    bias = new(EXPERTS, HIDDEN, dtype=dtype)
    order, tokens, offsets = (new(n, dtype=torch.int32) for n in (rows, rows, EXPERTS + 1))
    gates, inverse = (new(TOKENS, TOP_K, dtype=t) for t in (torch.float32, torch.int32))
    x, down = new(TOKENS, WIDTH, dtype=dtype), new(EXPERTS, WIDTH, HIDDEN, dtype=dtype)
    gate = (up, bias) if gated else (None, None)
    return Problem(x, gates, gate[0], up, down, gate[1], bias, order, inverse, tokens, offsets, None, activation)


class Compiler:
    """Stands for the launches: compiles, measures, and gives out rows."""

    def __init__(self, arch: int, name: str, every: bool, activations: Sequence[str]) -> None:
        self.arch, self.name, self.every, self.activations = arch, name, every, activations
        self.dtype, self.precision = TYPES[name]
        self.rows: list[Row] = []
        self.label, self.estimate = "", 0
        self._measured: dict[str, Row] = {}
        self._compile = JITFunction.run

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In the place of `JITFunction.run`."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = self._compile(function, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in self._measured:
            self._measured[kernel.hash] = measured(kernel, said.getvalue())
        row: Row = {"arch": self.arch, "type": self.name, "kernel": function.__name__, "tiling": self.label}
        row |= self._measured[kernel.hash]
        row["estimate"] = self.estimate
        if row not in self.rows:
            self.rows.append(row)

    def launch_chosen(self, key: tilings.TilingKey, launch: Callable[[Any], Any]) -> Any:
        """In the place of `tuning.launch_chosen`: launch with all that are offered, or with the default."""
        offered = tilings.candidates(key)
        for tiling in reversed(offered if self.every else offered[:1]):
            self.label = f"{key.kernel} {key.activation} {tuple(tiling)}"
            self.estimate = tilings.shared_bytes(key, tiling, SHARED[self.arch])
            result = launch(tiling)
        return result

    def everything(self) -> list[Row]:
        """Every kernel, compiled for this architecture and type."""
        self.experts()
        self.symmetric()
        if self.dtype.itemsize == 2:  # routing is in float32 whatever the type
            self.routing()
        return self.rows

    def experts(self) -> None:
        """The experts', forward and backward, with and without a second plane; the sums over rows; the spread of rows."""
        for activation in self.activations:
            p = problem(self.dtype, activation)
            with patch.object(experts, "launch_chosen", self.launch_chosen):
                _, z = experts.forward(p, True)
                experts.backward(p, torch.empty_like(p.x), z, True)
        self.label, self.estimate = "", SHARED[self.arch]
        rows = new(len(p.order), WIDTH, dtype=self.dtype)
        combine.launch_spread(p.x, rows, p.gates, p.order, p.tokens, p.offsets)

    def symmetric(self) -> None:
        """Products for orthogonalization: A A^T, and a square plus itself."""
        offered = symmetric.tilings_for(self.dtype, self.precision, torch.device("meta"))
        for tiling in offered if self.every else offered[:1]:
            self.label = f"symmetric {tuple(tiling)}"
            self.estimate = symmetric.shared_bytes(tiling, self.dtype, launching.is_wide(SHARED[self.arch]))
            a, c = new(4, 2048, 5632, dtype=self.dtype), new(4, 2048, 2048, dtype=self.dtype)
            symmetric.launch(a, a.mT, None, 1.0, 0.0, torch.empty_like(c), self.precision, tiling)
            symmetric.launch(c, c, c, 0.5, -1.0, torch.empty_like(c), self.precision, tiling)

    def routing(self) -> None:
        """Choice of experts, its gradient, and sorting."""
        for n_experts, top_k, scoring in ((EXPERTS, TOP_K, "topk-softmax"), (8, 2, "sigmoid-normalized")):
            self.label, self.estimate = f"E {n_experts} K {top_k}", SHARED[self.arch]
            settings = Settings(top_k, scoring, "linear", 1, 1)
            logits, bias = (new(*shape, dtype=torch.float32) for shape in ((TOKENS, n_experts), (n_experts,)))
            gates, ids, counts, p, z, log_sum = routing.forward(logits, bias, None, settings)
            routing.backward(gates, p, z, logits, ids, gates, log_sum, None, settings)
            dispatch.sort_by_expert(ids, counts.sum(0))


def measured(kernel: Any, said: str) -> Row:
    """What the compiler made of a kernel; `said` is the assembler's report."""
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        "spills": max(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        "matrix": " ".join(sorted(set(MATRIX.findall(ptx)))),
        "bulk": "cp.async.bulk.tensor" in ptx,
    }


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel: it does not fit, takes more than was estimated, or spills too many registers."""
    limits = {
        "bytes of shared memory on this architecture": ("shared", SHARED[row["arch"]]),
        "bytes of shared memory as estimated": ("shared", row["estimate"]),
        "bytes of spilled registers": ("spills", SPILLS[row["type"]]),
    }
    return [f"{row[key]} of {most} {what}" for what, (key, most) in limits.items() if row[key] > most]


def compile_all(arch: int, name: str, every: bool = False, activations: Sequence[str] = ACTIVATIONS) -> list[Row]:
    """Rows of all kernels for an architecture and a type."""
    compiler = Compiler(arch, name, every, activations)
    driver.set_active(NoDevice(arch))
    with (
        patch.object(JITFunction, "run", lambda self, *args, **kwargs: compiler.run(self, *args, **kwargs)),
        patch.object(tilings, "shared_memory", lambda device: SHARED[arch]),
        patch.object(symmetric, "shared_memory", lambda device: SHARED[arch]),
        patch.object(tuning, "multiprocessors", lambda device: 132),
        patch.object(weights, "multiprocessors", lambda device: 132),
        float32_products(compiler.precision),
    ):
        return compiler.everything()


def main() -> None:
    """Compile what was asked for; a line a kernel as soon as an architecture and type are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED), choices=SHARED)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--tilings", default="default", choices=("default", "all"))
    parser.add_argument("--activations", nargs="+", default=ACTIVATIONS, choices=ACTIVATIONS)
    parser.add_argument("--experts-only", action="store_true")
    parser.add_argument(
        "--oversized", action="store_true", help="offer tilings for wide devices everywhere: must show faults"
    )
    options = parser.parse_args()
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    if options.experts_only:
        Compiler.symmetric = Compiler.routing = lambda self: None
    if options.oversized:
        tilings.candidates = lambda key: tilings._offered(key, True)
    for arch in options.arch:
        for name in options.types:
            for row in compile_all(arch, name, options.tilings == "all", options.activations):
                print(json.dumps(row | {"faults": faults(row)}), flush=True)


if __name__ == "__main__":
    main()
