"""Every metric with random uneven batches and its definition in float64, over all of them at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lightning_mue import metrics

#: Tokens of the batches; the second holds nothing.
SIZES = (3, 0, 40, 17)
E = 5


def heavy(n, seed):
    """Activations [n, 2, 30] with outliers and a mean; each batch has its own scale."""
    x = torch.randn(n, 2, 30, generator=torch.Generator().manual_seed(seed))
    return (x.sign() * x.abs() ** 3 * (1 + seed) + 0.5,)


def logits(n, seed):
    return (3 * torch.randn(n, 2, E, generator=torch.Generator().manual_seed(seed)) + seed,)


def counts(n, seed):
    """Assignments of n tokens; the last expert gets none."""
    ids = torch.randint(E - 1 if seed else 1, (n,), generator=torch.Generator().manual_seed(seed))
    return (torch.bincount(ids, minlength=E),)


def queries(n, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = 2 * torch.randn(n, 4, 6, 8, generator=generator), 2 * torch.randn(n, 2, 6, 8, generator=generator)
    return *heads, 0.2


def predictions(n, seed):
    """Logits and targets, of which more are not scored the later the batch is."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(9, (n, 4), generator=generator)
    targets[torch.rand(n, 4, generator=generator) < seed / 5] = -100
    return (2 + seed) * torch.randn(n, 4, 9, generator=generator), targets


def whole(batches):
    return [torch.cat(parts).double() for parts in zip(*batches, strict=True)]


def outliers(batches, threshold):
    (x,) = whole(batches)
    distance = (x - x.mean(-1, keepdim=True)).abs() / x.var(-1, correction=0, keepdim=True).sqrt()
    return 100 * (distance > threshold).double().mean()


def kurtosis(batches):
    (x,) = whole(batches)
    return (x - x.mean()).pow(4).mean() / x.var(correction=0) ** 2


def load(batches):
    return torch.stack([batch[0] for batch in batches]).sum(0).double()


def entropy(p):
    return torch.special.entr(p).sum(-1)


def attention(batches):
    q, k = whole([batch[:2] for batch in batches])
    x = 0.2 * q @ k.repeat_interleave(2, 1).mT
    return x.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).logsumexp(-1).square().mean()


def nats(batches):
    x, targets = whole(batches)
    return F.cross_entropy(x.flatten(0, 1), targets.long().flatten())


#: Name -> (constructor, draw(n, seed) of one batch, definition of all batches together).
CASES = {
    "ZValue": (metrics.ZValue, logits, lambda b: whole(b)[0].logsumexp(-1).square().mean()),
    "AttentionZValue": (metrics.AttentionZValue, queries, attention),
    "RouterEntropy": (metrics.RouterEntropy, logits, lambda b: entropy(whole(b)[0].softmax(-1)).mean()),
    "OutputRMS": (metrics.OutputRMS, heavy, lambda b: whole(b)[0].square().mean().sqrt()),
    "OutlierPercent": (lambda **k: metrics.OutlierPercent(threshold=2.5, **k), heavy, lambda b: outliers(b, 2.5)),
    "MaxOverRMS": (metrics.MaxOverRMS, heavy, lambda b: whole(b)[0].abs().max() / whole(b)[0].square().mean().sqrt()),
    "Kurtosis": (metrics.Kurtosis, heavy, kurtosis),
    "MaxViolation": (lambda **k: metrics.MaxViolation(E, **k), counts, lambda b: load(b).max() / load(b).mean() - 1),
    "LoadEntropy": (lambda **k: metrics.LoadEntropy(E, **k), counts, lambda b: entropy(load(b) / load(b).sum())),
    "LoadMaxFraction": (lambda **k: metrics.LoadMaxFraction(E, **k), counts, lambda b: load(b).max() / load(b).sum()),
    "DeadExperts": (lambda **k: metrics.DeadExperts(E, **k), counts, lambda b: (load(b) == 0).sum().double()),
    "CrossEntropy": (metrics.CrossEntropy, predictions, nats),
    "Perplexity": (metrics.Perplexity, predictions, lambda b: nats(b).exp()),
    "BitsPerByte": (lambda **k: metrics.BitsPerByte(3.5, **k), predictions, lambda b: nats(b) / math.log(2) / 3.5),
}


def batches_of(draw):
    return [draw(n, seed) for seed, n in enumerate(SIZES)]
