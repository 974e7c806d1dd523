"""Whole training steps of transformers' own models, with our experts implementation and with the built-in ones.

One step: forward, loss, backward, AdamW (fused), gradients freed. One model of about 100 M parameters runs with every
implementation in turn, on the same batch within a round; no two rounds see the same tokens. Figures are medians over rounds of
ratios within a round. batched_mm is not run: it copies the weights of every assignment (10 and 6 GB a layer here).

    python benchmarks/transformers_experts.py [times|losses] [--models mixtral qwen3] [--dtypes float32 bfloat16] [--rounds 3]

"losses" trains a model 20 steps with each implementation, from the same seed on the same batches, and compares the losses.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence

import torch
from common import Claim, parse, result_name, save
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_mue import register_experts

BUILT_IN = ("eager", "grouped_mm")
VOCAB, BATCH, LENGTH = 8192, 4, 256
SHARED = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
}
STEPS = 20


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """mixtral: 8 experts of width 1152, 2 a token. qwen3: 64 of width 128, 8 a token. gpt_oss: 32 of width 512, 4 a token."""
    torch.manual_seed(0)
    if name == "mixtral":
        sizes = {"num_hidden_layers": 6, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1152}
        return MixtralForCausalLM(MixtralConfig(**SHARED, **sizes)).to(dtype)
    if name == "gpt_oss":
        sizes = {"num_hidden_layers": 4, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 512}
        return GptOssForCausalLM(GptOssConfig(**SHARED, **sizes, head_dim=64)).to(dtype)
    sizes = {"num_hidden_layers": 7, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 128}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHARED, **sizes, head_dim=64)).to(dtype)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """The loss, after one step."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    """As most people use it."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)


def measure(name: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """One row of the table. The first round does not count."""
    model = build(name, dtype)
    optimizer, names = adamw(model), [register_experts(), *BUILT_IN]
    seconds: dict[str, list[float]] = {each: [] for each in names}
    generator = torch.Generator().manual_seed(1)
    for i in range(rounds + 1):
        ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        for each in names if i % 2 else reversed(names):
            model.set_experts_implementation(each)
            start = time.perf_counter()
            step(model, optimizer, ids)
            seconds[each].append(time.perf_counter() - start)
    times = {each: found[1:] for each, found in seconds.items()}
    row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "figure": "step"}
    row["parameters M"] = sum(p.numel() for p in model.parameters()) / 1e6
    ours = times[names[0]]
    for each in BUILT_IN:
        row[f"{each} / ours"] = statistics.median(a / b for a, b in zip(times[each], ours, strict=True))
    best = [min(times[each][i] for each in BUILT_IN) for i in range(rounds)]
    row["best / ours"] = statistics.median(a / b for a, b in zip(best, ours, strict=True))
    return {**row, "ours ms": 1e3 * statistics.median(ours), "loss difference": float("nan")}


def compare_losses(name: str, dtype: torch.dtype, against: Sequence[str]) -> dict[str, object]:
    """Largest difference of a loss over the steps, to any of some built-in implementations."""
    losses = {}
    for each in (register_experts(), *against):
        model = build(name, dtype)
        model.set_experts_implementation(each)
        optimizer, generator = adamw(model), torch.Generator().manual_seed(1)
        batches = [torch.randint(VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(STEPS)]
        losses[each] = [step(model, optimizer, ids) for ids in batches]
        print(each, [round(loss, 5) for loss in losses[each]], flush=True)
        del model, optimizer
        gc.collect()
    ours, *others = losses.values()
    differences = [max(abs(a - b) for a, b in zip(ours, other, strict=True)) for other in others]
    nothing = dict.fromkeys(("parameters M", *(f"{each} / ours" for each in BUILT_IN), "best / ours", "ours ms"), None)
    row = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "figure": f"{STEPS} losses, {' and '.join(against)}",
    }
    return {**row, **nothing, "loss difference": max(differences)}


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """The targets: 1.3 times as fast as the best built-in implementation, equal losses in float32."""
    made = []
    for row in rows:
        kind = f"{row['model']}, {row['dtype']}"
        if row["figure"] == "step":
            speed = float(str(row["best / ours"]))
            made.append(Claim(f"speed-up of a step over the best built-in experts, {kind}", "at least", 1.3, speed))
        elif row["dtype"] == "float32":
            difference = float(str(row["loss difference"]))
            made.append(Claim(f"largest difference of a loss, {kind}, {row['figure']}", "at most", 1e-4, difference))
    return made


def main() -> None:
    """Run the parts asked for, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("figure", nargs="?", choices=["times", "losses"], default="times")
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen3"], choices=["mixtral", "qwen3"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", nargs="+", default=BUILT_IN, choices=BUILT_IN, help="of losses")
    args = parse(parser)
    cases = [(name, getattr(torch, dtype)) for name in args.models for dtype in args.dtypes]
    rows = [
        measure(*case, args.rounds) if args.figure == "times" else compare_losses(*case, args.against) for case in cases
    ]
    part = ["model", "dtype", "figure"]
    save(result_name("transformers_experts_cpu"), rows, claims, part=part, strict=args.strict)


if __name__ == "__main__":
    main()
