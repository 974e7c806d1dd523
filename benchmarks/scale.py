"""How long a plan and an initialization take: a billion real parameters on the CPU, and a trillion on the meta device.

Wanted: under 20 s each. Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch
from common import save

from lightning_mue import MoELanguageModel, initialize, plan

BASE = {"width": 256, "n_heads": 4, "depth": 4, "n_experts": 0}
MOE = {"n_experts": 32, "top_k": 4, "expert_width": 768}
BILLION = {"width": 1024, "n_heads": 16, "depth": 12, "vocab_size": 32_768, **MOE}
TRILLION = {
    "width": 8192,
    "n_heads": 64,
    "depth": 64,
    "n_experts": 256,
    "top_k": 8,
    "expert_width": 2560,
    "vocab_size": 131_072,
}


def measure(part: str) -> dict[str, object]:
    """Seconds of the plan and of the initialization, parameters, and the peak memory of the process."""
    on_meta = part == "plan on meta"
    draw, torch.Tensor.normal_ = torch.Tensor.normal_, lambda self, *args, **kwargs: self  # the module's own draws
    with torch.device("meta" if on_meta else "cpu"):
        model = MoELanguageModel(context_length=64, **(TRILLION if on_meta else BILLION))
    torch.Tensor.normal_ = draw
    start = time.perf_counter()
    scaling = plan(model, base=BASE)
    planned = time.perf_counter()
    if not on_meta:
        initialize(model, scaling)
    return {
        "what": part,
        "parameters": f"{sum(p.numel() for p in model.parameters()):.3g}",
        "plan_s": planned - start,
        "initialization_s": time.perf_counter() - planned,
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Measures both parts and writes the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for part in ("plan and initialization on the CPU", "plan on meta"):
        out = subprocess.run([sys.executable, __file__, part], capture_output=True, text=True, check=True)
        rows.append(json.loads(out.stdout.strip().splitlines()[-1]))
    save("scale", rows)


if __name__ == "__main__":
    main()
