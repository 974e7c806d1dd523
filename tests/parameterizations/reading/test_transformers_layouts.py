"""State-space models and mixtures of transformers: depth, ends of branches, per-channel parameters, experts' biases."""

from __future__ import annotations

import pytest

from lightning_mue import plan

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def language_model(kind, width, depth, **sizes):
    config = getattr(transformers, f"{kind}Config")
    sizes = {"hidden_size": width, "num_hidden_layers": depth, **TOKENS, **sizes}
    return getattr(transformers, f"{kind}ForCausalLM")(config(**sizes))


def mamba(kind, width=32, depth=2):
    own = {"head_dim": 16, "num_heads": width // 8, "n_groups": 1} if kind == "Mamba2" else {}
    return language_model(kind, width, depth, state_size=4, tie_word_embeddings=False, **own)


def attention(width):
    return {"num_attention_heads": width // 16, "num_key_value_heads": 1, "intermediate_size": 2 * width}


@pytest.mark.parametrize("rule", ["complete-p", "complete-mue"])
@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_state_space_model_in_width_and_depth(kind, rule):
    scaling = plan(mamba(kind, 64, 4), base=lambda: mamba(kind), rule=rule)
    assert (scaling.base_axes["depth"], scaling.axes["depth"]) == (2, 4)
    mixer = "backbone.layers.3.mixer."
    found = {p.name.removeprefix(mixer): p for p in scaling.parameters if p.name.startswith(mixer)}
    # Fan-ins grow by 2 (dt_proj's rank, too); the last matrix has the branch's 1/2, and the fan-in's.
    expected = {f"{name}.weight": 0.5 for name in ("in_proj", "x_proj", "dt_proj")} | {"out_proj.weight": 0.25}
    assert {name: p.lr for name, p in found.items() if p.lr != 1} == {k: v for k, v in expected.items() if k in found}
    dt_bias = found["dt_bias" if kind == "Mamba2" else "dt_proj.bias"]
    assert {dt_bias.init.kind, found["A_log"].init.kind} == {"keep"}
    old = plan(mamba(kind), base=lambda: mamba(kind, 64, 4), rule=rule)["backbone.layers.1.mixer.conv1d.weight"]
    assert old.init.value == pytest.approx(
        found["conv1d.weight"].init.value, rel=0.1
    )  # four inputs a channel at any width


def test_layers_of_several_kinds_all_count():
    def jamba(depth):
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        mixers = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
        return language_model("Jamba", 32, depth, **attention(32), **moe, **mixers)

    scaling = plan(jamba(4), base=lambda: jamba(2))
    assert (scaling.base_axes["depth"], scaling.axes["depth"]) == (2, 4)
    halved = {p.name.split("layers.")[1].split(".", 1)[1] for p in scaling.parameters if p.lr == 0.5}
    assert halved == {
        "mamba.out_proj.weight", "self_attn.o_proj.weight", "feed_forward.down_proj.weight", "feed_forward.experts.down_proj",
    }  # fmt: skip


def test_biases_of_experts_that_the_base_lacks_keep_their_values():
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    target = language_model("GptOss", 64, 2, **attention(64), **moe)
    scaling = plan(target, base=lambda: language_model("Llama", 32, 2, **attention(32)))
    layer = "model.layers.1.mlp."
    for name in ("experts.gate_up_proj_bias", "experts.down_proj_bias", "router.bias"):
        p = scaling[layer + name]
        assert (p.role, p.base, p.init.kind) == ("bias", None, "keep")
        # c r = (d / A) a = 1/2 * 2, folded into the last matrix of the experts and its bias.
        assert p.lr == 1.0
    assert scaling[layer + "experts.down_proj"].base == "model.layers.1.mlp.down_proj.weight"
    assert scaling.axes["n_experts"] == 8
