"""A Qwen3-MoE of transformers, trained by an exported plan, goes through the same losses as our model under the plan."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.code_bases import by_place, load

from lightning_mue.models import MoELanguageModel
from lightning_mue.parameterizations import initialize, plan
from lightning_mue.parameterizations.applying.groups import scale_groups
from lightning_mue.parameterizations.exporting.export import export_plan
from lightning_mue.parameterizations.exporting.layouts import place_of

transformers = pytest.importorskip("transformers")
SIZES = {"width": 32, "depth": 3, "n_heads": 2, "n_kv_heads": 1, "expert_width": 24}


def theirs_like(experts):
    config = transformers.Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def test_losses_are_those_of_our_model():
    torch.manual_seed(1)
    ours = MoELanguageModel(vocab_size=40, context_length=16, n_experts=4, top_k=2, aux_loss_coef=0.0, **SIZES)
    base = {"width": 16, "depth": 1, "n_heads": 1, "n_experts": 0, "expert_width": None}
    made = plan(ours, base=base, rule="complete-mue")
    optimizer = torch.optim.AdamW(ours.named_parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    exported = load(export_plan(ours, made, [optimizer], to="transformers"))
    initialize(ours, made)
    for path, value in made.multipliers.items():
        module, _, attribute = path.rpartition(".")
        setattr(ours.get_submodule(module), attribute, value)
    theirs = theirs_like(4)
    copy_weights(ours, made, exported, theirs)
    steps = {
        "ours": torch.optim.AdamW(
            scale_groups(optimizer.param_groups, made, {p: n for n, p in ours.named_parameters()})
        ),
        "theirs": torch.optim.AdamW(exported.param_groups(theirs)),
    }
    losses = {"ours": [], "theirs": []}
    tokens = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(5))
    for _ in range(6):
        for name, forward in (("ours", ours), ("theirs", lambda x: theirs(input_ids=x).logits)):
            loss = F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            steps[name].zero_grad()
            loss.backward()
            steps[name].step()
            losses[name].append(loss.item())
    assert losses["ours"][-1] < losses["ours"][0] - 0.05  # it learns, so the steps matter
    torch.testing.assert_close(losses["theirs"], losses["ours"], rtol=2e-4, atol=0)


@torch.no_grad()
def copy_weights(ours, made, exported, theirs):
    """Ours, times the multipliers that the exported stds hold beyond the plan's."""
    tensors = by_place(dict(ours.named_parameters()))
    stds = {key: e.init.value for e in made.parameters for key in by_place({e.name: 0})}
    planned = {name: start for names, start in exported.INIT for name in names}
    for name, p in theirs.named_parameters():
        place = place_of(name)
        wanted = next(v for n, s in planned.items() for v in s.values() if _matches(n, name))
        parts = [tensors[part, place.layer] * (wanted / stds[part, place.layer]) for part in place.parts]
        p.copy_(torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0])


def _matches(pattern, name):
    return re.search(r"(^|\.)" + re.escape(pattern).replace(r"\*", r"\d+") + "$", name)
