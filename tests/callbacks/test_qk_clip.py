"""QKClip bounds the logits of each head by its own factor, and the sphere keeps what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.processes import launch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_mue import HyperSphereOptimizer, QKClip
from lightning_mue.diagnostics.zvalue import attention_max_logits
from lightning_mue.models.transformer import Attention, RotaryEmbedding


class Model(LightningModule):
    """One attention; `lr` zero, so that only the clip moves weights."""

    def __init__(self, attention, optimizer):
        super().__init__()
        self.attention, self.make = attention, optimizer
        self.rotary = RotaryEmbedding(4, 6)

    def training_step(self, x):
        if isinstance(self.attention, nn.MultiheadAttention):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.attention(x, x, x, attn_mask=mask, is_causal=True)[0].square().mean()
        return self.attention(x, self.rotary).square().mean()

    def configure_optimizers(self):
        return self.make(self.named_parameters())


def attention(n_kv=4, qk_norm=False):
    torch.manual_seed(0)
    return Attention(16, 4, n_kv, 4, qk_norm=qk_norm, scale=0.5, init_std=None)


def sphere(lr=0.0, **options):
    return lambda named: HyperSphereOptimizer(named, lr=lr, compute_dtype="float32", **options)


def fit(module, clip, batches=1, **more):
    data = [torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7)) for _ in range(batches)]
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        **more,
    }
    trainer = Trainer(max_epochs=1, callbacks=[clip], enable_model_summary=False, log_every_n_steps=1, **options)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer, data[0]


def heads(module, x):
    """Largest logits by the whole matrix, in float64."""
    a = module.attention
    if isinstance(a, nn.MultiheadAttention):
        d = a.embed_dim
        q, k = (
            x.double() @ a.in_proj_weight.double()[i : i + d].T + a.in_proj_bias.double()[i : i + d] for i in (0, d)
        )
        q, k, scale = (y.unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for y in (q, k)), None, a.head_dim**-0.5
        q, k = q
    else:
        q, k = ((x @ w.T).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (a.w_q, a.w_k))
        q, k, scale = module.rotary(q).double(), module.rotary(k).double(), a.core.scale
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = scale * q @ k.mT
    future = torch.ones(logits.shape[-2:]).triu(1).bool()
    return logits.masked_fill(future, float("-inf")).amax((0, 2, 3)).detach()


@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_every_head_is_scaled_by_its_own_factor(n_kv):
    module = Model(attention(n_kv), sphere())
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    before = heads(module, x)
    threshold = float(before.sort().values[1:3].mean())  # two heads above, two below
    clip = QKClip(threshold)
    fit(module, clip)
    torch.testing.assert_close(heads(module, x), before.clamp_max(threshold), rtol=1e-5, atol=1e-6)
    assert clip.clipped == 2


def test_torch_attention_with_biases():
    module = Model(nn.MultiheadAttention(16, 4, batch_first=True), sphere())
    with torch.no_grad():
        module.attention.in_proj_bias.normal_()
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    before, values = heads(module, x), module.attention.in_proj_weight.detach()[32:].clone()
    threshold = float(before.sort().values[1:3].mean())
    fit(module, QKClip(threshold))
    torch.testing.assert_close(heads(module, x), before.clamp_max(threshold), rtol=1e-5, atol=1e-6)
    assert torch.equal(module.attention.in_proj_weight.detach()[32:], values)


@pytest.mark.parametrize("options", [{}, {"split": "auto"}, {"sphere": False}])
def test_the_next_step_does_not_undo_it(options):
    """The step after the clip keeps the clipped norms: with the old radius it would scale them up again."""
    module = Model(nn.MultiheadAttention(16, 4, batch_first=True), sphere(lr=1e-6, **options))
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    before = heads(module, x)
    threshold = float(before.max()) / 3
    start = module.attention.in_proj_weight.detach().clone()
    trainer, _ = fit(module, QKClip(threshold), batches=4)
    assert heads(module, x).max() <= threshold * 1.0001
    assert start.norm() / module.attention.in_proj_weight.detach().norm() > 1.01
    state = trainer.optimizers[0].state[module.attention.in_proj_weight]
    if options != {"sphere": False}:
        parts = (
            module.attention.in_proj_weight.detach().split(16)
            if options
            else [module.attention.in_proj_weight.detach()]
        )
        norms = torch.stack([part.norm() for part in parts]).reshape(state["radius"].shape)
        torch.testing.assert_close(state["radius"], norms, rtol=1e-5, atol=0)


def test_what_is_not_covered_is_said():
    with pytest.warns(UserWarning, match="attention.core .normalized by q_norm, k_norm"):
        fit(Model(attention(qk_norm=True), sphere()), QKClip(1e-6))

    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.num_heads = nn.Linear(16, 48), 4

        def forward(self, x, rotary):
            return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    with pytest.warns(UserWarning, match=r"attention \(no pair of query and key weights was found beside it\)"):
        fit(Model(OwnAttention(), sphere()), QKClip(1.0))


def test_below_the_threshold_no_bit_changes_and_a_threshold_is_positive():
    module = Model(attention(), sphere())
    before = module.attention.w_q.detach().clone()
    trainer, _ = fit(module, clip := QKClip(1e4))
    assert torch.equal(module.attention.w_q.detach(), before)
    assert clip.clipped == 0 == trainer.callback_metrics["qk_clip/clipped"]
    with pytest.raises(ValueError, match="threshold"):
        QKClip(0)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_attentions_that_were_compiled_before_are_clipped(how):
    """Code compiled before does not run hooks, which are added when training begins: it has to be compiled again."""
    torch.compiler.reset()
    module, x = Model(attention(), sphere()), torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    if how == "wrapped":
        module.attention = torch.compile(module.attention, backend="eager")
    else:
        module.attention.compile(backend="eager")
    module.training_step(x).backward()
    module.zero_grad()
    before = heads(module, x)
    fit(module, clip := QKClip(float(before.max()) / 2))
    assert clip.clipped > 0
    torch.testing.assert_close(heads(module, x).max(), before.max() / 2, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_the_largest_logit_of_accumulated_batches_counts_and_is_logged():
    """Two steps of two batches each: one line a step, with the heads that it clipped."""
    module, logged = Model(attention(), sphere()), []
    module.log_dict = lambda metrics, **_: logged.append(metrics)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    top = float(heads(module, x).max())
    fit(module, clip := QKClip(top / 2), batches=4, accumulate_grad_batches=2)
    assert len(logged) == 2  # one a step, none for the batches between
    assert logged[0]["qk_clip/clipped"] >= 1
    assert sum(metrics["qk_clip/clipped"] for metrics in logged) == clip.clipped
    assert logged[0]["qk_clip/max_logit"] >= top * (1 - 1e-5)


def test_attentions_whose_forward_no_hook_sees_are_named():
    class Bypassed(Model):
        def training_step(self, x):
            return self.attention.w_q.square().mean() + self.attention.w_k.square().mean()

    with pytest.warns(UserWarning, match=r"found no forward of attention\.core before"):
        fit(Bypassed(attention(), sphere()), QKClip(1.0), batches=2)


def test_largest_logits_in_blocks(monkeypatch):
    monkeypatch.setattr("lightning_mue.diagnostics.zvalue.CHUNK_ELEMENTS", 50)
    q, k = torch.randn(2, 4, 7, 3), torch.randn(2, 2, 9, 3)
    hidden = torch.rand(2, 1, 7, 9) < 0.2
    logits = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    future = torch.ones(7, 9).triu(3).bool()
    expected = logits.masked_fill(future | hidden, float("-inf")).amax((0, 2, 3)).float()
    torch.testing.assert_close(attention_max_logits(q, k, 0.3, hidden=hidden), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """The largest logits on one rank only, of a rank without a forward too; other attentions on one rank are refused."""
    first, second = launch(str(Path(__file__).with_name("_qk_clip_ranks.py")), "clip", 2, tmp_path)
    for key in ("one rank above", "one rank without a forward"):
        assert torch.equal(first[key]["w_q"], second[key]["w_q"])
        assert torch.equal(first[key]["w_k"], second[key]["w_k"])
        assert first[key]["clipped"] == second[key]["clipped"] == 2
        expected = first[key]["before"].clamp_max(first[key]["threshold"])  # of rank 0's batch, whose logits are larger
        torch.testing.assert_close(first[key]["after"], expected, rtol=1e-5, atol=1e-6)
    for report in (first, second):
        assert "QKClip: found attention.core" in report["refused"]


@pytest.mark.slow
def test_a_trainer_on_two_ranks(tmp_path):
    """Weights stay equal on both ranks, where only the logits of one are above the threshold, compiled before or not."""
    first, second = launch(str(Path(__file__).with_name("_qk_clip_ranks.py")), "ddp", 2, tmp_path)
    for key in ("eager", "compiled"):
        for name in ("attention.w_q", "attention.w_k", "attention.w_v"):
            assert torch.equal(first[key][name], second[key][name])
        assert first[key]["clipped"] == second[key]["clipped"] > 0
        assert first[key]["largest"][0] > first[key]["threshold"] > second[key]["largest"][0]
    assert torch.equal(first["eager"]["largest"], first["compiled"]["largest"])
