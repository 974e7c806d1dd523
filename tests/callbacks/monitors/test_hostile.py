"""What foreign models do behind a monitor's back: odd routers, adapters, flat blocks, logits made elsewhere than in the head.

Values are held against float64 of tensors that the models keep themselves.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.zoo_layouts import GPT, Block, FusedAttention, NanoMLP, shifted_loss
from helpers.zoo_models import CAUSAL_SIZES, VOCABULARY, build, tokens
from helpers.zoo_routers import ROUTERS, Gate
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.finding.branches import find_branches
from lightning_mue.callbacks.monitors.finding.heads import find_heads
from lightning_mue.callbacks.monitors.finding.reading import read
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*found nothing to watch")
CLOSE = {"rel": 1e-4, "abs": 1e-6}


class Foreign(LightningModule):
    def __init__(self, model, loss):
        super().__init__()
        self.wrapped, self.loss = model, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.wrapped, tokens())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(toy, model, loss=shifted_loss):
    """Two steps; the monitors by name, and the last values by tag."""
    monitors, logger = [LogitsZMonitor(), ActivationOutlierMonitor(), RouterMonitor()], toy.MemoryLogger()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    toy.make_trainer(monitors, logger).fit(Foreign(model.train(), loss), torch.utils.data.DataLoader(torch.zeros(2, 1)))
    found = {what: finding.names() for m in monitors for what, finding in m.findings.items()}
    return found, {tag: logger.values(tag)[-1] for tag in logger.tags()}


def z_of(logits):
    return logits.detach().double().logsumexp(-1).square().mean().item()


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_however_they_score_and_choose(toy, name):
    torch.manual_seed(0)
    model = ROUTERS[name].make(32, 2, 4)
    found, values = run(toy, model)
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    assert len(found["routers"]) == len(gates) == 2
    assert [n for n in found["residual branches"] if "mlp" in n] == [f"wrapped.transformer.h.{i}.mlp" for i in range(2)]
    for i, gate in enumerate(gates):
        assert values[f"stability/z/router/0{i}"] == pytest.approx(z_of(gate.true_logits), **CLOSE)
        counts, p = gate.true_counts, gate.true_logits.softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean().item()
        assert values[f"routing/token_entropy/0{i}"] == pytest.approx(entropy, **CLOSE)
        if counts is None:  # a load that tokens would have chosen would be made up
            assert f"routing/max_violation/0{i}" not in values
        else:
            assert values[f"routing/max_violation/0{i}"] == pytest.approx((counts.max() / counts.mean() - 1).item())
    scrambled = z_of(gates[0].true_logits.t().reshape(-1, 4))  # the control: rows cut across experts are others
    assert values["stability/z/router/00"] != pytest.approx(scrambled, **CLOSE)


class Adapter(nn.Module):
    """PEFT's LoRA layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, sizes = layer, (layer.in_features, 4, layer.out_features)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(*sizes[:2], bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(*sizes[1:], bias=False)})
        layer.requires_grad_(False)

    def forward(self, x):
        self.kept = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return self.kept


def test_adapters_are_watched_as_the_layers_they_stand_for(toy):
    model = GPT(32, 2, lambda w: Block(w, FusedAttention(w), NanoMLP(w)))
    for block in model.transformer["h"]:
        block.attn.c_attn, block.attn.c_proj = Adapter(block.attn.c_attn), Adapter(block.attn.c_proj)
        block.mlp.c_proj = Adapter(block.mlp.c_proj)
    found, values = run(toy, model)
    ends = [f"wrapped.transformer.h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")]
    assert found["residual branches"] == ends
    assert found["attention logits"] == [f"wrapped.transformer.h.{i}.attn" for i in range(2)]
    for i, block in enumerate(model.transformer["h"]):
        for kind, part in (("attention", block.attn), ("ffn", block.mlp)):
            whole = part.c_proj.kept.detach().double()
            assert values[f"stability/rms/{kind}/0{i}"] == pytest.approx(whole.square().mean().sqrt().item(), **CLOSE)
        assert values[f"stability/z/attention/0{i}"] > 0


class FlatBlock(nn.Module):
    """Holds all of its matrices itself, and attends to one sample and head at a time."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.wq(y), self.wk(y), self.wv(y)
        self.logits = q.detach().double() @ k.detach().double().mT * q.shape[-1] ** -0.5
        rows = [F.scaled_dot_product_attention(*heads) for heads in zip(q, k, v, strict=True)]
        return x + self.wo(torch.stack(rows)) + self.w2(F.gelu(self.w1(y)))


def test_a_block_that_is_its_own_attention(toy):
    model = GPT(32, 2, FlatBlock)
    found, values = run(toy, model)
    assert found["attention logits"] == ["wrapped.transformer.h.0", "wrapped.transformer.h.1"]
    for i, block in enumerate(model.transformer["h"]):
        assert values[f"stability/z/attention/0{i}"] == pytest.approx(z_of(block.logits), **CLOSE)
        assert values[f"stability/max_logit/attention/0{i}"] == pytest.approx(block.logits.max().item(), **CLOSE)


class Tied(nn.Module):
    """Multiplies with its table, in one way or another."""

    def __init__(self, product):
        super().__init__()
        self.body, self.product = GPT(32, 1, lambda w: Block(w, FusedAttention(w), NanoMLP(w))), product
        self.body.lm_head = nn.Identity()

    def forward(self, x):
        self.logits = self.product(self.body(x), self.body.transformer["wte"].weight)
        return self.logits


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.einsum("btd,vd->btv", x, w),
        lambda x, w: torch.einsum("vd,...d->v...", w, x).permute(1, 2, 0),
        lambda x, w: (w @ x.flatten(0, 1).T).T.unflatten(0, x.shape[:2]),
        lambda x, w: x @ w.mT + 0 * (F.one_hot(torch.tensor(1), VOCABULARY).float() @ w).sum(),  # a look-up by hand
    ],
    ids=["einsum", "classes first", "left", "and another product"],
)
def test_products_with_a_table(toy, product):
    model = Tied(product)
    _, values = run(toy, model)
    assert values["stability/z/lm_logits"] == pytest.approx(z_of(model.logits), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        pytest.param("Granite", {"logits_scaling": 4.0}, marks=pytest.mark.slow),
        pytest.param("Cohere", {"logit_scale": 3.0}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_that_the_model_returns(toy, kind, own):
    """Behind the head a model may cap, divide or multiply; a loss sees what comes of it."""
    kept = {}

    def loss(model, batch):
        output = model(input_ids=batch, labels=batch)
        kept["returned"] = output.logits
        return output.loss

    torch.manual_seed(0)
    model = build(kind, "ForCausalLM", **{**CAUSAL_SIZES, **own})
    model.lm_head.register_forward_hook(lambda module, x, y: kept.__setitem__("head", y))
    _, values = run(toy, model, loss)
    assert values["stability/z/lm_logits"] == pytest.approx(z_of(kept["returned"]), **CLOSE)
    assert values["stability/max_logit/lm_logits"] == pytest.approx(kept["returned"].max().item(), **CLOSE)
    assert z_of(kept["head"]) != pytest.approx(z_of(kept["returned"]), **CLOSE)  # the control


@pytest.mark.parametrize(
    ("kind", "head", "expected", "own"),
    [
        ("Electra", "ForMaskedLM", ["generator_lm_head"], {"embedding_size": 16}),  # and no layer in front of it
        ("Albert", "ForMaskedLM", ["predictions.decoder"], {"embedding_size": 16}),
        ("Bert", "ForPreTraining", ["cls.predictions.decoder", "cls.seq_relationship"], {}),
        ("XLM", "WithLMHeadModel", ["pred_layer.proj"], {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_no_projection_is_taken_for_a_head(kind, head, expected, own):
    model = build(kind, head, **{**CAUSAL_SIZES, **own})
    assert find_heads(read(model)).names() == expected


def test_a_norm_in_front_of_the_ffn_is_no_end_of_a_branch():
    """GLM-4 calls it post_attention_layernorm, which elsewhere stands behind the attention."""
    branches = find_branches(read(build("Glm4", "ForCausalLM", **CAUSAL_SIZES)))
    norms = ("post_self_attn_layernorm", "post_mlp_layernorm")
    assert branches.names() == [f"model.layers.{i}.{norm}" for i in range(2) for norm in norms]


def test_a_matrix_of_unknown_role_is_named():
    model = GPT(32, 1, lambda w: Block(w, FusedAttention(w), NanoMLP(w)))
    model.transformer["h"][0].mlp.odd = nn.Parameter(torch.zeros(3, 5, 7))
    assert find_branches(read(model)).missing == ["transformer.h.0.mlp.odd: its role is not known"]
