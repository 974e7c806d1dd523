"""What the benchmarks share: alternating repeats, medians of per-round ratios, where they ran, and the files of results.

A result file belongs to a benchmark and a processor: ``results/<stem>_<processor>.json``. Runs with other numbers of threads are
rows of the same file. Its claims are computed from its rows and printed, one line each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import processor
import targets
import torch
from targets import RESULTS, Claim

__all__ = ["RESULTS", "Claim", "alternate", "isa", "machine", "parse", "ratio", "result_name", "save", "stored_rows"]

Row = dict[str, object]
#: Columns that say how a row came to be; not printed.
STAMPS = ("threads", "date", "commit", "torch")


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them, so drift hits all alike."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median over rounds of name's time over the reference's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def isa() -> str:
    """The best instructions that may be used: "amx", "avx512bf16", "avx2", "avx2-emulated", "sve-bf16", ..."""
    return processor.detect().isa


def machine() -> dict[str, str]:
    """Processor, switches, versions, commit and date of a result."""
    cpu = processor.detect()
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cpu": cpu.name,
        "cpu identity": cpu.identity or "not recorded",
        "flags": " ".join(cpu.flags) or "none known",
        "isa": cpu.isa,
        "switches": " ".join(f"{key}={value}" for key, value in cpu.switches.items()) or "none",
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{
            name: installed
            for name in ("lightning", "transformers", "pytorch_optimizer")
            if (installed := _version(name))
        },
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Short hash of the checkout, with a + where files other than results differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"], check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def result_name(stem: str, folder: Path = RESULTS) -> str:
    """Name of a benchmark's result file on this processor: "optimizer_cpu_amd-epyc-avx512bf16".

    Where that file is of another processor (same name and instructions, another model), the model is part of the name.
    """
    cpu = processor.detect()
    name = f"{stem}_{cpu.slug}"
    path = folder / f"{name}.json"
    found = json.loads(path.read_text())["machine"].get("cpu identity", "") if path.exists() else ""
    if found in ("", "not recorded", cpu.identity) or not cpu.identity:
        return name
    return f"{name}_{'-'.join(cpu.identity.lower().split()[1:])}"


def parse(parser: argparse.ArgumentParser, threads: int | None = None) -> argparse.Namespace:
    """Arguments of a benchmark, with those that all have; sets the number of threads."""
    parser.add_argument("--threads", type=int, default=threads, help="of torch; rows of the same file")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a claim does not hold")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def stored_rows(name: str, folder: Path = RESULTS) -> list[Row]:
    """Rows of a result file; none where there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def save(
    name: str,
    rows: Sequence[Row],
    claims: Callable[[list[Row]], Sequence[Claim]] | None = None,
    part: Sequence[str] = (),
    strict: bool = False,
    folder: Path = RESULTS,
) -> None:
    """Write a result as JSON, print it as a table, and one line a claim.

    Rows of the file that were measured with another number of threads stay; so do those of other parts of the table.

    Args:
        name: From `result_name`.
        rows: One dictionary a row, with the same columns each.
        claims: What is claimed, from rows measured with one number of threads; called once for each number, with the rows that
            the file then has.
        part: Columns whose values say which part of the table a row is in.
        strict: End with exit code 1 if a claim of these rows does not hold.
        folder: Where the file goes.
    """
    here = machine()
    stamps = {"threads": torch.get_num_threads(), **{key: here[key] for key in STAMPS[1:]}}
    new = [{**row, **{key: row.get(key, value) for key, value in stamps.items()}} for row in rows]
    keys = ("threads", *part)
    replaced = {tuple(str(row.get(key)) for key in keys) for row in new}
    kept = [r for r in stored_rows(name, folder) if tuple(str(r.get(key)) for key in keys) not in replaced]
    other = [row for row in kept if set(row) != set(new[0])]
    kept = [row for row in kept if set(row) == set(new[0])]
    if other:
        print(f"{name}: {len(other)} rows of other columns than these are dropped; measure them again")
    made: dict[object, list[Claim]] = {}
    for threads in dict.fromkeys(row["threads"] for row in [*kept, *new]):
        of_threads = [row for row in [*kept, *new] if row["threads"] == threads]
        made[threads] = list(claims(of_threads)) if claims else []
    oldest = {threads: min(str(r["date"]) for r in [*kept, *new] if r["threads"] == threads) for threads in made}
    stored = [
        {**claim.to_json(), "threads": threads, "date": oldest[threads]}
        for threads, group in made.items()
        for claim in group
    ]
    folder.mkdir(exist_ok=True)
    result = {"machine": here, "claims": stored, "rows": [*kept, *new]}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    _print_table(new)
    now = {row["threads"] for row in new}
    held = targets.report(claim for threads in now for claim in made[threads])
    if strict and not held:
        raise SystemExit(1)


def _print_table(rows: Sequence[Row]) -> None:
    columns = [column for column in rows[0] if column not in STAMPS]
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{v:.3f}" if isinstance(v := row[c], float) else str(v) for c in columns))
