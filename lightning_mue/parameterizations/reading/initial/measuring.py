"""How the weights of a base were drawn: recorded while it is built, else measured on it, as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

from lightning_mue.parameterizations.reading.initial.draws import DrawRecorder
from lightning_mue.parameterizations.reading.initial.initializer import DRAWN, KEEP, Init, measure_init, pool
from lightning_mue.parameterizations.reading.parameters import named_tensors, padding_rows
from lightning_mue.sharded import is_sharded, whole

#: Entries that show a std to within 0.5 %.
_ENTRIES = 20_000
#: Builds of one base at most, and entries that they may have together.
_BUILDS, _ALL_ENTRIES = 16, 1 << 26

Build = Callable[[int], nn.Module]


def record_draws(build: Build) -> tuple[nn.Module, dict[str, Init | None]]:
    """Builds a module with seed 0 and tells how each parameter was drawn; None where only its values can tell."""
    with DrawRecorder() as recorder:
        made = build(0)
    padding = padding_rows(made)
    inits = {name: recorder.init_of(tensor, padding.get(name)) for name, tensor in named_tensors(made).items()}
    if any(map(is_sharded, made.parameters())) and torch.distributed.is_initialized():
        # A rank that holds nothing of a parameter does not know; all must plan alike.
        known: list[dict[str, Init | None]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(known, inits)
        inits = {name: next((found[name] for found in known if found.get(name)), None) for name in inits}
    return made, inits


def measure_build(build: Build) -> tuple[nn.Module, dict[str, Init]]:
    """Builds a module with seed 0 and finds how each of its parameters is drawn.

    What was not recorded (drawn by NumPy, computed, loaded) is judged by its values. A tensor that another seed leaves as it is
    was loaded or computed, and is kept; the std of one that changes is averaged over builds with further seeds, until it is known
    to within 0.5 % or 16 builds were made.

    Args:
        build: Makes the module from a seed.
    """
    made, recorded = record_draws(build)
    unknown = [name for name, init in recorded.items() if init is None]
    inits = {name: init for name, init in recorded.items() if init is not None}
    return made, inits | _average(made, unknown, build)


def measure_module(module: nn.Module) -> dict[str, Init]:
    """Finds how the parameters of a freshly initialized module were drawn from their values, equal layers taken together."""
    return _judge(module, list(named_tensors(module)))


def measure_ready(module: nn.Module, build: Build | None) -> dict[str, Init]:
    """Finds how the parameters of a freshly initialized module were drawn, from its values and from a second one like it.

    Args:
        module: The module.
        build: Makes the like of it from a seed, if that is possible. Where its draws agree with the module's values, they count;
            a part that was drawn anew or loaded after the module was made is judged by its values alone.
    """
    found = measure_module(module)
    if build is None:
        return found
    try:
        twin, recorded = measure_build(build)
    except Exception:  # another constructor's: whatever it raises, one draw is there to measure
        return found
    mine, theirs, padding = named_tensors(module), named_tensors(twin), padding_rows(module)
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        return found
    agree = {n for n in found if agrees(mine[n], recorded[n], padding.get(n), like=theirs[n])}
    return {name: recorded[name] if name in agree else init for name, init in found.items()}


def agrees(tensor: Tensor, init: Init, padding_row: int | None = None, *, like: Tensor | None = None) -> bool:
    """Whether the values of a parameter can be what was drawn so, to five standard errors.

    Args:
        tensor: The parameter.
        init: How it is drawn.
        padding_row: Row of it that its module sets to zero.
        like: For a parameter that is kept: what it must be equal to; None: anything.
    """
    values = without_row(whole(tensor).detach().float().cpu(), padding_row)
    if init.kind == "constant":
        return bool((values == torch.tensor(init.value)).all())
    if init.kind == "keep":
        return like is None or torch.equal(values, without_row(whole(like).detach().float().cpu(), padding_row))
    if values.numel() == 0:
        return True
    error = (2 * values.numel()) ** -0.5
    return abs(float(values.square().mean().sqrt()) / init.value - 1) < 5 * error if init.value else False


def without_row(tensor: Tensor, row: int | None) -> Tensor:
    """A tensor without one row, e.g. the padding row of an embedding."""
    return tensor if row is None else torch.cat([tensor[:row], tensor[row + 1 :]])


def _judge(module: nn.Module, names: list[str]) -> dict[str, Init]:
    """Judges parameters by their values."""
    values = _values(module, names)
    return pool({n: measure_init(t) for n, t in values.items()}, {n: tuple(t.shape) for n, t in values.items()})


def _values(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    tensors, padding = named_tensors(module), padding_rows(module)
    return {name: without_row(whole(tensors[name]).detach().float(), padding.get(name)) for name in names}


def _average(made: nn.Module, names: list[str], build: Build) -> dict[str, Init]:
    """Judges parameters by their values under several seeds."""
    first = _values(made, names)
    inits = _judge(made, names)
    seen = [name for name in names if inits[name].kind in (*DRAWN, "scaled")]
    if not seen:
        return inits
    squares: dict[str, list[float]] = {name: [inits[name].value ** 2] for name in seen}
    # By number, not by time: all ranks of a run must come to the same plan.
    builds = min(_BUILDS, max(2, _ALL_ENTRIES // max(1, sum(p.numel() for p in made.parameters()))))
    for seed in range(1, builds):
        again = _values(build(seed), seen)
        fixed = [name for name in seen if torch.equal(again[name], first[name])] if seed == 1 else []
        inits |= dict.fromkeys(fixed, KEEP)
        seen = [name for name in seen if name not in fixed]
        for name in seen:
            squares[name].append(float(again[name].square().mean()))
        if all((seed + 1) * prod(first[name].shape) >= _ENTRIES for name in seen):
            break
    shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in first.items()}
    averaged = {name: Init(inits[name].kind, (sum(squares[name]) / len(squares[name])) ** 0.5) for name in seen}
    return inits | pool(averaged, shapes)
