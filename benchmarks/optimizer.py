"""HyperSphereOptimizer's step on CPU against the peers' Muon: the same matrices, the same gradients, one process.

torch.optim.Muon takes no stacks, so it gets the experts as single matrices, as its users have to store them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import pytorch_optimizer
import torch
from common import Claim, alternate, isa, parse, ratio, result_name, save

from lightning_mue.optim import HyperSphereOptimizer

SETS = {
    "12 layers (512, SwiGLU 1408)": [(512, 512)] * 48 + [(1408, 512)] * 24 + [(512, 1408)] * 12,
    "experts 2x3x(64, 256, 512)": [(64, 256, 512)] * 6,
    "tiny experts 2x3x(64, 64, 256)": [(64, 64, 256)] * 6,
}
#: Parts of the sets, for processors on which a peer's bfloat16 step of a whole one takes minutes.
PARTS = {
    "2 matrices of 12 layers (512, SwiGLU 1408)": [(512, 512), (1408, 512)],
    "4 experts (256, 512)": [(4, 256, 512)],
    "64 tiny experts (64, 256)": [(64, 64, 256)],
}


def tensors(shapes: Iterable[tuple[int, ...]], stacks: bool) -> list[torch.nn.Parameter]:
    """Weights with gradients, the same at every call; without stacks every expert is a parameter."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        weight, grad = torch.randn(shape) * 0.02, torch.randn(shape)
        pairs = [(t,) if stacks else t.view(-1, *shape[-2:]) for t in (weight, grad)]
        for w, g in zip(*pairs, strict=True):
            params.append(torch.nn.Parameter(w.clone()))
            params[-1].grad = g.clone()
    return params


def contenders(shapes: list[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers, each on its own weights; the rate is so small that the weights keep their size."""
    rate = 1e-6

    def ours(**options: object) -> torch.optim.Optimizer:
        kind = "sphere" if options.pop("sphere", True) else "muon"
        return HyperSphereOptimizer([{"params": tensors(shapes, True), "kind": kind}], lr=rate, **options)

    def peer(**options: object) -> torch.optim.Optimizer:
        groups = [{"params": tensors(shapes, False), "use_muon": True}]
        return pytorch_optimizer.Muon(groups, lr=rate, **options)

    return {
        "sphere": ours(),
        "muon": ours(sphere=False),
        "sphere float32": ours(compute_dtype="float32"),
        "torch.optim.Muon": torch.optim.Muon(tensors(shapes, False), lr=rate, weight_decay=0.0),
        "pytorch_optimizer.Muon": peer(),
        "AdamW": torch.optim.AdamW(tensors(shapes, True), lr=rate, fused=True),
    }


#: What the step should be, over torch.optim.Muon and over pytorch_optimizer's, by the processor's instructions; elsewhere 1.
TARGETS = {
    "amx": [(1.6, 1.15), (2.2, 1.0), (6.7, 1.0)],
    "avx512bf16": [(1.5, 1.15), (1.9, 1.0), (6.0, 1.0)],
}


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """Never slower than a peer; with two threads or more, faster by what the instructions allow."""
    made = []
    best = TARGETS.get(isa(), []) if int(str(rows[0]["threads"])) > 1 else []
    targets = dict(zip(SETS, best, strict=False))
    for row in rows:
        over_torch, over_other = targets.get(str(row["set"]), (1.0, 1.0))
        what = f"speed-up over torch.optim.Muon, {row['set']}"
        made.append(Claim(what, "at least", over_torch, row["speed-up over torch.optim.Muon"]))
        what = f"speed-up over pytorch_optimizer.Muon, {row['set']}"
        made.append(Claim(what, "at least", over_other, row["over pytorch_optimizer.Muon"]))
        made.append(Claim(f"time of sphere over muon, {row['set']}", "at most", 1.05, row["sphere / muon"]))
    return made


def main() -> None:
    """Runs all sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument(
        "--parts", action="store_true", help="parts of the sets: minutes less where bfloat16 is emulated"
    )
    args = parse(parser)
    rows = []
    for name, shapes in (PARTS if args.parts else SETS).items():
        optimizers = contenders(shapes)
        steps: dict[str, Callable[[], object]] = {key: value.step for key, value in optimizers.items()}
        seconds = alternate(steps, args.rounds)
        memory = optimizers["sphere"].memory()
        rows.append(
            {
                "set": name,
                "speed-up over torch.optim.Muon": ratio(seconds, "torch.optim.Muon", "sphere"),
                "over pytorch_optimizer.Muon": ratio(seconds, "pytorch_optimizer.Muon", "sphere"),
                "sphere / muon": ratio(seconds, "sphere", "muon"),
                "float32 / bfloat16": ratio(seconds, "sphere float32", "sphere"),
                "step / AdamW's": ratio(seconds, "sphere", "AdamW"),
                "momentum bytes / weights": memory["momentum"] / sum(4 * torch.Size(s).numel() for s in shapes),
                "scratch MiB": memory["scratch"] / 2**20,
            }
        )
    save(result_name("optimizer_cpu"), rows, claims, part=["set"], strict=args.strict)


if __name__ == "__main__":
    main()
