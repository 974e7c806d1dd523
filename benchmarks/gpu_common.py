"""What the GPU benchmarks share: times by device events, the device's two ceilings, and the report.

On a CPU (a smoke run) the host clock stands in for events, and the ceilings are the CPU's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from common import machine
from torch import Tensor

Row = dict[str, object]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, by device events; what was queued before is waited for first."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def alternate_on(
    contenders: Mapping[str, Callable[[int], object]],
    device: torch.device,
    rounds: int,
    prepare: Callable[[int], object] = lambda index: None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them, on the same one of several input sets.

    Args:
        contenders: Name to a function of the round's number, which chooses the input set.
        device: Where they run.
        rounds: Timed rounds; three untimed ones come first (compilation, tuning, handles).
        prepare: Called with the number before each contender, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(-3, rounds):
        for name, run in contenders.items():
            prepare(index)
            taken = seconds_of(lambda run=run, index=index: run(index), device)
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def median_ms(seconds: Sequence[float]) -> float:
    """Median, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def spread(seconds: Sequence[float]) -> float:
    """Interquartile range over the median: differences below it are noise."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / statistics.median(seconds)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set how float32 matrices are multiplied: "ieee" or "tf32"."""
    # The older of torch's two settings: readers of either understand it.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch hands out with NaN, and with huge indices: what nobody writes then shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int, rounds: int) -> float:
    """FLOP/s of a large square product through the library, on random data; float32 as torch is set."""
    inputs = [torch.randn(2, size, size, device=device).to(dtype) for _ in range(3)]
    out = torch.empty_like(inputs[0][0])
    products = {"mm": lambda index: torch.mm(*inputs[index % 3], out=out)}
    return 2 * size**3 / statistics.median(alternate_on(products, device, rounds)["mm"])


def copy_bandwidth(device: torch.device, nbytes: int, rounds: int) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = {"copy": lambda index: target.copy_(source)}
    return 2 * nbytes / statistics.median(alternate_on(copies, device, rounds)["copy"])


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; infinite where anything is not finite."""
    error = float((x.double() - reference).norm() / reference.norm())
    return error if torch.isfinite(x).all() else float("inf")


def where(device: torch.device) -> dict[str, str]:
    """Hardware, versions and date of a result, the device's included."""
    if device.type != "cuda":
        return machine()
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        **machine(),
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def markdown(title: str, context: Mapping[str, str], sections: Mapping[str, Sequence[Row]]) -> str:
    """The report as Markdown, one table a section."""
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in context.items()), ""]
    for name, rows in sections.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def write(name: str, title: str, device: torch.device, sections: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Save the report and show its last section; called after every section, so that a stopped run leaves some."""
    save_report(name, title, device, sections, folder)
    last = list(sections)[-1]
    show(last, sections[last])


def save_report(
    name: str, title: str, device: torch.device, sections: Mapping[str, Sequence[Row]], folder: Path
) -> None:
    """Write `name`.json and `name`.md to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    context = where(device)
    texts = {
        "json": json.dumps({"machine": context, "sections": sections}, indent=1) + "\n",
        "md": markdown(title, context, sections),
    }
    for suffix, text in texts.items():
        # A run that is killed while it writes leaves the report before.
        draft = folder / f".{name}.{suffix}"
        draft.write_text(text)
        draft.replace(folder / f"{name}.{suffix}")


def show(name: str, rows: Sequence[Row]) -> None:
    """Print one section."""
    print(markdown("", {}, {name: rows}).split("\n", 3)[3], flush=True, file=sys.stdout)
