"""Whole training steps of transformers' own models, with our experts implementation and with the built-in ones.

One step: forward, loss, backward, AdamW (fused), gradients freed. One model of about 100 M parameters runs with every
implementation in turn, on the same batch within a round; no two rounds see the same tokens. Figures are medians over rounds of
ratios within a round. transformers takes grouped_mm where nothing is said. batched_mm copies the weights of every assignment
(of 1024 tokens 14 GB a layer of mixtral in float32), and runs with 64 tokens only.

    python benchmarks/transformers_experts.py [times|losses] [--models mixtral qwen3 gpt_oss] [--dtypes float32 bfloat16]
        [--rounds 3] [--tokens 1024|64]

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

BUILT_IN = ("eager", "grouped_mm", "batched_mm")
VOCAB, LENGTH = 8192, 256
SIZES = {1024: (4, LENGTH), 64: (1, 64)}  # sequences and their length
SHARED = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
}
STEPS = 20
MODELS = ("mixtral", "qwen3", "gpt_oss")


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


def measure(name: str, dtype: torch.dtype, rounds: int, tokens: int, against: Sequence[str]) -> dict[str, object]:
    """One row of the table. The first round does not count."""
    model = build(name, dtype)
    optimizer, names = adamw(model), [register_experts(), *against]
    seconds: dict[str, list[float]] = {each: [] for each in names}
    generator = torch.Generator().manual_seed(1)
    for i in range(rounds + 1):
        ids = torch.randint(VOCAB, SIZES[tokens], generator=generator)
        for each in names if i % 2 else reversed(names):
            model.set_experts_implementation(each)
            start = time.perf_counter()
            step(model, optimizer, ids)
            seconds[each].append(time.perf_counter() - start)
    times = {each: found[1:] for each, found in seconds.items()}
    row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "figure": f"step{of(tokens)}"}
    row["parameters M"] = sum(p.numel() for p in model.parameters()) / 1e6
    ours = times[names[0]]
    row |= {f"{each} / ours": float("nan") for each in BUILT_IN}
    for each in against:
        row[f"{each} / ours"] = statistics.median(a / b for a, b in zip(times[each], ours, strict=True))
    best = [min(times[each][i] for each in against) for i in range(rounds)]
    row["best / ours"] = statistics.median(a / b for a, b in zip(best, ours, strict=True))
    return {**row, "ours ms": 1e3 * statistics.median(ours), "loss difference": float("nan")}


def of(tokens: int) -> str:
    """Words for a size that is not the usual one."""
    return "" if tokens == max(SIZES) else f", {tokens} tokens"


def compare_losses(name: str, dtype: torch.dtype, tokens: int, against: Sequence[str]) -> dict[str, object]:
    """Largest difference of a loss over the steps, to any of some built-in implementations."""
    losses = {}
    for each in (register_experts(), *against):
        model = build(name, dtype)
        model.set_experts_implementation(each)
        optimizer, generator = adamw(model), torch.Generator().manual_seed(1)
        batches = [torch.randint(VOCAB, SIZES[tokens], generator=generator) for _ in range(STEPS)]
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
        "figure": f"{STEPS} losses, {' and '.join(against)}{of(tokens)}",
    }
    return {**row, **nothing, "loss difference": max(differences)}


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """The targets: 1.3 times as fast as the best built-in implementation, equal losses in float32."""
    made = []
    for row in rows:
        kind = f"{row['model']}, {row['dtype']}"
        if str(row["figure"]).startswith("step"):
            speed, size = float(str(row["best / ours"])), str(row["figure"]).removeprefix("step")
            what = f"speed-up of a step over the best built-in experts, {kind}{size}"
            made.append(Claim(what, "at least", 1.3, speed))
        elif row["dtype"] == "float32":
            difference = float(str(row["loss difference"]))
            made.append(Claim(f"largest difference of a loss, {kind}, {row['figure']}", "at most", 1e-4, difference))
    return made


def main() -> None:
    """Run the parts asked for, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("figure", nargs="?", choices=["times", "losses"], default="times")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=max(SIZES), choices=SIZES)
    parser.add_argument("--against", nargs="+", choices=BUILT_IN, help="default: all that fit in memory")
    args = parse(parser)
    against = args.against or (BUILT_IN[:2] if args.tokens == max(SIZES) else BUILT_IN)
    cases = [(name, getattr(torch, dtype)) for name in args.models for dtype in args.dtypes]
    rows = [
        measure(*case, args.rounds, args.tokens, against)
        if args.figure == "times"
        else compare_losses(*case, args.tokens, against)
        for case in cases
    ]
    part = ["model", "dtype", "figure"]
    save(result_name("transformers_experts_cpu"), rows, claims, part=part, strict=args.strict)


if __name__ == "__main__":
    main()
