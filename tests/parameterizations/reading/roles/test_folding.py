"""A multiplier folded into weights trains like the multiplier itself, to the round-off of float64 (docs/theory.md section 2)."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mue import HyperSphereOptimizer, ScalingPlan, initialize, param_groups, plan
from lightning_mue.parameterizations import get_rule

STEPS = 12
#: All four multipliers for every optimizer family, and nothing else: only the folding differs between the two runs.
RULE = replace(
    get_rule("sp"),
    name="multipliers-only",
    multipliers={"residual": "L^-1/2", "attention": "k^-1", "ffn": "d A^-1", "route": "A^1/2"},
)
SIZES = {"width": 32, "depth": 4, "hidden": 96, "head_dim": 16}
BASE = {"width": 16, "depth": 2, "hidden": 16, "head_dim": 8}


class Attention(nn.Module):
    def __init__(self, width, head_dim, qk_norm):
        super().__init__()
        self.head_dim, self.scale = head_dim, head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        q, k, v = (
            m(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.output_multiplier, self.route_scale = 1.0, 1.0
        self.active_width = hidden

    def forward(self, x):
        return self.output_multiplier * self.route_scale * self.down_proj(F.gelu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, width, hidden, head_dim, qk_norm):
        super().__init__()
        self.attn, self.mlp = Attention(width, head_dim, qk_norm), MLP(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.residual_multiplier = 1.0

    def forward(self, x):
        x = x + self.residual_multiplier * self.attn(self.norm1(x))
        return x + self.residual_multiplier * self.mlp(self.norm2(x))


class Net(nn.Module):
    """Every matrix with a bias; ``exposed`` decides whether the modules offer their multipliers."""

    def __init__(self, width=32, depth=4, hidden=96, head_dim=16, qk_norm=False, exposed=True):
        super().__init__()
        self.hparams = {
            "width": width,
            "depth": depth,
            "hidden": hidden,
            "head_dim": head_dim,
            "qk_norm": qk_norm,
            "exposed": exposed,
        }
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Layer(width, hidden, head_dim, qk_norm) for _ in range(depth))
        self.head = nn.Linear(width, 20)
        if exposed:
            for layer in self.layers:
                layer.mue_multipliers = {"residual": "residual_multiplier"}
                layer.attn.mue_multipliers = {"attention": "scale"}
                layer.mlp.mue_multipliers = {"ffn": "output_multiplier", "route": "route_scale"}
                layer.mlp.mue_branch = "ffn"

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def losses(model, optimizer):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 20, (4, 9), generator=generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def make_optimizer(family, groups):
    if family == "sphere":
        return HyperSphereOptimizer(groups, compute_dtype=torch.float64)
    if family == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def pair_of_runs(family, qk_norm, spoil=None):
    """Losses with multipliers in the forward pass, and folded, from the same function."""
    # An eps of the size of the gradients, and a decay that matters: they must be folded too.
    settings = {"adam": {"eps": 1e-3}, "sgd": {}, "sphere": {"eps": 1e-3}}[family]
    results: list[torch.Tensor] = []
    first: tuple[Net, ScalingPlan] | None = None
    for exposed in (True, False):
        torch.manual_seed(0)
        model = Net(**SIZES, qk_norm=qk_norm, exposed=exposed)
        scaling = plan(model, base=BASE | {"qk_norm": qk_norm}, rule=RULE, family=family)
        assert bool(scaling.folded) is not exposed
        initialize(model, scaling)
        model.double()
        if first is None:
            first = copy.deepcopy(model), scaling
        else:  # drawn in float32, whose round-off the factor would not survive: take the same draw, times the factor
            drawn, plain = dict(first[0].named_parameters()), first[1]
            for name, p in model.named_parameters():
                value, old = scaling[name].init.value, plain[name].init.value
                p.data = drawn[name].data * (value / old if old else 1.0)
        groups = param_groups(model, scaling, lr=3e-2 if family == "sgd" else 5e-3, weight_decay=0.1, **settings)
        if spoil is not None and not exposed:
            for group in groups:
                group[spoil] *= 1.01
        results.append(losses(model, make_optimizer(family, groups)))
    return results


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("family", ["adam", "sgd", "sphere"])
def test_folded_and_multiplied_runs_have_the_same_losses(family, qk_norm):
    multiplied, folded = pair_of_runs(family, qk_norm)
    assert multiplied[-1] < multiplied[0]
    # 12 steps of a small model amplify the round-off of 1e-16 by some orders; a wrong factor of 1 % shows at 1e-5 and above.
    torch.testing.assert_close(folded, multiplied, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("family", "spoil"), [("adam", "lr"), ("adam", "eps"), ("adam", "weight_decay"), ("sgd", "lr")]
)
def test_a_factor_that_is_off_by_one_percent_shows(family, spoil):
    multiplied, folded = pair_of_runs(family, qk_norm=False, spoil=spoil)
    assert (folded / multiplied - 1).abs().max() > 1e-9
