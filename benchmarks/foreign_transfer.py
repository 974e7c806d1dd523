"""Does the best learning rate stay, from a small base to a larger target, in models that declare little or nothing?

Three figures, each a sweep of the peak rate at base and target, with and without the plan (standard parameterization, ``sp``):

* ``mingpt``: a plain GPT written as such code usually is, width 32 -> 160 and depth 2 -> 6, under ``complete-p``.
* ``experts``: a dense FFN -> eight experts in a ModuleList, width 32 -> 64, under ``complete-mue``.
* ``tied``: `MoELanguageModel` with tied embeddings, width 64 -> 512, under ``complete-p``.

Text: Python's standard library as bytes. A seed fixes the data and the draw of all rates of a model, so that rates are compared in
pairs. The loss is the mean over the last fifth of the steps; ``noise`` is the standard error, over seeds, of the difference to the
best rate. Run as ``python benchmarks/foreign_transfer.py``; ``--quick`` is for tests.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor, nn

from lightning_mue import MoELanguageModel, initialize, param_groups, plan

VOCABULARY, LENGTH = 256, 32


class SelfAttention(nn.Module):
    """Causal attention with fused queries, keys and values."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd), n_head

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(n_embd, hidden), nn.Linear(hidden, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Experts(nn.Module):
    """Top-k experts in a list, gates normalized over the chosen ones."""

    def __init__(self, n_embd: int, hidden: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(n_embd, n_experts, bias=False), top_k
        self.experts = nn.ModuleList(Mlp(n_embd, hidden) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        values, chosen = self.router(x).topk(self.top_k)
        gates = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], len(self.experts))
        gates = gates.scatter(-1, chosen, values.softmax(-1))
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Block(nn.Module):
    """A pre-norm block, dense or with experts."""

    def __init__(self, n_embd: int, n_head: int, n_experts: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd), SelfAttention(n_embd, n_head)
        self.mlp = Experts(n_embd, 2 * n_embd, n_experts, 2) if n_experts else Mlp(n_embd, 4 * n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """Heads of 16; an FFN of four widths, or experts of two of which two are active."""

    def __init__(self, n_embd: int = 32, n_layer: int = 2, n_experts: int = 0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, n_embd), nn.Embedding(LENGTH, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_embd // 16, n_experts) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(
                    module.weight, std=0.02 if isinstance(module, nn.Embedding) else module.weight.shape[1] ** -0.5
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class SizedGpt(Gpt):
    """Declares its sizes, so that layers of a list of experts are not counted as depth."""

    def mue_axes(self) -> dict[str, float]:
        """Its sizes."""
        width, moe = self.wte.weight.shape[1], isinstance(self.h[0].mlp, Experts)
        sizes = {"n_experts": len(self.h[0].mlp.experts), "top_k": 2} if moe else {"n_experts": 1, "top_k": 1}  # type: ignore[union-attr,arg-type]
        hidden = 2 * width if moe else 4 * width
        return {"width": width, "depth": len(self.h), "ffn_width": 4 * width, "expert_width": hidden, "head_dim": 16,
                "active_width": 4 * width, **sizes}  # fmt: skip


def tied(width: int) -> MoELanguageModel:
    """The package's own model with tied embeddings, heads of 32."""
    return MoELanguageModel(VOCABULARY, LENGTH, width, 2, width // 32, tie_embeddings=True, unembedding_std=0.1)


def text() -> Tensor:
    """The standard library's top-level sources as bytes, int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def batches(data: Tensor, steps: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Yields [rows, LENGTH + 1] random windows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - LENGTH - 1, (rows,), generator=generator)
        yield torch.stack([data[i : i + LENGTH + 1] for i in starts.tolist()])


def train(
    make: Callable[[], nn.Module], base: Callable[[], nn.Module], rule: str, lr: float, seed: int, steps: int
) -> float:
    """Mean loss over the last fifth of the steps, in nats; linear warm-up over a tenth and decay to a tenth of the rate."""
    torch.manual_seed(seed)
    model = make()
    groups = [{"params": list(model.parameters()), "lr": lr}]
    if rule != "sp":
        scaling = plan(model, base=base, rule=rule)
        initialize(model, scaling, seed=seed)
        groups = param_groups(model, scaling, lr=lr, weight_decay=0.0, eps=1e-10)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-10)
    peaks, losses = [group["lr"] for group in optimizer.param_groups], []
    for step, batch in enumerate(batches(DATA, steps, 8, seed)):
        factor = min((step + 1) / (0.1 * steps), 1 - 0.9 * max(0.0, step / steps - 0.1) / 0.9)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()
        losses.append(loss.item() if math.isfinite(loss.item()) else 99.0)
    return statistics.mean(losses[-max(1, steps // 5) :])


#: Figure -> (rule, base, target, rates, steps).
FIGURES: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], nn.Module], list[float], int]] = {
    "mingpt": ("complete-p", Gpt, lambda: Gpt(160, 6), [0.001, 0.0025, 0.00625, 0.0156, 0.039], 60),
    "experts": ("complete-mue", SizedGpt, lambda: SizedGpt(64, 2, 8), [0.001, 0.0025, 0.00625, 0.0156, 0.039], 80),
    "tied": ("complete-p", lambda: tied(64), lambda: tied(512), [0.004, 0.0125, 0.04, 0.125], 50),
}


def sweep(name: str, seeds: int, steps: int | None) -> list[dict[str, object]]:
    """One row for each model of a figure: losses by rate, the best rate, the noise, and whether it is the base's."""
    rule, base, target, rates, length = FIGURES[name]
    rows: list[dict[str, object]] = []
    for label, make, used in (("base", base, "sp"), ("target", target, rule), ("target, control", target, "sp")):
        found = [[train(make, base, used, lr, seed, steps or length) for seed in range(seeds)] for lr in rates]
        means = [statistics.mean(values) for values in found]
        best = means.index(min(means))
        noise = [
            statistics.stdev(a - b for a, b in zip(values, found[best], strict=True)) / seeds**0.5
            if seeds > 1
            else math.nan
            for values in found
        ]
        rows.append(
            {
                "figure": name,
                "model": label,
                "rule": used,
                "best rate": rates[best],
                "index": best,
                "same as base": best == (rows[0]["index"] if rows else best),
                "losses": [round(value, 4) for value in means],
                "noise": [round(value, 4) if seeds > 1 else None for value in noise],
                "seeds": seeds,
            }
        )
        print(rows[-1], flush=True)
    return rows


DATA = text()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", choices=list(FIGURES), help="one figure only")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps, one seed, nothing saved")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.figure] if options.figure else list(FIGURES)
    found = [
        row
        for name in names
        for row in sweep(name, 1 if options.quick else options.seeds, 2 if options.quick else None)
    ]
    if not options.quick:
        save("foreign_transfer" + (f"_{options.figure}" if options.figure else ""), found)
