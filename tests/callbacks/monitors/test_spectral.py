"""SpectralMonitor against decompositions and captured inputs, in float64; on foreign models both monitors of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from callbacks.monitors.test_updates import TIGHT, Witness, expected, language_model, train
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_mue.callbacks import SpectralMonitor, UpdateMonitor


class Foreign(LightningModule):
    """Somebody's model, with somebody's loss of it."""

    def __init__(self, model, loss, batch):
        super().__init__()
        self.model, self.loss, self.batch = model, loss, batch

    def training_step(self, index, batch_idx):
        return self.loss(self.model, self.batch(batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Inputs(Callback):
    """Weights (before the step) of all linear layers, and what went into them, in every batch."""

    def on_train_start(self, trainer, pl_module):
        self.seen, self.weights = [], []
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.Linear):

                def hook(_, args, name=name):
                    self.seen[-1].setdefault(name, args[0].detach().double())

                module.register_forward_pre_hook(hook)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen.append({})
        self.weights.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


def spectrum(weight, x=None):
    _, s, vh = torch.linalg.svd(weight)
    found = {"leading": s[..., 0].max().item(), "stable_rank": (s.square().sum(-1) / s[..., 0].square()).min().item()}
    if x is not None:
        cosine = F.cosine_similarity(x.flatten(0, -2), vh[0].expand(x.flatten(0, -2).shape), dim=-1)
        share = (cosine > 0).double().mean().item()
        found |= {"alignment": cosine.abs().mean().item(), "minority_share": min(share, 1 - share)}
    return found


def entropy(w_q, w_k, head_dim):
    heads, groups = w_q.unflatten(0, (-1, head_dim)), w_k.unflatten(0, (-1, head_dim))
    s = torch.linalg.svdvals(heads.mT @ groups.repeat_interleave(len(heads) // len(groups), 0)).square()
    return torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).mean().item()


def check(logger, label, values, step):
    for metric, value in values.items():
        found = logger.values(f"spectral/{metric}/{label}")[step]
        # Of a float32 iteration; the vector is good to its square root, and cosines near 0 may change sign.
        tolerance = {"abs": 0.05} if metric == "minority_share" else {"rel": 2e-3 if metric == "alignment" else 1e-4}
        assert found == pytest.approx(value, **tolerance), (metric, label, step)


def test_on_our_model_every_matrix_and_every_head(toy):
    model, inputs, logger = language_model(), Inputs(), toy.MemoryLogger()
    kept = []
    attention = model.transformer.blocks[1].attention
    attention.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().double()))
    router_inputs = []
    model.transformer.blocks[0].ffn.router.register_forward_pre_hook(
        lambda _, args: router_inputs.append(args[0].detach().double())
    )
    train(toy, model, [SpectralMonitor(iterations=40), inputs], logger)
    block = "transformer.blocks.1."
    for step in (0, 2):
        w = inputs.weights[step]
        for name in ("w_q", "w_v"):
            check(logger, f"hidden/{block}attention.{name}", spectrum(w[f"{block}attention.{name}"], kept[step]), step)
        check(logger, "expert_down/01", spectrum(w[f"{block}ffn.experts.w_down"]), step)
        check(logger, "router/00", spectrum(w["transformer.blocks.0.ffn.router.weight"], router_inputs[step]), step)
        wanted = entropy(
            w[f"{block}attention.w_q"], w[f"{block}attention.w_k"], model.transformer.blocks[1].attention.head_dim
        )
        assert logger.values("spectral/qk_entropy/hidden/01")[step] == pytest.approx(wanted, rel=1e-4)
        assert wanted < math.log(4) + 1e-9
    assert not [tag for tag in logger.tags() if tag.startswith("spectral/alignment/expert")]
    other = logger.values(f"spectral/alignment/hidden/{block}attention.w_o")[0]
    assert other != pytest.approx(spectrum(inputs.weights[0][f"{block}attention.w_o"], kept[0])["alignment"], rel=1e-2)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def noise(index):
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(index))


def test_transformer_encoder_of_torch(toy):
    torch.manual_seed(0)
    model, inputs = Foreign(encoder(), lambda m, x: (m(x) - x.roll(1, 0)).square().mean(), noise), Inputs()
    witness, logger = Witness(), toy.MemoryLogger()
    train(toy, model, [SpectralMonitor(iterations=40), UpdateMonitor(), inputs, witness], logger)
    names = [f"model.layers.1.self_attn.{x}" for x in ("in_proj_weight", "out_proj.weight")]
    for step in range(3):
        for metric, value in expected(witness, step, names).items():
            assert logger.values(f"updates/{metric}/hidden/01")[step] == pytest.approx(value, **TIGHT), metric
        w, x = inputs.weights[step], inputs.seen[step]
        check(logger, "ffn_up/01", spectrum(w["model.layers.1.linear1.weight"], x["model.layers.1.linear1"]), step)
        packed = w["model.layers.0.self_attn.in_proj_weight"]
        label = "hidden/model.layers.0.self_attn.in_proj"
        check(logger, label, spectrum(packed, noise(step).double()), step)
        found = logger.values("spectral/qk_entropy/hidden/00")[step]
        assert found == pytest.approx(entropy(packed[:16], packed[16:32], 8), rel=1e-4)
        label = "hidden/model.layers.1.self_attn.out_proj"
        check(logger, label, spectrum(w["model.layers.1.self_attn.out_proj.weight"]), step)
    assert logger.values("updates/lr/ffn_up_mean") == pytest.approx([1e-2] * 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "experts", "roles"),
    [
        ("Llama", 0, {"hidden": 4, "ffn_up": 2, "ffn_down": 1}),
        ("Mixtral", 4, {"hidden": 4, "router": 1, "expert_up": 1, "expert_down": 1}),
    ],
)
def test_models_of_transformers(toy, kind, experts, roles):
    from helpers.zoo_models import DENSE, MOE, tokens

    torch.manual_seed(0)
    zoo = {**DENSE, **MOE}[kind]
    model, inputs = Foreign(zoo.make(32, 2, experts), zoo.loss, tokens), Inputs()
    witness, logger = Witness(), toy.MemoryLogger()
    train(toy, model, [SpectralMonitor(iterations=40), UpdateMonitor(), inputs, witness], logger)
    by_role = {
        "hidden": [f"model.model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"],
        "embedding": ["model.model.embed_tokens.weight"],
    }
    for step in range(3):
        for role, names in by_role.items():
            label = f"{role}/01" if role == "hidden" else "embedding/model.model.embed_tokens"
            for metric, value in expected(witness, step, names).items():
                assert logger.values(f"updates/{metric}/{label}")[step] == pytest.approx(value, **TIGHT), metric
        w, x = inputs.weights[step], inputs.seen[step]
        name = "model.model.layers.0.self_attn.q_proj"
        check(logger, f"hidden/{name}", spectrum(w[f"{name}.weight"], x[name]), step)
        keys = w["model.model.layers.0.self_attn.k_proj.weight"]
        found = logger.values("spectral/qk_entropy/hidden/00")[step]
        assert found == pytest.approx(entropy(w[f"{name}.weight"], keys, 8), rel=1e-4)
    for role, count in roles.items():
        tags = [tag for tag in logger.tags() if tag.startswith(f"spectral/leading/{role}/")]
        assert len(tags) == 2 * count, tags
        assert f"updates/update_ratio/{role}_max" in logger.tags()
    assert not [tag for tag in logger.tags() if "/other" in tag]
