"""Shards a module on ``meta`` over ranks that do not exist, steps its optimizer there, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_mue.analysis.dry_run.balance import optimizer_work
from lightning_mue.analysis.dry_run.blocks import block_traffic, fsdp_blocks, in_flight_bytes
from lightning_mue.analysis.dry_run.exchange import balance_traffic, expert_traffic
from lightning_mue.analysis.dry_run.memory import activation_bytes, held_by_rank
from lightning_mue.analysis.dry_run.recording import Collectives, Traffic, sent_bytes
from lightning_mue.analysis.dry_run.report import EVERYWHERE, DryRun, Placed
from lightning_mue.analysis.dry_run.world import fake_world, places
from lightning_mue.checks import require_positive, value_error
from lightning_mue.moe.experts import Experts
from lightning_mue.optim.hypersphere import HyperSphereOptimizer
from lightning_mue.parameterizations.reading.parameters import tag_roles
from lightning_mue.sharded import is_sharded, local

_CLIPPING, _STEPPING = "gradient clipping", "optimizer"
#: Type of HyperSphereOptimizer's products, and so of the matrices that it sends, where it is left open: that of CUDA.
_PRODUCTS = "float16"
#: Bytes of the first bucket of DDP and of the others, torch's defaults.
_DDP_BUCKETS = [1 << 20, 25 << 20]


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide what is sent and held.

    Attributes:
        world: Ranks.
        tensor_parallel: Ranks that share a batch, and the experts.
        replicated: DDP: every rank holds everything.
        bucket_view: DDP: gradients are views of the buckets in which they are reduced.
        sequences: In a micro-batch of one data-parallel rank; None: unknown.
        micro_batches: In an optimizer step.
        autocast: The type of the products under mixed precision; None: that of the weights.
        clip: Clips the gradients of an optimizer; None: not clipped.
        shares_replicas: Whether the ranks of DDP share the work of a HyperSphereOptimizer, as under MuECallback.
    """

    world: int
    tensor_parallel: int = 1
    replicated: bool = False
    bucket_view: bool = False
    sequences: int | None = None
    micro_batches: int = 1
    autocast: torch.dtype | None = None
    clip: Callable[[Optimizer], None] | None = None
    shares_replicas: bool = True


def dry_run(
    module: Any,
    run: Run,
    make_optimizers: Callable[[Any], Sequence[Optimizer]],
    roles: Mapping[str, str] | None = None,
) -> DryRun:
    """Counts what a training of a module on `run.world` ranks would hold and send.

    Args:
        module: A LightningModule on ``meta``. Its ``configure_model`` shards it, so that it is of no use afterwards.
        run: The run.
        make_optimizers: Makes the optimizers of the sharded module.
        roles: Name of a parameter -> its role in the plan.

    Raises:
        ValueError: If the ranks cannot be divided so, sizes are below 1, or the model has no parameters.
        RuntimeError: If torch.distributed is initialized.
    """
    check_run(module, run)
    with fake_world(run.world // run.tensor_parallel, run.tensor_parallel) as mesh, torch.device("meta"):
        if not run.replicated:
            module._device_mesh = mesh
        module.configure_model()
        if not any(True for _ in module.parameters()):
            raise value_error("model", found="no parameters", expected="some, after configure_model")
        tag_roles(module)  # sharding a parameter drops the attributes noted on it
        with torch.device("cpu"):
            return _count(module, run, make_optimizers(module), roles or {})


def check_run(module: nn.Module, run: Run) -> None:
    """Checks, before anything is built, that the ranks can be divided so.

    Raises:
        ValueError: If not.
    """
    require_positive(world=run.world, tensor_parallel=run.tensor_parallel, micro_batches=run.micro_batches)
    if run.sequences is not None:
        require_positive(sequences=run.sequences)
    if run.world % run.tensor_parallel:
        do = "Give --tensor-parallel a divisor of --world."
        expected = f"a multiple of the tensor-parallel size {run.tensor_parallel}"
        raise value_error("world", found=run.world, expected=expected, do=do)
    for name, each in module.named_modules():
        if isinstance(each, Experts) and each.n_experts % run.tensor_parallel:
            expected = f"a divisor of n_experts={each.n_experts} ({name}): every rank holds equally many experts"
            do = "Give --tensor-parallel one, or change n_experts."
            raise value_error("tensor_parallel", found=run.tensor_parallel, expected=expected, do=do)


def _count(module: Any, run: Run, optimizers: Sequence[Optimizer], roles: Mapping[str, str]) -> DryRun:
    data_parallel = run.world // run.tensor_parallel
    stepped, notes = _step(module, run, optimizers)
    blocks, ranks = fsdp_blocks(module), places(data_parallel, run.tensor_parallel)
    memory = held_by_rank(module, optimizers, ranks)
    moving: dict[str, int] = {}
    if blocks:
        moving["FSDP in flight"] = in_flight_bytes(blocks)
    if run.replicated and run.world > 1 and not run.bucket_view:
        moving["DDP buckets"] = memory[0]["gradients"]
    dtype = next(module.parameters()).dtype
    activations = {} if run.sequences is None else activation_bytes(module, run.sequences, run.autocast or dtype)
    notes += list(_notes(module, run, bool(activations), bool(blocks)))
    params = list(module.parameters())
    return DryRun(
        data_parallel,
        run.tensor_parallel,
        sum(p.numel() for p in params),
        [{**held, **moving, **activations} for held in memory],
        [*block_traffic(blocks, run.micro_batches), *_pass_traffic(module, run), *stepped],
        _placed(module, roles),
        optimizer_work(optimizers, ranks),
        notes,
    )


def _step(module: Any, run: Run, optimizers: Sequence[Optimizer]) -> tuple[list[Traffic], list[str]]:
    """Clips and steps on ``meta``: the collectives of a later step, and what could not be run. Makes the optimizers' state."""
    rows: list[Traffic] = []
    notes: list[str] = []
    for optimizer in optimizers:
        if run.replicated and run.shares_replicas and isinstance(optimizer, HyperSphereOptimizer) and run.world > 1:
            optimizer.process_group = dist.group.WORLD
        for group in optimizer.param_groups:
            if group.get("compute_dtype", "") is None:
                group["compute_dtype"] = _PRODUCTS
            for param in group["params"]:
                param.grad = torch.empty_like(param) if param.requires_grad else None
        for what, act in ((_CLIPPING, run.clip), (_STEPPING, lambda each: each.step())):
            try:
                if what == _STEPPING:
                    optimizer.step()  # the first step, which makes the state, sends more than the later ones
                with Collectives() as seen:
                    if act is not None:
                        act(optimizer)
                rows += seen.rows(what)
            except Exception as error:  # someone's optimizer may need values
                reason = repr(error).splitlines()[0][:200]
                state = ", nor its state" if what == _STEPPING else ""
                notes.append(f"{what}: NOT COUNTED{state}: {type(optimizer).__name__} does not run on meta ({reason})")
    return rows, notes


def _pass_traffic(module: Any, run: Run) -> Iterator[Traffic]:
    """The collectives of forward and backward passes outside of FSDP."""
    if run.sequences is not None and isinstance(getattr(module, "context_length", None), int):
        yield from expert_traffic(module, run.sequences * module.context_length, run.autocast, run.micro_batches)
    yield from balance_traffic(module, run.world, run.micro_batches)
    if run.replicated and run.world > 1:
        trained = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        buckets = dist._compute_bucket_assignment_by_size(trained, _DDP_BUCKETS)[0]  # type: ignore[attr-defined]
        sent = sent_bytes("all-reduce", run.world, sum(p.nbytes for p in trained))
        yield Traffic("DDP gradients", "all-reduce", len(buckets), sent)  # Lightning reduces the last micro-batch only
        if buffers := sum(buffer.nbytes for buffer in module.buffers()):
            yield Traffic("DDP buffers", "broadcast", len({b.dtype for b in module.buffers()}), buffers)


def _placed(module: nn.Module, roles: Mapping[str, str]) -> list[Placed]:
    counts = Counter(
        (
            roles.get(name, "-"),
            tuple(param.shape),
            tuple(local(param).shape),
            _placements(param),
            str(param.dtype).removeprefix("torch."),
        )
        for name, param in module.named_parameters()
    )
    return [Placed(*key, count) for key, count in counts.items()]


def _placements(param: Any) -> str:
    if not is_sharded(param):
        return EVERYWHERE
    names = param.device_mesh.mesh_dim_names or range(param.device_mesh.ndim)
    shards = [(name, p) for name, p in zip(names, param.placements, strict=True) if hasattr(p, "dim")]
    return ", ".join(f"dim {p.dim} over {name}" for name, p in shards) or EVERYWHERE


def _notes(module: Any, run: Run, activations: bool, blocks: bool) -> Iterator[str]:
    if activations:
        yield (
            "activations: only what enters each block, and the logits. Not counted: what attention and FFNs keep, the "
            "workspace of kernels, fragmentation"
        )
    else:
        why = (
            "give --sequences"
            if run.sequences is None
            else "the module does not say context_length, width, depth, vocab_size"
        )
        yield f"activations: NOT COUNTED ({why})"
    parallel = [
        e for e in module.modules() if isinstance(e, Experts) and e.parallel is not None and e.parallel.n_ranks > 1
    ]
    if parallel and (run.sequences is None or not isinstance(getattr(module, "context_length", None), int)):
        yield "exchange of tokens between experts: NOT COUNTED (give --sequences; the module must have a context_length)"
    elif parallel:
        yield "exchange of tokens: for a router that sends equally many tokens to every rank"
    if run.world > 1 and not run.replicated and not any(map(is_sharded, module.parameters())):
        yield "nothing is sharded: configure_model leaves every parameter whole, and no gradient is reduced"
    elif run.world > run.tensor_parallel and not run.replicated and not blocks:
        yield "gradients between data-parallel ranks: NOT COUNTED: configure_model does not use fully_shard"
    yield "not counted: collectives of logged metrics, monitors, validation, checkpoints"
