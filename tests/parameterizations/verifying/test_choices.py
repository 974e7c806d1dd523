"""A token that changes its expert in a step is no measure of the step, in routers that choose by kernels of their own, too."""

from __future__ import annotations

import torch
from torch import nn

from lightning_mue import MoELayer
from lightning_mue.parameterizations.verifying.measuring import measure


class Shifted(nn.Module):
    """A layer whose bias decides, for the first token alone, between two experts."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.moe = MoELayer(4, 8, 2, top_k=1, scoring="softmax-topk", balance="none", init_std=1.0)
        with torch.no_grad():
            self.moe.router.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))

    def forward(self, x):
        return x + self.moe(x + self.bias)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Shifted()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step(model):
    with torch.no_grad():
        model.blocks[0].bias[0] -= 1e-4


def test_the_step_of_a_bias_is_small_though_a_token_jumps():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(1, 16, 4)
    x[..., 0] = x[..., 0].sign()
    x[0, 0, 0] = 1e-6
    before = net.blocks[0].moe.router(x[0]).expert_ids
    found = measure(net, lambda model, batch: model(batch).square().mean(), x, step)
    step(net)
    after = net.blocks[0].moe.router((x + net.blocks[0].bias)[0]).expert_ids
    assert (before != after).flatten().nonzero().flatten().tolist() == [0]
    assert 1e-6 < found.values["update", "blocks.*.bias"] < 1e-3  # 0.1 and more with the jump
