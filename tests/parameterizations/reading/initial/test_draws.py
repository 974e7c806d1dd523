"""How a base's weights were drawn: recorded while it is built, whatever draws them; else measured on several draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mue import MoELanguageModel, plan
from lightning_mue.parameterizations.reading.initial.draws import DrawRecorder
from lightning_mue.parameterizations.reading.initial.initializer import is_orthogonal, is_uneven, measure_init
from lightning_mue.parameterizations.reading.initial.measuring import measure_build, measure_module, measure_ready

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")


def cut_normal_(tensor, std):
    """A normal distribution cut at 2 std, by the inverse of its distribution function, as timm draws it."""
    low = (1 + math.erf(-2 / 2**0.5)) / 2
    with torch.no_grad():
        return tensor.uniform_(2 * low - 1, 1 - 2 * low).erfinv_().mul_(std * 2**0.5).clamp_(-2 * std, 2 * std)


def empty(draw, *shape):
    tensor = torch.empty(shape)
    draw(tensor)
    return tensor


def stacked(draw):
    weights = torch.empty(3, 8, 4)
    for weight in weights:
        draw(weight)
    return weights


def in_parts(*stds):
    weight = torch.empty(4 * len(stds), 6)
    for part, std in zip(weight.chunk(len(stds)), stds, strict=True):
        part.normal_(0, std)
    return weight


CUT = 0.8796256610342398  # std of a standard normal distribution cut at -2 and 2
DRAWS = {
    "normal": (lambda: empty(lambda w: nn.init.normal_(w, 0, 0.02), 3, 2), "normal", 0.02),
    "scaled afterwards": (lambda: empty(nn.init.normal_, 3, 2).mul_(0.02).div_(8**0.5), "normal", 0.02 / 8**0.5),
    "randn times a number": (lambda: torch.randn(2, 3) * 0.3, "normal", 0.3),
    "a tensor as the factor": (lambda: torch.randn(2, 3) * torch.tensor(0.3), "normal", 0.3),
    "copied": (lambda: torch.empty(2, 3).copy_(torch.randn(2, 3).double() * 0.3), "normal", 0.3),
    "uniform": (lambda: torch.rand(2, 3) - 0.5, "uniform", 12**-0.5),
    "kaiming": (lambda: empty(lambda w: nn.init.kaiming_uniform_(w, a=5**0.5), 3, 16), "uniform", 48**-0.5),
    "xavier": (lambda: empty(nn.init.xavier_normal_, 3, 5), "normal", 0.5),
    "cut far out": (lambda: empty(lambda w: nn.init.trunc_normal_(w, std=0.02), 2, 2), "normal", 0.02),
    "cut at 2": (lambda: empty(nn.init.trunc_normal_, 2, 2), "truncated", CUT),
    "cut at 2, by hand": (lambda: empty(lambda w: cut_normal_(w, 0.1), 2, 2), "truncated", 0.1 * CUT),
    "stack of experts": (lambda: stacked(lambda w: w.normal_(0, 0.2)), "normal", 0.2),
    "parts alike": (lambda: in_parts(0.1, 0.1, 0.1), "normal", 0.1),
    "parts that differ": (lambda: in_parts(0.1, 0.7), "scaled", 0.5),
    "orthogonal": (lambda: empty(nn.init.orthogonal_, 4, 4), "scaled", 0.5),
    "orthogonal stack": (lambda: stacked(nn.init.orthogonal_), "scaled", 8**-0.5),
    "signs": (lambda: torch.bernoulli(torch.full((16, 16), 0.5)) * 2 - 1, "scaled", 1.0),
    "not around zero": (lambda: 1 + 0.5 * torch.randn(4, 4), "scaled", 1.25**0.5),
    "zeros": (lambda: torch.zeros(4, 4), "constant", 0.0),
    "constant": (lambda: torch.full((4,), 0.3).mul_(2), "constant", 0.6),
    "identity": (lambda: torch.eye(4), "keep", 0.0),
    "identity in place": (lambda: empty(nn.init.eye_, 4, 4), "keep", 0.0),
    "identity of a convolution": (lambda: empty(nn.init.dirac_, 4, 4, 3), "keep", 0.0),
    "table of waves": (lambda: (torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1])).sin(), "keep", 0.0),
    "looks normal": (lambda: torch.tensor([[0.3, -0.4], [0.1, -0.2]]), "keep", 0.0),
    "of a state-space model": (lambda: torch.log(torch.arange(1.0, 5)).repeat(3, 1), "keep", 0.0),
    "gains around 1": (lambda: empty(lambda w: nn.init.normal_(w, 1, 0.02), 8), "keep", 0.0),
    "forget gate": (lambda: empty(lambda w: (w.uniform_(-1, 1), w[4:8].fill_(1.0)), 16), "keep", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_small_tensors_are_known_exactly(name):
    make, kind, value = DRAWS[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(make())

    def build(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Model()

    _, inits = measure_build(build)
    # Signs are seen to be drawn, but only their values tell their size.
    assert (inits["w"].kind, inits["w"].value) == (kind, pytest.approx(value, rel=2e-4, abs=1e-12))


def test_draws_that_are_not_seen_are_averaged_over_builds():
    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.w = nn.Parameter(torch.from_numpy(np.random.default_rng(seed).normal(size=(40, 40))) * 0.02)
            self.same = nn.Parameter(torch.from_numpy(np.random.default_rng(0).normal(size=(40, 40))))

    _, inits = measure_build(Model)
    one = float(Model(0).w.detach().square().mean().sqrt())
    assert inits["w"].kind == "normal"
    # 16 builds of 1600 entries: a standard error of 0.44 %.
    assert inits["w"].value == pytest.approx(0.02, rel=3 * 0.0044)
    assert inits["w"].value != one
    assert inits["same"].kind == "keep"  # loaded, as far as can be seen


class Own(nn.Module):
    def __init__(self, width=32, head=None):
        super().__init__()
        self.hparams = {"width": width}
        self.embed, self.norm = nn.Embedding(50, width, padding_idx=2), nn.LayerNorm(width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=0.02)


def test_router_and_head_of_a_few_entries_have_the_std_that_they_were_drawn_with():
    moe = {"context_length": 8, "depth": 1, "n_heads": 4, "n_experts": 8, "top_k": 2}
    for seed in range(3):  # the global seed does not count
        torch.manual_seed(seed)
        made = plan(MoELanguageModel(width=128, router_init_std=0.02, **moe), base={"width": 64}, rule="mup")
        router = next(p for p in made.parameters if p.role == "router")
        assert router.init.value / router.init_factor == pytest.approx(0.02, rel=1e-6)  # 8 x 64
        head = plan(Own(64), base={"width": 32}, rule="mup")["head.weight"]  # 1 x 32
        assert head.init.value == pytest.approx(0.02 / 2, rel=1e-6)


def test_base_that_is_a_module_is_compared_with_another_of_its_class():
    base = Own(32)
    made = plan(Own(64), base=base, rule="mup")
    assert made["head.weight"].init.value == pytest.approx(0.01, rel=1e-6)
    nn.init.normal_(base.head.weight, std=0.5)  # afterwards, by hand: its values count
    made = plan(Own(64), base=base, rule="mup")
    assert made["head.weight"].init.value == pytest.approx(float(base.head.weight.detach().std()) / 2, rel=0.05)
    assert measure_ready(base, lambda seed: 1 / 0)["head.weight"].kind == "normal"


def test_equal_layers_of_a_module_are_measured_together():
    torch.manual_seed(5)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(64))})
    for layer in model["layers"]:
        nn.init.normal_(layer.weight, std=0.3)
    found = {init.value for init in measure_module(model).values()}
    assert len(found) == 1
    assert found.pop() == pytest.approx(0.3, rel=4 / (2 * 64 * 64) ** 0.5)
    for i, layer in enumerate(model["layers"]):
        nn.init.normal_(layer.weight, std=0.3 / (i + 1))  # control: stds that fall with depth stay apart
    assert len({init.value for init in measure_module(model).values()}) == 64


def test_padding_row_does_not_count():
    with DrawRecorder() as recorder:
        embedding = nn.Embedding(5, 4, padding_idx=2)
    assert (recorder.init_of(embedding.weight, 2).kind, recorder.init_of(embedding.weight, 2).value) == ("normal", 1.0)
    assert recorder.init_of(embedding.weight).kind == "scaled"  # control: one row is zero


def test_a_padded_embedding_of_a_module_is_measured_without_its_row():
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(20, 64, padding_idx=3)})
    rows = torch.cat([model["e"].weight[:3], model["e"].weight[4:]])
    assert measure_module(model)["e.weight"].value == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 8), (8, 3), (3, 4, 4), (4, 4, 3, 3)])
def test_orthogonal_matrices_are_recognised_from_values(shape):
    torch.manual_seed(sum(shape))
    w = torch.empty(shape)
    for part in w if len(shape) == 3 else [w]:
        nn.init.orthogonal_(part, gain=0.7)
    assert is_orthogonal(w)
    assert measure_init(w).kind == "scaled"
    assert not is_orthogonal(torch.randn(shape))
    assert not is_orthogonal(torch.randn(1, 8))  # one row always is


def test_uneven_rows_are_told_from_a_draw():
    torch.manual_seed(0)
    for _ in range(50):
        assert not is_uneven(torch.randn(64, 48))
        assert not is_uneven(torch.randn(1000, 16))
    assert is_uneven(torch.randn(64, 48) * torch.logspace(-0.5, 0.5, 64)[:, None])
    assert is_uneven(torch.randn(64, 48) * torch.logspace(-0.5, 0.5, 48))


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        (
            "GPT2",
            {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 20, "n_positions": 8},
            {"attn.c_proj.weight": 0.02 / 6**0.5, "mlp.c_proj.weight": 0.02 / 6**0.5, "attn.c_attn.weight": 0.02},
        ),
        pytest.param(
            "ViT",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            {"mlp.fc1.weight": 0.02, "position_embeddings": 0.02},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "T5",
            {"d_model": 32, "d_ff": 64, "num_layers": 1, "d_kv": 8, "num_heads": 4, "vocab_size": 20},
            {
                "SelfAttention.q.weight": 256**-0.5,
                "SelfAttention.k.weight": 32**-0.5,
                "DenseReluDense.wo.weight": 64**-0.5,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_models_are_known_exactly(kind, sizes, expected):
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with DrawRecorder() as recorder:
        model = getattr(transformers, f"{kind}Model")(config)
    found = {name: recorder.init_of(p) for name, p in model.named_parameters()}
    assert None not in found.values()
    for leaf, std in expected.items():
        inits = [init for name, init in found.items() if name.endswith(leaf)]
        assert inits
        assert all(init.value == pytest.approx(std, rel=1e-4) for init in inits), leaf
