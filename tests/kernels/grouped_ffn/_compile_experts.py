"""Compile the experts' kernels for sm_90 without a device and print what the compiler made of them, as JSON lines.

Launches stop after compilation; tensors are on the meta device, so that the sizes are those of a real problem.
Arguments: data type, activation, "default" or "all" tilings.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lightning_mue.kernels.combine import triton as combine
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.triton import experts as grouped_ffn
from lightning_mue.kernels.grouped_ffn.triton import tuning
from lightning_mue.kernels.grouped_ffn.triton import weights as grouped_weights

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 32768, 2048, 768, 128, 8


class NoDevice:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def problem(dtype, activation, bias=True):
    rows, gated = TOKENS * TOP_K, "glu" in activation

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def index(*shape):
        return new(*shape, dtype=torch.int32)

    up, hidden = (EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN)
    return Problem(
        new(TOKENS, WIDTH),
        new(TOKENS, TOP_K, dtype=torch.float32),
        new(*up) if gated else None,
        new(*up),
        new(EXPERTS, WIDTH, HIDDEN),
        new(*hidden) if gated and bias else None,
        new(*hidden) if bias else None,
        index(rows),
        index(TOKENS, TOP_K),
        index(rows),
        index(EXPERTS + 1),
        None,
        activation,
    )


def report(label, name, kernel):
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        "kernel": name,
        "label": label,
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "copies": re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x)?(\w+)(?:,[^;]*)?;", ptx),
        "bulk": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    }
    found["copies"] = sorted(set(found["copies"]))
    print(json.dumps(found), flush=True)


def main(dtype, activation, which):
    compiled, whole = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, whole(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(NoDevice())
    JITFunction.run = run
    for module in (tuning, grouped_weights):
        module.multiprocessors = lambda device: 132

    def choose(key, launch):
        tilings = tuning.candidates(key)
        for tiling in tilings if which == "all" else tilings[:1]:
            before = len(compiled)
            launch(tiling)
            for name, kernel in compiled[before:]:
                report(f"{key.kernel} {tuple(tiling)}", name, kernel)
        return tilings[0]

    grouped_ffn.choose = choose
    p = problem(getattr(torch, dtype), activation)
    _, z = grouped_ffn.forward(p, True)
    grouped_ffn.backward(p, torch.empty_like(p.x), z, True)
    rows = torch.empty(len(p.order), WIDTH, dtype=p.x.dtype, device="meta")
    combine.launch_spread(p.x, rows, p.gates, p.order, p.tokens, p.offsets)
    for name, kernel in dict(compiled).items():
        if name in ("tile_map_kernel", "combine_kernel", "gather_kernel", "spread_kernel", "bias_kernel"):
            report("", name, kernel)


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__}))
    main(*sys.argv[1:])
