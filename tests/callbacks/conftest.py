"""A small model with every kind of module that the monitors watch, and a logger that remembers.

The model keeps what its modules computed by itself (`seen`), without hooks, so that tests can compute each metric from
the same tensors by another way. Shape legend: B batch, S positions, d width, E experts, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F

WIDTH, EXPERTS, VOCABULARY = 8, 4, 11


class Core(nn.Module):
    mue_attention_core = True

    def __init__(self):
        super().__init__()
        self.scale = 0.5

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)


class Attention(nn.Module):
    mue_branch = "attention"

    def __init__(self):
        super().__init__()
        self.w_q, self.w_kv = nn.Linear(WIDTH, 4 * 4, bias=False), nn.Linear(WIDTH, 2 * 2 * 4, bias=False)
        self.w_o, self.core = nn.Linear(4 * 4, WIDTH, bias=False), Core()

    def forward(self, x_BSd, keep):
        q = self.w_q(x_BSd).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.w_kv(x_BSd).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        keep("q", q)
        keep("k", k)
        return self.w_o(self.core(q, k, v).transpose(1, 2).flatten(2))


class Router(nn.Module):
    mue_router = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x_Td):
        logits_TE = (x_Td @ self.weight.t()).float()
        expert_ids = logits_TE.topk(1, dim=-1).indices
        return SimpleNamespace(
            logits=logits_TE,
            gates=logits_TE.softmax(-1).gather(1, expert_ids),
            expert_ids=expert_ids,
            counts=torch.bincount(expert_ids.flatten(), minlength=EXPERTS),
        )


class MixtureOfExperts(nn.Module):
    mue_branch = "ffn"

    def __init__(self):
        super().__init__()
        self.router, self.w = Router(), nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH)

    def forward(self, x_BSd, keep):
        x_Td = x_BSd.flatten(0, 1)
        routing = self.router(x_Td)
        keep("router_logits", routing.logits)
        keep("counts", routing.counts)
        y_Td = torch.einsum("td,tde->te", x_Td, self.w[routing.expert_ids[:, 0]]) * routing.gates
        return y_Td.unflatten(0, x_BSd.shape[:2])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.ffn = Attention(), MixtureOfExperts()

    def forward(self, x_BSd, keep):
        branch = self.attention(x_BSd, keep)
        keep("attention", branch)
        x_BSd = x_BSd + branch
        branch = self.ffn(x_BSd, keep)
        keep("ffn", branch)
        return x_BSd + branch


class ToyModel(LightningModule):
    """Trains on integer tokens [B, S]; `seen[kind][batch]` holds one tensor a layer (and a forward pass)."""

    def __init__(self, passes=1):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.passes = passes
        self.seen = defaultdict(list)
        self.hooks_in_training, self.hooks_in_validation = [], []

    def keep(self, kind, tensor):
        if self.training:
            self.seen[kind][-1].append(tensor.detach().clone())

    def forward(self, tokens_BS):
        x_BSd = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSd = block(x_BSd, self.keep)
        logits = self.lm_head(x_BSd)
        self.keep("lm_logits", logits)
        return logits

    def loss(self, tokens_BS):
        for kind in ("q", "k", "attention", "router_logits", "counts", "ffn", "lm_logits"):
            self.seen[kind].append([])
        losses = [
            F.cross_entropy(self(tokens_BS)[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
            for _ in range(self.passes)
        ]
        return sum(losses)

    def training_step(self, tokens_BS, batch_idx):
        self.hooks_in_training.append(n_hooks(self))
        loss = self.loss(tokens_BS)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ValidatedToyModel(ToyModel):
    def validation_step(self, tokens_BS, batch_idx):
        self.hooks_in_validation.append(n_hooks(self))
        self.log("val/loss", F.cross_entropy(self(tokens_BS).flatten(0, 1), tokens_BS.flatten()))


class MemoryLogger(Logger):
    """Keeps (step, metrics) in order."""

    def __init__(self):
        super().__init__()
        self.records = []

    name, version = "memory", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.records.append((step, dict(metrics)))

    def steps(self, tag):
        return [step for step, metrics in self.records if tag in metrics]

    def values(self, tag):
        return [metrics[tag] for _, metrics in self.records if tag in metrics]

    def tags(self):
        return sorted({tag for _, metrics in self.records for tag in metrics})


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def tokens(n_batches=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, VOCABULARY, (n_batches * 2, 5), generator=generator)
    return torch.utils.data.DataLoader(data, batch_size=2)


def make_trainer(callbacks, logger, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=callbacks, logger=logger, **{**defaults, **options})


def make_model(seed=0, cls=ToyModel, **options):
    torch.manual_seed(seed)
    return cls(**options)


def fit(callbacks, *, model=None, n_batches=6, logger=None, **options):
    """Train a toy model; return it and the MemoryLogger."""
    model = model or make_model()
    logger = MemoryLogger() if logger is None else logger
    make_trainer(callbacks, logger, **options).fit(model, tokens(n_batches))
    return model, logger


@pytest.fixture
def toy():
    return SimpleNamespace(
        ToyModel=ToyModel,
        ValidatedToyModel=ValidatedToyModel,
        MemoryLogger=MemoryLogger,
        make_model=make_model,
        make_trainer=make_trainer,
        tokens=tokens,
        fit=fit,
        n_hooks=n_hooks,
    )
