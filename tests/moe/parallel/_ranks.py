"""Expert parallelism on CPU processes: `_ranks.py part rank world_size folder` runs one of `PARTS`.

Every rank compares what it gets with the one-process layer, which it runs beside, and reports relative errors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.processes import main
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue import MoELanguageModel, MuECallback, initialize, plan
from lightning_mue.data import TextDataModule
from lightning_mue.moe import MoELayer
from lightning_mue.moe.parallel import exchange as _exchange
from lightning_mue.moe.parallel import expert_parallel as parallel
from lightning_mue.moe.parallel.expert_parallel import clip_grad_norm, parallelize_experts
from lightning_mue.moe.parallel.replicas import FINGERPRINT
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.parameterizations.reading.parameters import tag_roles

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
D, H, E = 8, 6, 4

#: Arguments of the layer, and tokens of each rank (split), or of all (replicated: their sum).
CASES = {
    "plain": ({}, (11, 12)),
    "shared, sqrt gate": ({"shared_width": 5, "gate": "sqrt", "shared_gate": True}, (7, 7)),
    "biases, gelu": ({"bias": True, "activation": "gelu", "scoring": "sigmoid"}, (6, 5)),
    "groups, bias balance": ({"n_groups": 2, "balance": "bias"}, (6, 6)),
    "one expert a rank": ({"n_experts": 2, "top_k": 1, "scoring": "softmax-topk"}, (5, 8)),
    "all experts": ({"top_k": 4, "z_loss_coef": 0.1}, (5, 5)),
    "all tokens to rank 0": ({}, (9, 8)),
    "all tokens to rank 1": ({"bias": True}, (9, 8)),
    "masked": ({"shared_width": 5}, (9, 8)),
    "no tokens on rank 1": ({"bias": True}, (1, 0)),
    "no tokens on rank 0": ({}, (0, 5)),
    "no tokens": ({}, (0, 0)),
    "expert choice": ({"choice": "expert", "scoring": "sigmoid", "balance": "none"}, (7, 9)),
}
TOKENS = ("split", "replicated")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_layer(case, dtype):
    """The same on every rank."""
    torch.manual_seed(1)
    layer = MoELayer(D, H, **{"n_experts": E, "init_std": None, **CASES[case][0]}).to(dtype)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if ".b_" in name:
                p.copy_(draw(*p.shape, seed=len(name)))
    if case.startswith("all tokens to"):
        layer.router.balance_bias[0 if case.endswith("0") else 2 :][:2] += 100
    return layer


def batches(case, dtype):
    """Tokens, output weights and mask of each rank."""
    for rank, tokens in enumerate(CASES[case][1]):
        mask = torch.arange(tokens) % 3 != 1 if case == "masked" else None
        yield draw(tokens, D, seed=rank, dtype=dtype), draw(tokens, D, seed=10 + rank, dtype=dtype), mask


def run(layer, x, w, mask):
    """Output, auxiliary loss, the input's gradient."""
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    ((y * w).sum() + layer.aux_loss).backward()
    return {"y": y.detach(), "aux_loss": layer.aux_loss.detach(), "x": x.grad}


def run_in_bfloat16(layer, *batch):
    with torch.autocast("cpu", torch.bfloat16):
        return run(layer, *batch)


def run_checkpointed(layer, *batch):
    """Computes the layer once more in the backward pass, if it is the parallel one."""
    if layer.experts.parallel is None:
        return run(layer, *batch)
    forward, layer.forward = layer.forward, lambda *args: checkpoint(forward, *args, use_reentrant=False)
    try:
        return run(layer, *batch)
    finally:
        layer.forward = forward


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def gradients(layer):
    return {name: whole(p.grad) for name, p in layer.named_parameters() if p.grad is not None}


def distance(found, wanted):
    """Relative to the norm; absolute where that is zero."""
    assert found.shape == wanted.shape
    return float((found - wanted).double().norm() / max(float(wanted.double().norm()), 1e-3)) if wanted.numel() else 0.0


def joined(case, dtype):
    xs, ws, masks = zip(*batches(case, dtype), strict=True)
    return torch.cat(xs), torch.cat(ws), None if masks[0] is None else torch.cat(masks)


def compare(case, dtype, tokens, mesh, run=run):
    """Relative errors of values and gradients against one process."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    alone = make_layer(case, dtype)
    layer = parallelize_experts(copy.deepcopy(alone), mesh, tokens=tokens)
    if tokens == "replicated":
        batch = joined(case, dtype)
        wanted, found = run(alone, *batch), run(layer, *batch)
    else:
        outcomes = [run(alone, *batch) for batch in batches(case, dtype)]
        wanted, found = outcomes[rank], run(layer, *list(batches(case, dtype))[rank])
        for p in alone.parameters():  # the mean over ranks of the ranks' losses
            p.grad = None if p.grad is None else p.grad / ranks
        for name, p in layer.named_parameters():
            if not name.startswith("experts."):  # as data parallelism does
                dist.all_reduce(p.grad)
                p.grad /= ranks
    wanted.update(gradients(alone))
    found.update(gradients(layer))
    assert wanted.keys() == found.keys(), (wanted.keys(), found.keys())
    errors = {name: distance(found[name], wanted[name]) for name in wanted}
    if tokens == "replicated":
        errors["counts"] = float((layer.last_routing.counts - alone.last_routing.counts).abs().sum())
    return errors


def agreement(mesh):
    report = {}
    for case in CASES:
        for tokens in TOKENS:
            if case == "expert choice" and tokens == "replicated":
                continue
            for dtype in (torch.float64, torch.float32):
                report[case, tokens, str(dtype)] = compare(case, dtype, tokens, mesh)
    for tokens in TOKENS:
        case = "shared, sqrt gate"
        report["autocast", tokens] = compare(case, torch.float32, tokens, mesh, run_in_bfloat16)
        report["checkpointed", tokens] = compare(case, torch.float64, tokens, mesh, run_checkpointed)
    return report


# --- What travels, and when -------------------------------------------------------------------------------------------


class Spy:
    """Counts this rank's bytes to others, and notes what happens in which order."""

    def __init__(self):
        self.bytes, self.events = 0, []

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for owner, name, mine in (
            (dist, "all_to_all_single", self.swap),
            (dist, GATHER, self.gather),
            (_exchange.Flight, "launch", self.note),
            (_exchange.Flight, "arrive", self.note),
        ):
            real = getattr(owner, name)
            wrapped = lambda *args, real=real, mine=mine, **kwargs: mine(real, *args, **kwargs)  # noqa: E731
            setattr(owner, name, wrapped)
            self.stack.callback(setattr, owner, name, real)
        return self

    def __exit__(self, *error):
        self.stack.close()

    def note(self, real, *args):
        self.events.append(real.__name__)
        return real(*args)

    def swap(self, real, output, input, receive=None, send=None, group=None, async_op=False):
        rows = list(input.split(send or len(input) // group.size()))
        del rows[dist.get_rank(group)]
        self.bytes += sum(part.nbytes for part in rows)
        return real(output, input, receive, send, group=group, async_op=async_op)

    def gather(self, real, output, input, group):
        self.bytes += input.nbytes * (group.size() - 1)
        return real(output, input, group=group)


class Marked(torch.autograd.Function):
    """Notes when its backward pass runs."""

    @staticmethod
    def forward(ctx, x, spy):
        ctx.spy = spy
        spy.events.append("overlap")
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        ctx.spy.events.append("overlap's gradient")
        return 2 * grad, None


def saved_bytes(function):
    """Memory that a forward pass keeps for the backward pass, and its result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return storages, result


def travels(mesh, tokens):
    """One forward and backward pass of the experts alone, spied on."""
    layer = parallelize_experts(make_layer("plain", torch.bfloat16), mesh, tokens=tokens)
    experts, x = layer.experts, draw(23, D, seed=mesh.get_local_rank() if tokens == "split" else 0).bfloat16()
    x.requires_grad_()
    with torch.no_grad():
        routing = layer.router(x)
    routing = replace(routing, gates=routing.gates.requires_grad_())
    part = _exchange.Slice.of(23, mesh.get_group())
    ids = routing.expert_ids if tokens == "split" else routing.expert_ids[part.start : part.stop]
    sent = int((ids // (E // 2) != mesh.get_local_rank()).sum())
    with Spy() as spy:
        forward = lambda: experts.parallel.forward(experts, x, routing, lambda: Marked.apply(x, spy))  # noqa: E731
        storages, y = saved_bytes(forward)
        received = received_by(mesh, sent)
        y.sum().backward()
    plain = {t.to_local().untyped_storage().data_ptr() for t in experts.parameters()}
    return {
        "bytes": spy.bytes - 8,  # what `received_by` itself sends
        "predicted": bytes_sent(sent, received, replicated=None if tokens == "split" else (23, 2)),
        "events": spy.events,
        "saved": sum(size for at, size in storages.items() if at not in plain),
        "rows": len(ids) * 2 - sent + received,
        "sorted rows": len(ids) * 2,
        "overlap adds": distance(y, experts.parallel.forward(experts, x, routing) + 2 * x),
    }


def bytes_sent(sent, received, *, replicated, ranks=2):
    """Bytes that a rank sends in a forward and a backward pass of experts in bfloat16: the table of the guide.

    Rows go out and their outputs come back, then their gradients: 2 (sent + received) D numbers; gates, in float32, go out and
    their gradients come back; counts and fingerprints are float64. `replicated` is (T, K): outputs, and gradients of tokens
    and gates, are gathered from slices.
    """
    rows = 2 * (sent + received) * D * 2
    gates = (sent + received) * 4
    counts = 8 * (ranks - 1) * (E // ranks + (0 if replicated is None else FINGERPRINT))
    slices = 0
    if replicated is not None:
        tokens, top_k = replicated
        slices = -(-tokens // ranks) * (ranks - 1) * (2 * D * 2 + top_k * 4)
    return rows + gates + counts + slices


def received_by(mesh, sent):
    numbers = torch.tensor([float(sent)] * 2, dtype=torch.float64)
    answer = torch.empty_like(numbers)
    dist.all_to_all_single(answer, numbers, group=mesh.get_group())
    return int(answer[1 - mesh.get_local_rank()])


# --- What is refused, and negative controls -----------------------------------------------------------------------------


def message_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(rank, mesh):
    make = functools.partial(make_layer, dtype=torch.float32)
    ours = parallelize_experts(make("plain"), mesh)
    mixed = parallelize_experts(make("plain"), mesh)
    run(mixed, *joined("plain", torch.float32))
    cut = make("plain")
    fully_shard(cut, mesh=mesh)
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "experts"))
    elsewhere = DeviceMesh("cpu", [1 - rank], _init_backend=False)
    by_expert = parallelize_experts(make("expert choice"), mesh)
    return {
        "twice": message_of(parallelize_experts, ours, mesh),
        "other tokens": message_of(parallelize_experts, ours, mesh, tokens="split"),
        "tokens": message_of(parallelize_experts, make("plain"), mesh, tokens="both"),
        "dimensions": message_of(parallelize_experts, make("plain"), square),
        "a part of it": message_of(parallelize_experts, make("plain"), square["experts"]),
        "not in the mesh": message_of(parallelize_experts, make("plain"), elsewhere),
        "no mesh": message_of(parallelize_experts, make("plain"), None),
        "no layer": message_of(parallelize_experts, torch.nn.Linear(2, 2), mesh),  # a dense base: nothing to do
        "experts": message_of(parallelize_experts, MoELayer(D, H, 3), mesh),
        "sharded": message_of(parallelize_experts, cut, mesh),
        "other batches": message_of(ours, draw(5, D, seed=rank, dtype=torch.float32)),
        "expert choice": message_of(by_expert, draw(5, D, dtype=torch.float32)),
        "ddp": message_of(DistributedDataParallel, parallelize_experts(make("plain"), mesh)),
        "torch's clipping": message_of(torch.nn.utils.clip_grad_norm_, mixed.parameters(), 1.0),
        "plain state": message_of(parallelize_experts(make("plain"), mesh).load_state_dict, make("plain").state_dict()),
        "copy": distance(copy.deepcopy(ours)(draw(5, D)[:4].float()), ours(draw(5, D)[:4].float())),
    }


def wide_batches(rank, mesh):
    """What is said of different batches at a width where sums of magnitudes agree, of rounding, and of NaN."""
    layer = MoELayer(2048, 8, 64, init_std=None)
    torch.nn.init.normal_(layer.router.weight, std=2048**-0.5, generator=torch.Generator().manual_seed(0))
    parallelize_experts(layer, mesh)
    same = draw(64, 2048, dtype=torch.float32)
    return {
        "different": [message_of(layer, draw(64, 2048, seed=2 * i + rank, dtype=torch.float32)) for i in range(20)],
        "rounded": message_of(layer, same.bfloat16().float() if rank else same),
        "nan": message_of(layer, same * torch.nan),
    }


def loads_plain_state(mesh):
    """As the guide says it is done."""
    layer = build()
    source = copy.deepcopy(layer)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    parallelize_experts(layer, mesh)
    set_model_state_dict(layer, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    wanted = source.state_dict()
    return {n: distance(whole(p), wanted[n]) for n, p in layer.named_parameters()}


def clips(mesh):
    """Norms and changes of gradients by the largest norm that is asked for."""
    report = {}
    for limit in (None, 0, 0.01):
        layer = parallelize_experts(make_layer("plain", torch.float64), mesh)
        run(layer, *joined("plain", torch.float64))
        before = gradients(layer)
        norm = clip_grad_norm(layer.parameters(), limit)
        after = gradients(layer)
        report[str(limit)] = {"norm": float(norm), "change": max(distance(after[n], before[n]) for n in before)}
    return report


def controls(mesh):
    """What the gradients are without the parts that make them right."""

    def unscaled(self, weight):
        return weight.to_local()

    def not_gathered(ctx, *grads):
        before = ctx.part.start
        return None, *(F.pad(g, (0, 0, before, ctx.part.total - before - len(g))) for g in grads)

    report = {}
    for name, owner, attribute, broken, tokens in (
        ("not a mean over ranks", parallel.ExpertParallel, "local", unscaled, "split"),
        ("not gathered", _exchange._TakeSlice, "backward", staticmethod(not_gathered), "replicated"),
    ):
        real = owner.__dict__[attribute]
        setattr(owner, attribute, broken)
        report[name] = compare("plain", torch.float64, tokens, mesh)
        setattr(owner, attribute, real)
    return report


# --- Training ---------------------------------------------------------------------------------------------------------

STEPS = 8
#: Clips at every step: the norms of the gradients are 0.5 to 3.
MAX_NORM = 0.1


def build(dtype=torch.float64):
    torch.manual_seed(2)
    return MoELayer(D, H, E, bias=True, shared_width=5, init_std=None).to(dtype)


def optimizer_of(layer):
    tag_roles(layer)  # biases of stacked experts look like matrices
    return HyperSphereOptimizer(layer.named_parameters(), lr=0.05, compute_dtype="float32")


def train(layer, optimizer, steps, batch_of, clip=torch.nn.utils.clip_grad_norm_):
    """The loss is the mean over the batches of a step; `batch_of(step)` gives those that this rank has."""
    norms = []
    for step in steps:
        losses = [F.mse_loss(layer(x), torch.tanh(2 * x)) + layer.aux_loss for x in batch_of(step)]
        (sum(losses) / len(losses)).backward()
        norms.append(float(clip(list(layer.parameters()), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def batch(step, number):
    return draw(9, D, seed=100 * step + number)


def state_of(layer, optimizer):
    state = {
        f"{n}/{k}": whole(v) for n, p in layer.named_parameters() for k, v in optimizer.state[p].items() if k != "step"
    }
    return {**{name: whole(p) for name, p in layer.named_parameters()}, **state}


def trained_alone(batches, steps=STEPS):
    layer = build()
    optimizer = optimizer_of(layer)
    norms = train(layer, optimizer, range(steps), lambda step: [batch(step, i) for i in range(batches)])
    return {**state_of(layer, optimizer), "norms": torch.tensor(norms)}


def trained(layer, batch_of):
    """Weights, optimizer state and gradient norms after training."""
    optimizer = optimizer_of(layer)
    norms = train(layer, optimizer, range(STEPS), batch_of, clip_grad_norm)
    return {**state_of(layer, optimizer), "norms": torch.tensor(norms)}


def two(rank, folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("experts",))
    return {
        "agreement": agreement(mesh),
        "controls": controls(mesh),
        "travels": {tokens: travels(mesh, tokens) for tokens in TOKENS},
        "refusals": refusals(rank, mesh),
        "wide": wide_batches(rank, mesh),
        "plain state": loads_plain_state(mesh),
        "clips": clips(mesh),
        "training": {"replicated": trained(parallelize_experts(build(), mesh), lambda step: [batch(step, 0)])},
    }


def four(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    data, every = mesh["data_parallel"], mesh._flatten("every")
    replicated = parallelize_experts(build(), mesh["tensor_parallel"])
    fully_shard(replicated, mesh=data)
    split = parallelize_experts(build(), mesh["tensor_parallel"], tokens="split")
    fully_shard(split.experts, mesh=data)
    fully_shard(split, mesh=every)
    report = {
        "placements": {n: str(p.placements) for n, p in replicated.named_parameters()},
        "drawn": drawn(Parallel(**SIZES), mesh),
    }
    report["training"] = {
        "replicated": trained(replicated, lambda step: [batch(step, data.get_local_rank())]),
        "split": trained(split, lambda step: [batch(step, every.get_local_rank())]),
    }
    return report


# --- Lightning --------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 256,
    "context_length": 8,
    "width": 16,
    "n_heads": 2,
    "depth": 2,
    "n_experts": 4,
    "expert_width": 8,
}
BASE = {"width": 8, "n_heads": 1, "n_experts": 0}
FIT_STEPS, STOP = 6, 3


class Parallel(MoELanguageModel):
    """Shares its experts out over one dimension of Lightning's mesh, and shards what is left over the other."""

    def configure_model(self):
        mesh = self.device_mesh
        if mesh is None or isinstance(self.transformer, FSDPModule):
            return
        parallelize_experts(self, mesh["tensor_parallel"])
        if mesh["data_parallel"].size() > 1:
            for module in (*self.transformer.blocks, self.transformer):
                fully_shard(module, mesh=mesh["data_parallel"])

    def configure_optimizers(self):
        tag_roles(self)  # moving a DTensor to its device loses what was noted on it
        return super().configure_optimizers()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)


def drawn(model, mesh=None):
    """The initial weights that a plan asks for."""
    model._device_mesh = mesh
    model.configure_model()
    initialize(model, plan(model, base=BASE, rule="hyperp", family="sphere"))
    return {name: whole(p) for name, p in model.named_parameters()}


class Layer(MoELayer):
    """Shares its experts out; for a model that begins on the meta device."""

    def configure_model(self):
        if self.device_mesh is not None:
            parallelize_experts(self, self.device_mesh["tensor_parallel"])


class Record(Callback):
    """Losses of all steps, and the weights that training started from."""

    def __init__(self):
        self.losses, self.start = [], {}

    def on_train_start(self, trainer, pl_module):
        self.start = {name: whole(p) for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def trainer_of(strategy, steps, callbacks=(), save=None, **kwargs):
    saver = [ModelCheckpoint(dirpath=save, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)] if save else []
    return Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        max_steps=steps,
        callbacks=[*callbacks, *saver],
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **kwargs,
    )


def model_parallel(data, experts, *, distributed=True):
    return ModelParallelStrategy(
        data_parallel_size=data,
        tensor_parallel_size=experts,
        save_distributed_checkpoint=distributed,
        process_group_backend="gloo",
    )


def fit(folder, strategy, *, steps=FIT_STEPS, ckpt_path=None, save=None):
    """Train the language model with MuECallback, clipping and bias balance; losses, first and last weights."""
    torch.manual_seed(0)
    made = Parallel(
        **SIZES,
        shared_width=8,
        gate="sqrt",
        balance="bias",
        optimizer=functools.partial(HyperSphereOptimizer, lr=0.02, compute_dtype="float32"),
    )
    record = Record()
    callbacks = [record, MuECallback("hyperp", base=BASE, verbose=False)]
    trainer = trainer_of(strategy, steps, callbacks, save, gradient_clip_val=0.5)
    data = TextDataModule(folder / "corpus.txt", context_length=8, batch_size=4, cache_dir=folder / "cache")
    trainer.fit(made, datamodule=data, ckpt_path=ckpt_path)
    biases = torch.stack([layer.router.balance_bias for layer in made.moe_layers])
    end = {name: whole(p) for name, p in made.named_parameters()}
    return {"losses": torch.tensor(record.losses), "start": record.start, "end": end, "biases": biases}


def fit_layer(strategy):
    """Weights of a layer that begins on the meta device and is drawn by Lightning, without a plan."""
    trainer, record = trainer_of(strategy, 1), Record()
    trainer.callbacks.append(record)
    with trainer.init_module(empty_init=True):
        layer = Layer(D, H, E, bias=True)
    torch.manual_seed(3)
    trainer.fit(layer, DataLoader(TensorDataset(*torch.zeros(2, 4, D)), batch_size=4))
    return {"start": record.start, "sharded": isinstance(layer.experts.w_up, DTensor)}


GUIDE = Path(__file__).parents[3] / "docs" / "expert-parallel.md"
#: Clipping options of the Trainer; the gradients are large enough for both.
CLIPPING = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def fit_guide(strategy, clipping):
    """Train the class of the guide, as it stands there; its weights after three steps."""
    code = next(block for block in GUIDE.read_text().split("```python")[1:] if "class MyModel" in block)
    space = {}
    exec(code.split("```")[0], space)
    torch.manual_seed(4)
    model = space["MyModel"]()
    kinds = []
    real = model.configure_gradient_clipping

    def spied(optimizer, *args, **kwargs):
        real(optimizer, *args, **kwargs)
        grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        norm, largest = torch.stack([g.norm() for g in grads]).norm(), max(g.abs().max() for g in grads)
        kinds.append([float(norm), float(largest)])

    model.configure_gradient_clipping = spied
    # All ranks have the batches of one process, over the data dimension too: Lightning's sampler would shuffle.
    trainer = trainer_of(strategy, 3, use_distributed_sampler=False, **CLIPPING[clipping])
    data = TensorDataset(draw(24, 8).float(), 5 * draw(24, 1, seed=1).float())
    trainer.fit(model, DataLoader(data, batch_size=8))
    return {"weights": {n: whole(p) for n, p in model.named_parameters()}, "gradients": torch.tensor(kinds)}


def lightning(folder):
    """On two ranks, then on one with their checkpoints, then on two with the one's; under torchrun."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        resumed = fit(folder, model_parallel(1, 1), ckpt_path=folder / "distributed" / f"step={STOP}.ckpt")
        saved = fit(folder, model_parallel(1, 1), steps=STOP, save=folder / "alone")["end"]
        return {"resumed": resumed, "saved": saved}
    if (folder / "alone").exists():
        return {"from one": fit(folder, model_parallel(1, 2), ckpt_path=folder / "alone" / f"step={STOP}.ckpt")}
    report = {"layer": fit_layer(model_parallel(1, 2))}
    report["guide"] = {
        (how, clipping): fit_guide(model_parallel(*how), clipping) for how in ((1, 2), (2, 1)) for clipping in CLIPPING
    }
    for way, distributed in (("distributed", True), ("full", False)):
        report[way] = fit(folder, model_parallel(1, 2, distributed=distributed), save=folder / way)
        path = folder / way / f"step={STOP}.ckpt"
        report[f"{way}, resumed"] = fit(folder, model_parallel(1, 2, distributed=distributed), ckpt_path=path)
    return report


PARTS = {"two": two, "four": four}

if __name__ == "__main__":
    if len(sys.argv) == 2:  # under torchrun
        torch.set_num_threads(1)
        folder = Path(sys.argv[1])
        torch.save(lightning(folder), folder / f"lightning{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt")
    else:
        main(PARTS, *sys.argv[1:])
