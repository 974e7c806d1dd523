"""Dense, width 64 -> eight experts, width 256: does the FFN branch look the same to the rest of the network?"""

from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW

from lightning_mue import MoELanguageModel, initialize, param_groups, plan

STEPS, LR = 5, 4e-3
BASE = {"width": 64, "n_heads": 2, "n_experts": 0}


def make_model(**sizes):
    return MoELanguageModel(
        context_length=64, depth=2, **{"width": 256, "n_heads": 8, "n_experts": 8, "top_k": 2, **sizes}
    )


def branch_outputs(model, tokens):
    """Output of every FFN branch, before the residual multiplier, [layer][B, S, d]."""
    outputs = []
    handles = [
        block.ffn.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
        for block in model.transformer.blocks
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return outputs


def rms(x):
    return float(x.square().mean().sqrt())


def measure(model, groups, batches):
    """(RMS of the branch outputs at initialization, RMS of their change after some steps), mean over layers."""
    optimizer = AdamW(groups, betas=(0.9, 0.95))
    probe = batches[0][:, :-1]
    before = branch_outputs(model, probe)
    for batch in batches[:STEPS]:
        loss = model.loss({"tokens": batch[:, :-1], "targets": batch[:, 1:]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = branch_outputs(model, probe)
    layers = len(before)
    return sum(map(rms, before)) / layers, sum(rms(b - a) for a, b in zip(before, after, strict=True)) / layers


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(7)
    # A little structure, so that there is something to learn: a noisy repeating pattern of 16 symbols.
    pattern = torch.randint(0, 256, (16,), generator=generator)
    rows = torch.stack(
        [pattern.roll(int(shift)).repeat(5)[:65] for shift in torch.randint(0, 16, (80,), generator=generator)]
    )
    noise = torch.randint(0, 256, rows.shape, generator=generator)
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.2, noise, rows)
    return rows.view(STEPS, -1, 65)


@pytest.fixture(scope="module")
def base_figures(batches):
    figures = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = make_model(**BASE)
        figures.append(measure(model, [{"params": list(model.parameters()), "lr": LR, "weight_decay": 0.1}], batches))
    return [sum(column) / len(column) for column in zip(*figures, strict=True)]


def target_figures(rule, batches, **sizes):
    figures = []
    for seed in range(3):
        model = make_model(**sizes)
        scaling = plan(model, base=BASE, rule=rule)
        initialize(model, scaling, seed=seed)
        groups = param_groups(model, scaling, lr=LR, weight_decay=0.1, eps=1e-8)
        figures.append(measure(model, groups, batches))
    return [sum(column) / len(column) for column in zip(*figures, strict=True)]


@pytest.mark.parametrize(
    "sizes", [{}, {"shared_width": 128, "expert_width": 280}], ids=["routed", "with a shared expert"]
)
def test_complete_mue_keeps_branch_output_and_its_change(batches, base_figures, sizes):
    initial, change = target_figures("complete-mue", batches, **sizes)
    assert initial == pytest.approx(base_figures[0], rel=0.05)
    assert 1 / 1.3 <= change / base_figures[1] <= 1.3


def test_standard_parameterization_does_not(batches, base_figures):
    """The negative control: without scaling, both figures leave the base's by a factor of two at least."""
    initial, change = target_figures("sp", batches)
    assert initial / base_figures[0] >= 2 or initial / base_figures[0] <= 0.5
    assert change / base_figures[1] >= 2
