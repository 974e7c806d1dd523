"""How long a plan and an initialization take: a billion real parameters on the CPU, and a trillion on the meta device.

Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from common import Claim, parse, result_name, save

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

PARTS = ("plan and initialization on the CPU", "plan on meta")


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


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """Seconds that a user waits for before the first step."""
    made = []
    for row in rows:
        seconds = float(str(row["plan_s"])) + float(str(row["initialization_s"]))
        made.append(Claim(f"seconds, {row['what']}, {row['parameters']} parameters", "at most", 20.0, seconds))
    return made


def main() -> None:
    """Measures both parts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="measure one part in this process, and print it")
    args = parse(parser)
    if args.part:
        print(json.dumps(measure(args.part)))
        return
    rows = []
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--threads", str(torch.get_num_threads())]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(out.stdout.strip().splitlines()[-1]))
    save(result_name("scale"), rows, claims, strict=args.strict)


if __name__ == "__main__":
    main()
