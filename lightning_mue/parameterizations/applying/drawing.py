"""Draws initial weights that depend on a seed and the parameter's name only: not on processes, shards or threads.

A parameter is drawn in blocks of whole rows, each from a CPU generator of its own, so a rank draws no more than the blocks that
meet its shard, several threads can draw at once, and the memory for it is one block a thread.

Shape legend: R rows (all dimensions but the last, flattened) and C columns of one parameter; r, c of this rank's part of it.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan
from lightning_mue.parameterizations.reading.initial.initializer import CUT_STD, is_orthogonal
from lightning_mue.sharded import is_sharded, local, whole

#: Numbers that one generator draws (16 MiB in float32). Changing it changes the weights of larger parameters.
BLOCK = 1 << 22


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the seed and the name, on every rank and layout alike."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_all(
    pairs: Iterable[tuple[Tensor, ParameterPlan]],
    seed: int,
    *,
    padding: dict[str, int] | None = None,
    threads: int | None = None,
) -> None:
    """Fills parameters in place as their plans say (``keep`` and ``scaled`` leave one alone).

    Args:
        pairs: Parameters of any dtype, device and strides, plain or DTensor, with their plans.
        seed: Seed of all draws.
        padding: Name of an embedding -> its padding row, which is set to zero.
        threads: Threads that draw; None takes torch's own number. The result does not depend on it.

    Raises:
        ValueError: For a DTensor whose shard is not one rectangle of the parameter.
    """
    threads = threads or torch.get_num_threads()
    drawn = [(t, entry) for t, entry in pairs if entry.init.kind not in ("keep", "scaled")]
    targets = [_Target(t, entry, seed, (padding or {}).get(entry.name)) for t, entry in drawn]
    drawn.clear()
    if threads == 1:
        for target in targets:
            for block in target.blocks:
                target.fill(block)
            target.finish()
        return
    with ThreadPoolExecutor(threads) as pool:
        pending = deque((target, [pool.submit(target.fill, block) for block in target.blocks]) for target in targets)
        targets.clear()
        while pending:  # in order; each is released when it is finished
            target, futures = pending.popleft()
            for future in futures:
                future.result()
            target.finish()


def draw_(tensor: Tensor, entry: ParameterPlan, seed: int) -> None:
    """Fills one parameter in place as its plan says (``keep`` and ``scaled`` leave it alone)."""
    draw_all([(tensor, entry)], seed)


def scale_(tensor: Tensor, entry: ParameterPlan) -> None:
    """Multiplies what the module's own constructor drew (``scaled``), so that its root mean square is that of the plan.

    The form stays: an orthogonal matrix stays orthogonal, and parts of it keep their proportions. What has that size already,
    to within the noise of a draw, is left bit for bit. A second call does nothing.
    """
    values = whole(tensor.detach()).float()
    own = float(values.square().mean().sqrt()) if values.numel() else 0.0
    if own > 0 and abs(entry.init.value / own - 1) > max(
        1e-3, 3 * (2 * values.numel()) ** -0.5 * (not is_orthogonal(values))
    ):
        local(tensor).detach().mul_(entry.init.value / own)


class _Target:
    """The part of one parameter that this rank holds, and how it is drawn."""

    def __init__(self, tensor: Tensor, entry: ParameterPlan, seed: int, padding_row: int | None) -> None:
        self.entry, self.seed, self.padding_row = entry, seed, padding_row
        # Detached, because the caller's no_grad does not hold in worker threads.
        self.local, self.offset = local_part(tensor, entry.name)
        self.name, shape = entry.name, tuple(tensor.shape)
        self.part, offset = self.local, self.offset
        if entry.tied:
            self.name = tied_name(entry)
            if len(shape) > 2:  # a stack of experts: the first one is drawn, the others are copies
                shape, offset, self.part = shape[1:], offset[1:], self.local[:1].squeeze(0)
        self.columns = shape[-1] if len(shape) > 1 else 1
        self.rows = math.prod(shape) // max(1, self.columns)
        self.whole = self.part.shape == shape
        self.first_column = offset[-1] if len(shape) > 1 else 0
        self.row_ids = None if self.whole or not self.part.numel() else _row_ids(shape, tuple(self.part.shape), offset)
        # A part without contiguous rows is drawn into a buffer and copied.
        self.out = self.part if self.part.is_contiguous() else torch.empty(self.part.shape, dtype=torch.float32)
        self.blocks = self._blocks()

    def _blocks(self) -> list[int]:
        """Indexes of the blocks that meet this rank's part."""
        if self.entry.init.kind == "constant" or self.part.numel() == 0:
            return []
        self.block_rows = max(1, BLOCK // self.columns)
        if self.row_ids is None:
            return list(range(-(-self.rows // self.block_rows)))
        return torch.unique(self.row_ids // self.block_rows).tolist()

    def fill(self, block: int) -> None:
        """Draws one block and writes the part of it that this rank holds."""
        start = block * self.block_rows
        stop = min(self.rows, start + self.block_rows)
        if self.whole and self.out.dtype == torch.float32 and self.out.device.type == "cpu":  # in place
            self._sample(self.out.view(-1)[start * self.columns : stop * self.columns], block)
            return
        drawn_RC = torch.empty((stop - start, self.columns), dtype=torch.float32, device="cpu")
        self._sample(drawn_RC.view(-1), block)
        if self.row_ids is None:
            self.out.view(self.rows, self.columns)[start:stop].copy_(drawn_RC)
            return
        first, last = torch.searchsorted(self.row_ids, torch.tensor([start, stop])).tolist()
        out_rc = self.out.view(len(self.row_ids), -1)
        columns = slice(self.first_column, self.first_column + out_rc.shape[1])
        out_rc[first:last].copy_(drawn_RC[self.row_ids[first:last] - start, columns])

    def _sample(self, out: Tensor, block: int) -> None:
        generator = generator_for(f"{self.name}#{block}" if block else self.name, self.seed)
        std = self.entry.init.value
        if self.entry.init.kind == "uniform":
            out.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
        elif self.entry.init.kind == "truncated":  # by the inverse of its distribution function
            whole_std = std / CUT_STD
            out.uniform_(-math.erf(2**0.5), math.erf(2**0.5), generator=generator).erfinv_()
            out.mul_(2**0.5 * whole_std).clamp_(-2 * whole_std, 2 * whole_std)
        else:
            out.normal_(0.0, std, generator=generator)

    def finish(self) -> None:
        """Constants, copies from the buffer, further experts and padding rows, once all blocks are drawn."""
        if self.entry.init.kind == "constant":
            self.local.fill_(self.entry.init.value)
        elif self.out is not self.part:
            self.part.copy_(self.out)
        if self.part is not self.local and len(self.local) > 1:
            self.local[1:] = self.part
        if self.padding_row is not None:
            row = self.padding_row - self.offset[0]
            if 0 <= row < len(self.local):
                self.local[row].zero_()


def tied_name(entry: ParameterPlan) -> str:
    """The name under which all experts of a layer draw: that of a stack, or with ``*`` for the index in a list of experts.

    The index is the number after a part with "expert" in its name, else the last number.

    Example:
        >>> from lightning_mue.parameterizations.reading.initial.initializer import Init
        >>> plan = ParameterPlan("h.0.experts.7.fc.2.weight", "expert_up", (8, 4), None, Init("normal", 1.0), 1, 1, 1, "adamw", "")
        >>> tied_name(plan)
        'h.0.experts.*.fc.2.weight'
    """
    if len(entry.shape) > 2:
        return entry.name
    parts = entry.name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    after_experts = [i for i in numbers if i and "expert" in parts[i - 1].lower()]
    for i in (after_experts or numbers)[-1:]:
        parts[i] = "*"
    return ".".join(parts)


def local_part(tensor: Tensor, name: str) -> tuple[Tensor, tuple[int, ...]]:
    """(This rank's tensor, detached, sharing memory; where it begins in the whole parameter, a number a dimension)."""
    if not is_sharded(tensor):
        return tensor.detach(), (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    with torch.no_grad():
        part = local(tensor).detach()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if part.numel() and tuple(part.shape) != tuple(shape):
        raise value_error(
            name,
            found=f"a shard of shape {list(part.shape)} on this rank",
            expected=f"{list(shape)} from its placements {list(placements)}",
            do="Its place in the whole parameter is unknown, so it cannot be drawn. Shard the parameter with fully_shard or "
            "distribute_tensor.",
        )
    return part, tuple(offset) if part.numel() else (0,) * tensor.ndim


def _row_ids(shape: tuple[int, ...], part: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """Rows of the whole parameter that a part holds, ascending, int64 [r]."""
    if len(shape) == 1:
        return torch.arange(offset[0], offset[0] + part[0])
    ids = torch.zeros((), dtype=torch.int64)
    for side, size, start in zip(shape[:-1], part[:-1], offset[:-1], strict=True):
        ids = ids[..., None] * side + torch.arange(start, start + size)
    return ids.flatten()
