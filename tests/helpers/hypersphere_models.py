"""A small mixture of experts for the tests of HyperSphereOptimizer on several processes, and how it is trained.

Shape legend:
    E  experts of a stack      T  tokens      d, h, v  width, hidden width, vocabulary
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lightning_mue.optim import HyperSphereOptimizer


class Experts(nn.Module):
    """A mixture of five experts; a token's number selects its expert, so an expert may get none in a batch."""

    def __init__(self, count=5, d=12, h=8):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, h, d) / d**0.5)
        self.down = nn.Parameter(torch.randn(count, d, h) / h**0.5)

    def forward(self, x_Td, tokens_T):
        share_TE = nn.functional.one_hot(tokens_T % len(self.up), len(self.up)).to(x_Td)
        y_TEh = torch.tanh(torch.einsum("td,ehd->teh", x_Td, self.up))
        return torch.einsum("teh,edh,te->td", y_TEh, self.down, share_TE)


class Model(nn.Module):
    """Embedding, a narrow layer of five rows, experts, norm and head."""

    def __init__(self, v=11, d=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(v, d)
        self.narrow = nn.Linear(d, 5, bias=False)
        self.widen = nn.Linear(5, d, bias=False)
        self.experts = Experts(d=d)
        self.norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, v, bias=False)

    def forward(self, tokens_T):
        x_Td = self.embedding(tokens_T)
        x_Td = x_Td + self.widen(torch.tanh(self.narrow(x_Td)))
        return self.lm_head(self.norm(x_Td + self.experts(x_Td, tokens_T)))


def batch(step, rank, world):
    """This rank's share of 24 tokens; at every other step expert 1 gets none."""
    tokens_T = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(step))
    if step % 2:
        tokens_T[tokens_T % 5 == 1] = 0
    return tokens_T.chunk(world)[rank]


def fit(model, optimizer, steps, rank=0, world=1):
    for step in steps:
        tokens_T = batch(step, rank, world)
        nn.functional.cross_entropy(model(tokens_T), (tokens_T * 3 + 1) % 11).backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model, **options):
    return HyperSphereOptimizer(model.named_parameters(), **{"lr": 0.02, "compute_dtype": "float32", **options})


def shard(model, how="rows"):
    """FSDP2, the experts and the rest apart; HSDP on four ranks: two replicas of two shards."""
    world = dist.get_world_size()
    sizes = {"replicas": 2, "shards": world // 2} if how == "hsdp" else {"shards": world}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    # Other dimensions than the first must divide.
    columns = lambda p: Shard(p.ndim - 1 if p.shape[-1] % world == 0 else 0)  # noqa: E731
    for module in (model.experts, model):
        fully_shard(module, mesh=mesh, shard_placement_fn=columns if how == "columns" else None)
    return model
