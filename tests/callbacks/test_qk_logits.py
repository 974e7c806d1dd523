"""QKClip bounds attentions of transformers: grouped heads and latent attention, fused and eager, compiled before or not."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3Config

from lightning_mue import HyperSphereOptimizer, QKClip
from lightning_mue.callbacks.monitors.seeing.torch_attention import QueryKeyRows, WeightRows
from lightning_mue.callbacks.qk_weights import AttentionWeights, LatentSizes

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    "first_k_dense_replace": 2,
}
CONFIGS = {
    "grouped": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "latent": lambda: DeepseekV3Config(**SIZES, **LATENT, q_lora_rank=12),
    "latent, whole queries": lambda: DeepseekV3Config(**SIZES, **LATENT, q_lora_rank=None),
}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(7))


class Model(LightningModule):
    """A model of transformers; `lr` zero, so that only the clip moves weights."""

    def __init__(self, config, attention="sdpa", compiled=""):
        super().__init__()
        torch.manual_seed(0)
        self.net = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        if compiled == "whole":
            self.net.compile(backend="eager")
        elif compiled == "layers":
            for layer in self.net.model.layers:
                layer.compile(backend="eager")

    def training_step(self, ids):
        return self.net(input_ids=ids, labels=ids, use_cache=False).loss

    def configure_optimizers(self):
        return HyperSphereOptimizer(self.named_parameters(), lr=0.0, compute_dtype="float32")


def fit(module, clip, batches=1):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[clip], enable_model_summary=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader([IDS] * batches, batch_size=None))


@torch.no_grad()
def heads(module):
    """Largest logits [layers, N] in float64: of eager attention, whose softmax is looked at from outside."""
    net, found, softmax = module.net.double(), [], nn.functional.softmax
    before = net.config._attn_implementation
    net.set_attn_implementation("eager")
    nn.functional.softmax = lambda x, *args, **kwargs: found.append(x) or softmax(x, *args, **kwargs)
    try:
        net.forward(input_ids=IDS, use_cache=False)
    finally:
        nn.functional.softmax = softmax
        net.set_attn_implementation(before)
        net.float()
    return torch.stack([x.double().amax((0, 2, 3)) for x in found if x.ndim == 4])


def first_threshold(before):
    """Two heads of the first layer above it, two below."""
    return float(before[0].sort().values[1:3].mean())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_head_is_scaled_by_its_own_factor(kind, attention):
    module = Model(CONFIGS[kind](), attention)
    before = heads(module)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    threshold = first_threshold(before)
    fit(module, clip := QKClip(threshold))
    # The second layer's inputs do not stay: what the first layer gives it has changed.
    torch.testing.assert_close(heads(module)[0], before[0].clamp_max(threshold), rtol=1e-5, atol=1e-6)
    assert clip.clipped == int((before > threshold).sum())
    changed = {name.split(".")[-2] for name, p in module.named_parameters() if not torch.equal(p, values[name])}
    query = {"grouped": "q_proj", "latent": "q_b_proj", "latent, whole queries": "q_proj"}[kind]
    assert changed == {query, "k_proj" if kind == "grouped" else "kv_b_proj"}


def test_values_of_a_latent_attention_stay():
    module = Model(CONFIGS["latent"]())
    before = module.net.model.layers[0].self_attn.kv_b_proj.weight.detach().clone()
    fit(module, QKClip(1e-3))
    after = module.net.model.layers[0].self_attn.kv_b_proj.weight.detach()
    old, new = (w.view(4, 11, 8).split([6, 5], 1) for w in (before, after))
    assert not torch.equal(old[0], new[0])
    assert torch.equal(old[1], new[1])


def test_no_clip_without_a_threshold_below_the_logits():
    """The control: the same run with a large threshold leaves the logits above the small one."""
    module = Model(CONFIGS["grouped"]())
    before = heads(module)
    fit(module, clip := QKClip(1e4))
    assert torch.equal(heads(module), before)
    assert clip.clipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped", "latent"])
@pytest.mark.parametrize("compiled", ["whole", "layers"])
def test_compiled_before(kind, compiled):
    torch.compiler.reset()
    module = Model(CONFIGS[kind](), compiled=compiled)
    before = heads(module)
    module.training_step(IDS).backward()
    module.zero_grad()
    fit(module, QKClip(threshold := first_threshold(before)))
    torch.testing.assert_close(heads(module)[0], before[0].clamp_max(threshold), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_what_is_normalized_or_has_sinks_is_named():
    more = {"num_key_value_heads": 2, "head_dim": 4}
    with pytest.warns(UserWarning, match="normalized by q_norm, k_norm"):
        fit(Model(Qwen3Config(**SIZES, **more)), QKClip(1e-3))
    config = GptOssConfig(**SIZES, **more, num_local_experts=2, num_experts_per_tok=1)
    with pytest.warns(UserWarning, match="its heads have sinks"):
        fit(Model(config, "eager"), QKClip(1e-3))


def test_rows_that_do_not_make_the_heads_are_not_scaled():
    rows = QueryKeyRows((WeightRows(torch.zeros(40, 3), 0, 40),), (WeightRows(torch.zeros(44, 3), 0, 44),))
    assert AttentionWeights(rows, LatentSizes(6, 4, 5)).has_heads(4, 10)
    assert not AttentionWeights(rows, LatentSizes(6, 4, 5)).has_heads(5)
    assert not AttentionWeights(rows).has_heads(4)  # 44 key rows are not heads of 10
    assert not AttentionWeights(rows).has_heads(10, 8)
