"""The experts on a GPU: checks, then times against what people use instead and against the device's ceilings.

    python benchmarks/gpu_moe.py [--out FOLDER] [--seconds 370]   # on an H200; benchmarks/gpu.sh calls it
    python benchmarks/gpu_moe.py --smoke --out FOLDER             # tiny sizes, on a CPU too: only shows that it runs

Times are by device events, medians over alternating rounds, every call with another input and another routing. "of roofline"
is the least time, max(FLOPs / peak, bytes / bandwidth) with both ceilings measured in this run, over the time. What the
figures should come to is in the section Targets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from common import RESULTS
from gpu_common import Row, save_report, show
from gpu_moe_checks import checks
from gpu_moe_times import Bench, Sizes
from gpu_sections import Report, Section, failures, run_sections, supervise
from moe_peers_gpu import Shape

NAME, TITLE = "gpu_moe", "Experts on a GPU"
Part = Callable[[Report], Iterable[Row]]
SECONDS = {  # the most a section may take; the limits up to "Memory" together fit into the time of a whole run
    "Ceilings": 15,
    "Errors against float64": 60,
    "Compilation": 70,
    "First calls": 70,
    "Times": 60,
    "Skewed": 30,
    "Repeated and captured": 30,
    "Memory": 20,
    "Routing against plain PyTorch": 30,
    "Kernels": 30,
    "Whole layer": 60,
    "Routing times": 30,
    "Other shapes": 90,
    "float32": 60,
}


def targets(report: Report, shape: Shape) -> list[Row]:
    """The targets for an H200 and what was measured; None where that is missing."""

    def found(section: str, column: str, **where: object) -> float | None:
        for row in report.get(section, []):
            if row.get("shape", str(shape)) == str(shape) and all(
                row.get(key) == value for key, value in where.items()
            ):
                return row.get(column)
        return None

    graphs = [
        row.get("graph same as a call")
        for row in report.get("Repeated and captured", [])
        if row.get("backend") == "triton"
    ]
    wanted: list[tuple[str, float | None, str, float]] = [
        ("forward + backward, TFLOP/s", found("Times", "both TFLOP/s", of="triton"), ">=", 440.0),
        ("times Liger's fused MoE", found("Times", "time / triton", of="liger"), ">=", 1.05),
        ("times transformers' grouped_mm", found("Times", "time / triton", of="transformers"), ">=", 1.7),
        ("of a dense SwiGLU's speed", found("Times", "time / triton", of="dense"), ">=", 0.65),
        ("of its speed with a fused activation", found("Times", "time / triton", of="dense fused"), ">=", 0.65),
        ("one expert with 25 % of the rows, over balanced", found("Skewed", "hot / balanced", of="triton"), "<=", 1.25),
        ("saved activations over 2d + 4Kh", found("Memory", "over the least", of="triton"), "<=", 1.15),
        (
            "forward and backward captured in a graph",
            float(graphs[0]) if graphs and graphs[0] is not None else None,
            ">=",
            1.0,
        ),
    ]
    return [
        {
            "target": what,
            "wanted": f"{sign} {bound:g}",
            "measured": value if value is not None else "not measured",
            "met": "" if value is None else (value >= bound if sign == ">=" else value <= bound),
        }
        for what, value, sign, bound in wanted
    ]


def tilings() -> list[Row]:
    """What the kernels remember as the fastest way to cut their work."""
    folder = Path(os.environ.get("LIGHTNING_MUE_CACHE", "~/.cache/lightning_mue")).expanduser()
    rows: list[Row] = []
    for file in sorted(folder.glob("*.json")):
        rows += [
            {"file": file.name, "for": key, "tiling": json.dumps(value)}
            for key, value in json.loads(file.read_text()).items()
        ]
    return rows


def work(options: argparse.Namespace, device: torch.device) -> None:
    """Run the sections that the report does not have yet."""
    torch.manual_seed(0)
    sizes = Sizes(options.smoke)
    parts = {**Bench(sizes, device).parts(), **checks(device, options.smoke, sizes.workers)}
    sections = [Section(name, seconds, without_tuning(parts[name])) for name, seconds in SECONDS.items()]
    run_sections(sections, NAME, title(options), device, options.out, options.until)


def without_tuning(part: Part) -> Part:
    """The section with fixed tilings if the first calls, which choose tilings, were not done in their time."""

    def run(report: Report) -> Iterator[Row]:
        if any("stopped" in row or "error" in row for row in report.get("First calls", [])):
            os.environ["LIGHTNING_MUE_AUTOTUNE"] = "0"
        yield from part(report)

    return run


def title(options: argparse.Namespace) -> str:
    """The report's heading."""
    return f"{TITLE} (smoke run, its figures mean nothing)" if options.smoke else TITLE


def main() -> None:
    """Run all sections, also after one of them failed; failures are listed at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--seconds", type=float, default=375, help="time for all sections together")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # for the processes that do the work
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        if not options.smoke:
            parser.error("no CUDA device here; --smoke runs tiny sizes on the CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    if options.until is not None:
        work(options, device)
        return
    until = time.time() + options.seconds
    command = [str(Path(__file__).resolve()), *sys.argv[1:], "--until", str(until)]
    report = supervise(command, options.out / f"{NAME}.json", len(SECONDS) + 1, until + 10)
    report["Tilings"], report["Targets"] = tilings(), targets(report, Sizes(options.smoke).target)
    save_report(NAME, title(options), device, report, options.out)
    show("Targets", report["Targets"])
    failed = failures(report)
    raise SystemExit("\n".join(["failed checks and errors:", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
