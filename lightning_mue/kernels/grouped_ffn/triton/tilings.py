"""How the experts' kernels cut their work: what is tried for a kernel, a type and a device, all of which fits its shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.triton_tools.launching import is_wide, shared_memory


class ExpertTiling(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        rows: Rows of a tile of the result.
        cols: Columns of a tile of the result.
        inner: How much of the inner dimension is loaded at once.
        stages: Loads in flight.
        warps: Warps a tile.
        group: Row tiles that are walked together, so that their operands stay in L2.
        waves: 0: a program for every tile. Else persistent: this many programs per multiprocessor, each taking tile after
            tile.
        described: Load by the bulk copy engine (TMA) what is contiguous.
    """

    rows: int
    cols: int
    inner: int
    stages: int
    warps: int
    group: int = 8
    waves: int = 0
    described: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return _constants(self)


@lru_cache
def _constants(tiling: ExpertTiling) -> dict[str, int]:
    names = {"ROWS": tiling.rows, "COLS": tiling.cols, "INNER": tiling.inner, "GROUP": tiling.group}
    return {**names, "num_stages": tiling.stages, "num_warps": tiling.warps}


class TilingKey(NamedTuple):
    """What the choice of a tiling depends on.

    Attributes:
        kernel: "up", "down", "hidden", "dx", "dw" or "dw_down".
        activation: A key of `ACTIVATIONS`: it determines the planes, and the registers that a tile needs.
        rows: Mean rows per expert, rounded up to a power of two.
        experts: E.
        d: Width.
        h: Expert hidden width.
        dtype: Of the products.
        precision: Of float32 products, "tf32" or "ieee".
        device: Where it runs.
    """

    kernel: str
    activation: str
    rows: int
    experts: int
    d: int
    h: int
    dtype: torch.dtype
    precision: str
    device: torch.device

    @property
    def gated(self) -> bool:
        """Whether there are two planes."""
        return ACTIVATIONS[self.activation].gated

    @property
    def name(self) -> str:
        """The key in the file of choices: the same in every process on this type of machine."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (*self[:6], dtype, self.precision, device, f"triton {triton.__version__}")
        return "/".join(str(part) for part in parts)


#: Tried for 16-bit types on wide devices (`is_wide`), per kernel; the first that fits is the default. What a compiler makes of
#: them is in docs/gpu.md: no device was at hand.
_HALF: dict[str, tuple[ExpertTiling, ...]] = {
    "two sums": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 4, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8, waves=1, described=True),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "one sum": (
        ExpertTiling(128, 256, 64, 4, 8),
        ExpertTiling(128, 256, 64, 4, 8, described=True),
        ExpertTiling(128, 256, 64, 4, 8, waves=1, described=True),
        # Two programs a multiprocessor: one loads while the other stores.
        ExpertTiling(128, 128, 64, 3, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "hidden": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 4, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8, waves=1, described=True),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    # Of n stages, loads by index get n / 2: the index is loaded before them.
    "dw, two sums": (
        ExpertTiling(128, 128, 64, 5, 8),
        ExpertTiling(128, 128, 64, 7, 8),
        ExpertTiling(128, 128, 64, 5, 8, waves=1),
    ),
    "dw, one sum": (
        ExpertTiling(128, 256, 64, 5, 8),
        ExpertTiling(128, 256, 64, 7, 8),
        ExpertTiling(128, 128, 64, 7, 8),
    ),
}
#: The same on other devices: no bulk copies, and sums that leave registers for the operands.
_HALF_NARROW: dict[str, tuple[ExpertTiling, ...]] = {
    "two sums": (
        ExpertTiling(64, 128, 64, 4, 4),
        ExpertTiling(128, 64, 64, 3, 8),
        ExpertTiling(64, 128, 32, 4, 4),
    ),
    "one sum": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 3, 8),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "hidden": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 3, 8),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "dw, two sums": (
        ExpertTiling(64, 128, 64, 5, 8),
        ExpertTiling(64, 128, 32, 5, 8),
        ExpertTiling(128, 64, 64, 5, 8),
    ),
    "dw, one sum": (
        ExpertTiling(128, 128, 64, 5, 8),
        ExpertTiling(128, 128, 64, 7, 8),
        ExpertTiling(64, 128, 64, 5, 4),
    ),
}
_TF32 = (
    ExpertTiling(128, 64, 32, 4, 8),
    ExpertTiling(128, 64, 32, 4, 4),
    ExpertTiling(128, 128, 32, 3, 8),
    ExpertTiling(64, 64, 32, 4, 4),
)
_IEEE = (ExpertTiling(64, 64, 16, 3, 4), ExpertTiling(128, 64, 16, 3, 8))
#: Where nothing else fits: 36 KiB in float32 with two sums, where every device has 48.
SMALLEST = ExpertTiling(64, 64, 16, 3, 4)


def candidates(key: TilingKey) -> tuple[ExpertTiling, ...]:
    """Return what is tried for a key, all of which fits its device; the first is taken where nothing can be timed."""
    shared = shared_memory(key.device)
    fitting = tuple(t for t in _offered(key, is_wide(shared)) if shared_bytes(key, t, shared) <= shared)
    if key.rows <= 64 and not key.kernel.startswith("dw"):  # tiles of 128 rows would be half empty
        fitting = tuple(sorted(fitting, key=lambda t: t.rows))
    return fitting or (SMALLEST,)


def _offered(key: TilingKey, wide: bool) -> tuple[ExpertTiling, ...]:
    if key.dtype == torch.float32:
        return _TF32 if key.precision == "tf32" else _IEEE
    shape = {
        "up": "two sums" if key.gated else "hidden",  # an activation of wide sums, erf above all, would spill registers
        "hidden": "hidden",
        "dw": "dw, two sums" if key.gated else "dw, one sum",
        "dw_down": "dw, one sum",
    }.get(key.kernel, "one sum")
    return (_HALF if wide else _HALF_NARROW)[shape]


def shared_bytes(key: TilingKey, tiling: ExpertTiling, shared: int) -> int:
    """Return at least the shared memory that a kernel takes on a device with `shared` bytes a block.

    Operands of each stage. The gated kernels read a tile more: "up" of weights, "dw" of rows.
    """
    more = 2 if key.gated else 1
    rows = tiling.rows * (more if key.kernel == "dw" else 1)
    cols = tiling.cols * (more if key.kernel == "up" else 1)
    buffers = tiling.stages if is_wide(shared) else tiling.stages - 1
    if key.kernel.startswith("dw"):
        buffers = (buffers + 1) // 2
    # 2 KiB: indices, and what is exchanged between warps.
    operands = buffers * tiling.inner * (rows + cols)
    # A tile of the result is exchanged, too, where few buffers are smaller than it.
    return max(operands, tiling.rows * tiling.cols) * key.dtype.itemsize + 2048
