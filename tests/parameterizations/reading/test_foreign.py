"""Third-party modules: roles of their parameters, their sizes, and where multipliers are folded in."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mue import MuECallback, initialize, plan
from lightning_mue.parameterizations.planning.counterparts import match_parameters
from lightning_mue.parameterizations.reading.parameters import list_parameters

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
transformers.logging.set_verbosity_error()
VOCABULARY = 50


class CausalLM(L.LightningModule):
    """Any transformers language model in a LightningModule."""

    def __init__(self, kind: str, width: int = 64, depth: int = 2, ffn: int = 2, **sizes):
        super().__init__()
        self.save_hyperparameters()
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=width, num_hidden_layers=depth, intermediate_size=ffn * width, vocab_size=VOCABULARY, pad_token_id=0,
            num_attention_heads=width // 16, num_key_value_heads=width // 32, bos_token_id=1, eos_token_id=1, **sizes
        )  # fmt: skip
        self.model = getattr(transformers, f"{kind}ForCausalLM")(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class VisionTransformer(L.LightningModule):
    """A ViT of torch's own parts: patch embedding by convolution, class token, positions, nn.TransformerEncoder."""

    def __init__(self, width: int = 64, depth: int = 2, head_dim: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // head_dim, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for module in self.encoder.layers:  # torch copies the first layer
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.encoder(x)[:, 0])


def roles(scaling):
    return {p.name.replace("layers.0.", "layers.*."): p.role for p in scaling.parameters if "layers.1." not in p.name}


LLAMA = {
    "model.model.embed_tokens.weight": "embedding",
    **{f"model.model.layers.*.self_attn.{m}_proj.weight": "hidden" for m in "qkvo"},
    "model.model.layers.*.mlp.gate_proj.weight": "ffn_up",
    "model.model.layers.*.mlp.up_proj.weight": "ffn_up",
    "model.model.layers.*.mlp.down_proj.weight": "ffn_down",
    "model.model.layers.*.input_layernorm.weight": "norm",
    "model.model.layers.*.post_attention_layernorm.weight": "norm",
    "model.model.norm.weight": "final_norm",
    "model.lm_head.weight": "unembedding",
}
EXPERTS = {
    **{name: role for name, role in LLAMA.items() if ".mlp." not in name},
    "model.model.layers.*.mlp.gate.weight": "router",
    "model.model.layers.*.mlp.experts.gate_up_proj": "expert_up",
    "model.model.layers.*.mlp.experts.down_proj": "expert_down",
}
SHARED = {
    "model.model.layers.*.mlp.shared_expert.gate_proj.weight": "shared_up",
    "model.model.layers.*.mlp.shared_expert.up_proj.weight": "shared_up",
    "model.model.layers.*.mlp.shared_expert.down_proj.weight": "shared_down",
    "model.model.layers.*.mlp.shared_expert_gate.weight": "router",
    **{f"model.model.layers.*.self_attn.{m}_proj.bias": "bias" for m in "qkv"},
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2 = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 24}
QWEN3 = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected", "axes"),
    [
        ("Llama", {}, LLAMA, {"ffn_width": 256, "n_experts": 1, "active_width": 256}),
        ("Mixtral", MIXTRAL, EXPERTS, {"expert_width": 256, "n_experts": 4, "top_k": 2, "active_width": 512}),
        ("Qwen2Moe", QWEN2, EXPERTS | SHARED, {"expert_width": 48, "n_experts": 8, "top_k": 2, "active_width": 120}),
        (
            "Qwen3Moe",
            QWEN3,
            EXPERTS | {f"model.model.layers.*.self_attn.{m}_norm.weight": "qk_norm" for m in "qk"},
            {"expert_width": 48, "n_experts": 8, "top_k": 2, "active_width": 96, "head_dim": 16},
        ),
    ],
)
def test_roles_and_sizes_of_transformers_models(kind, sizes, expected, axes):
    scaling = plan(CausalLM(kind, width=128, depth=4, **sizes), base={"width": 64, "depth": 2})
    assert roles(plan(CausalLM(kind, width=128, **sizes), base={"width": 64})) == expected
    assert scaling.axes == {"width": 128, "depth": 4, "head_dim": 16, **scaling.axes, **axes}
    assert (scaling.base_axes["width"], scaling.base_axes["depth"]) == (64, 2)
    assert scaling["model.lm_head.weight"].lr == 0.5
    assert (
        scaling["model.model.layers.3.self_attn.k_proj.weight"].base == "model.model.layers.1.self_attn.k_proj.weight"
    )


def test_dense_llama_is_the_base_of_a_mixtral():
    """The base is another class: weights are matched by path, then by role; the router is new."""
    model = CausalLM("Mixtral", width=128, **MIXTRAL)
    scaling = plan(model, base=lambda: CausalLM("Llama", width=64))
    down = scaling["model.model.layers.1.mlp.experts.down_proj"]
    assert down.base == "model.model.layers.1.mlp.down_proj.weight"
    # c r = (d / A) a = 2 / (512 / 128) * 2 = 1: what nothing exposes is folded, and here it is 1 in all.
    assert down.init.value == pytest.approx(0.02 * (512 / 128) ** 0.5 / 2, rel=0.03)
    assert down.lr == pytest.approx(0.5)
    router = scaling["model.model.layers.1.mlp.gate.weight"]
    assert (router.base, router.init.value) == (None, pytest.approx(64**0.5 / 128))


def test_residual_multiplier_is_folded_into_the_last_matrix_of_each_branch():
    scaling = plan(CausalLM("Llama", depth=8), base={"depth": 2})
    factors = {p.name.split("layers.5.")[-1]: p.lr for p in scaling.parameters if "layers.5." in p.name}
    assert scaling.folded == {"residual": 0.25}
    assert {name for name, lr in factors.items() if lr == 0.25} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert set(factors.values()) == {0.25, 1.0}


def test_attention_multiplier_is_folded_into_the_query_or_set_where_it_is_named():
    sizes = {"width": 128, "head_dim": 32}
    folded = plan(CausalLM("Llama", **sizes), base={"width": 64, "head_dim": 16})
    lr = {m: folded[f"model.model.layers.0.self_attn.{m}_proj.weight"].lr for m in "qk"}
    assert lr == {"q": pytest.approx(0.5 * 0.5**0.5), "k": 0.5}
    named = plan(
        CausalLM("Llama", **sizes), base={"width": 64, "head_dim": 16}, multipliers={"attention": r"\.scaling$"}
    )
    assert named.multipliers == {
        f"model.model.layers.{i}.self_attn.scaling": pytest.approx(16**-0.5 / 2) for i in range(2)
    }
    assert named["model.model.layers.0.self_attn.q_proj.weight"].lr == 0.5
    model = CausalLM("Llama", **sizes)
    initialize(model, named)
    assert model.model.model.layers[1].self_attn.scaling == pytest.approx(0.125)
    with pytest.raises(
        ValueError, match=r"multipliers\.attention: found the pattern 'nowhere', which matches no attribute.*scaling"
    ):
        plan(model, base={"width": 64, "head_dim": 16}, multipliers={"attention": "nowhere"})


def test_query_norm_takes_the_attention_multiplier():
    scaling = plan(CausalLM("Qwen3Moe", **{**QWEN3, "head_dim": 32}), base={"head_dim": 8})
    factors = {p.name.split("self_attn.")[-1]: p.init.value for p in scaling.parameters if "0.self_attn." in p.name}
    assert (factors["q_norm.weight"], factors["k_norm.weight"]) == (0.5, 1.0)
    assert scaling["model.model.layers.0.self_attn.q_proj.weight"].lr == 1.0


def test_norm_behind_a_branch_takes_its_multiplier():
    """Olmo2 normalizes the output of a branch, so a factor on the matrix before the norm would have no effect."""
    scaling = plan(CausalLM("Olmo2", depth=4), base={"depth": 2})
    scaled = {p.name.split("layers.0.")[1] for p in scaling.parameters if ".0." in p.name and p.init.value == 0.5}
    assert scaled == {f"post_{branch}_layernorm.weight" for branch in ("attention", "feedforward")}
    assert scaling["model.model.layers.0.mlp.down_proj.weight"].lr == 1.0


def test_gain_that_starts_at_zero_cannot_take_a_multiplier():
    """Gemma's norms multiply by 1 + gain."""
    with pytest.raises(ValueError, match=r"post_attention_layernorm.*starts at zero"):
        plan(CausalLM("Gemma2", depth=4, head_dim=16), base={"depth": 2})


def test_fused_and_transposed_weights():
    """GPT-2 fuses q, k and v, stores weights as [in, out], and ties its embeddings."""

    class GPT2(nn.Module):
        def __init__(self, width=64, depth=2):
            super().__init__()
            self.hparams = {"width": width, "depth": depth}
            sizes = {"n_head": width // 16, "n_inner": 3 * width, "bos_token_id": 1, "eos_token_id": 1}
            config = transformers.GPT2Config(n_embd=width, n_layer=depth, vocab_size=VOCABULARY, **sizes)
            self.gpt = transformers.GPT2LMHeadModel(config)

    scaling = plan(GPT2(128, 4), base={"width": 64, "depth": 2})
    layer = "gpt.transformer.h.2."
    assert scaling[layer + "attn.c_attn.weight"].role == "hidden"
    assert scaling[layer + "mlp.c_fc.weight"].role == "ffn_up"
    down, bias = scaling[layer + "mlp.c_proj.weight"], scaling[layer + "mlp.c_proj.bias"]
    assert (down.role, down.lr, bias.lr) == ("ffn_down", pytest.approx(0.5 / 2), pytest.approx(1 / 2))
    assert scaling.axes["ffn_width"] == 384
    table = scaling["gpt.transformer.wte.weight"]
    assert table.source.endswith("tied")
    assert (table.lr, table.init.value) == (1.0, pytest.approx(0.02, rel=0.04))
    for part, value in (("weight", 0.5), ("bias", 0.0)):  # 1/2 on the logits, without a module that exposes it
        norm = scaling[f"gpt.transformer.ln_f.{part}"]
        assert (norm.role, norm.lr, norm.eps, norm.init.value) == ("final_norm", 0.5, 2.0, value)
    assert scaling["gpt.transformer.wpe.weight"].role == "embedding"


def test_vision_transformer_of_torch_parts():
    scaling = plan(VisionTransformer(128, 4), base={"width": 64, "depth": 2})
    by_role = {}
    for p in scaling.parameters:
        by_role.setdefault(p.role, []).append(p.name.replace("encoder.layers.0.", ""))
    assert by_role["embedding"] == ["cls_token", "pos_embed", "patches.weight"]
    assert by_role["unembedding"] == ["head.weight"]
    assert by_role["final_norm"] == ["encoder.norm.weight", "encoder.norm.bias"]
    assert by_role["hidden"][:2] == ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    assert (by_role["ffn_up"][0], by_role["ffn_down"][0]) == ("linear1.weight", "linear2.weight")
    assert scaling.axes == {
        "width": 128, "depth": 4, "ffn_width": 256, "expert_width": 256, "n_experts": 1, "top_k": 1, "active_width": 256,
        "head_dim": 16,
    }  # fmt: skip
    assert scaling["encoder.layers.3.linear2.bias"].lr == 0.5  # the residual multiplier, folded
    grown = plan(VisionTransformer(128, head_dim=32), base={"width": 64, "head_dim": 16})
    assert grown.folded == {"attention": pytest.approx(0.5**0.5)}
    rows = [grown[f"encoder.layers.1.self_attn.in_proj_{leaf}"].rows for leaf in ("weight", "bias")]
    assert [(r.dim, r.count, r.period) for r in rows] == [(0, 128, 384)] * 2


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (lambda: CausalLM("Llama", width=128, depth=4), {"width": 64, "depth": 2}),
        (lambda: CausalLM("Mixtral", width=128, depth=4, **MIXTRAL), {"width": 64, "depth": 2}),
    ],
    ids=["Llama", "Mixtral"],
)
def test_unmodified_module_trains_under_the_callback(make, base):
    model = make()
    tokens = torch.randint(0, VOCABULARY, (1, 4, 12), generator=torch.Generator().manual_seed(0)).repeat(16, 1, 1)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[MuECallback(base=base, verbose=False)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(list(tokens), batch_size=None))
    with torch.no_grad():
        loss = model.training_step(tokens[-1], 0)
        # Drawn with std 0.02 / sqrt(2) / 2, then 16 small steps.
        assert 0.005 < float(model.model.model.layers[3].self_attn.o_proj.weight.std()) < 0.012
    assert float(loss) < math.log(VOCABULARY) - 0.05  # the batch of the last step


def test_experts_in_a_list_and_stacks_stored_the_other_way():
    class Expert(nn.Module):
        def __init__(self, width, hidden):
            super().__init__()
            self.w1, self.w2 = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    class Layer(nn.Module):
        def __init__(self, width, hidden, stacked):
            super().__init__()
            self.norm, self.top_k = nn.LayerNorm(width), 2
            self.gate = nn.Linear(width, 4, bias=False)
            if stacked:  # [E, in, out], as for torch.bmm(x, w)
                self.experts = nn.Module()
                self.experts.up_proj = nn.Parameter(torch.randn(4, width, hidden))
                self.experts.down_proj = nn.Parameter(torch.randn(4, hidden, width))
            else:
                self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(4))

    class Model(nn.Module):
        def __init__(self, width=32, hidden=48, stacked=False):
            super().__init__()
            self.hparams = {"width": width, "hidden": hidden, "stacked": stacked}
            self.embed = nn.Embedding(10, width)
            self.layers = nn.ModuleList(Layer(width, hidden, stacked) for _ in range(2))
            self.head = nn.Linear(width, 10)

    for stacked in (False, True):
        scaling = plan(Model(64, 144, stacked), base={"width": 32, "hidden": 48}, rule="mup")
        down = next(p for p in scaling.parameters if p.role == "expert_down")
        assert (scaling.axes["n_experts"], scaling.axes["expert_width"]) == (4, 144)
        assert scaling.axes["active_width"] == 288
        assert down.lr == pytest.approx(1 / 3)  # its fan-in, not its fan-out
        assert scaling["layers.0.gate.weight"].role == "router"


def test_number_of_active_experts_must_be_known():
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gate = nn.Linear(width, 4, bias=False)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(width, 8), "down": nn.Linear(8, width)}) for _ in range(4)
            )

    class Model(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.hparams = {"width": width}
            self.layers = nn.ModuleList([Layer(width)])

    with pytest.raises(
        ValueError, match=r"base: found 4 experts, but how many of them a token uses is not known.*mue_axes"
    ):
        plan(Model(64), base={"width": 32})


def test_recurrent_layers_scale_by_their_sides():
    class Tagger(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.hparams = {"width": width}
            self.rnn, self.head = nn.LSTM(8, width, num_layers=2), nn.Linear(width, 5)

    scaling = plan(Tagger(64), base={"width": 32}, rule="mup")
    found = {
        name: scaling[f"rnn.{name}"].role for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "bias_ih_l0")
    }
    assert found == {
        "weight_ih_l0": "embedding",
        "weight_hh_l0": "hidden",
        "weight_ih_l1": "hidden",
        "bias_ih_l0": "bias",
    }


class MLP(nn.Module):
    """The linear layers of a Sequential: no two ends of it are alike."""

    def __init__(self, width=64, layers=1, norm_inputs=False):
        super().__init__()
        self.hparams = {"width": width, "layers": layers, "norm_inputs": norm_inputs}
        inner = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())]
        first = [nn.BatchNorm1d(8)] if norm_inputs else []
        self.net = nn.Sequential(*first, nn.Linear(8, width), nn.ReLU(), *inner, nn.Linear(width, 10))


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_depth_of_an_mlp_alone_scales_nothing(layers):
    scaling = plan(MLP(layers=layers), base={"layers": 1}, rule="mup")
    assert {p.lr for p in scaling.parameters} == {1.0}
    weights = [p for p in scaling.parameters if len(p.shape) == 2]
    assert [p.base for p in weights] == ["net.0.weight", *["net.2.weight"] * layers, "net.4.weight"]


def test_shrinking_and_widening_an_mlp_keeps_its_ends():
    scaling = plan(MLP(128, layers=1), base={"width": 64, "layers": 4}, rule="mup")
    found = {p.name: (p.role, p.lr) for p in scaling.parameters if len(p.shape) == 2}
    assert list(found.values()) == [("embedding", 1.0), ("hidden", 0.5), ("unembedding", 0.5)]
    # Drawn uniform in +-1/sqrt(64): std 64^-1/2 / sqrt(3), times d^-1.
    assert scaling["net.4.weight"].init.value == pytest.approx(64**-0.5 / 3**0.5 / 2, rel=0.05)


def test_the_only_layer_of_a_stack_is_matched_with_the_first():
    target, base = nn.Sequential(nn.Linear(8, 10)), nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 10))
    matched = match_parameters(list_parameters(target), list_parameters(base))
    assert {name: info.name for name, info in matched.items()} == {"0.weight": "0.weight", "0.bias": "0.bias"}


def test_part_that_keeps_its_size_does_not_count_for_the_width():
    scaling = plan(MLP(256, norm_inputs=True), base={"width": 64}, rule="mup")
    assert (scaling.axes["width"], scaling.base_axes["width"]) == (256, 64)


def test_unembedding_is_known_where_neither_side_grows():
    for changed in ({"depth": 4}, {"vocabulary": 60}, {}):
        scaling = plan(
            CausalLM("Llama", **changed) if "vocabulary" not in changed else CausalLM("Llama"), base={"depth": 2}
        )
        assert scaling["model.lm_head.weight"].role == "unembedding"


def test_matrix_whose_inputs_do_not_grow_is_not_scaled():
    """A fixed number of heads of a fixed size: the output projection reads as much as at the base."""

    class FixedHeads(nn.Module):
        def __init__(self, width=64):
            super().__init__()
            self.hparams = {"width": width}
            config = transformers.LlamaConfig(
                hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, vocab_size=VOCABULARY, head_dim=16,
                num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=1
            )  # fmt: skip
            self.model = transformers.LlamaForCausalLM(config)

    for rule in ("mup", "complete-p", "complete-mue"):
        scaling = plan(FixedHeads(256), base={"width": 64}, rule=rule)
        q, o = (scaling[f"model.model.layers.0.self_attn.{m}_proj.weight"] for m in "qo")
        assert (q.lr, o.lr, o.weight_decay) == (0.25, 1.0, 1.0)
        assert (q.init.value, o.init.value) == (pytest.approx(0.01, rel=0.02), pytest.approx(0.02, rel=0.02))


def test_two_towers_scale_by_their_own_widths():
    class Towers(nn.Module):
        def __init__(self, text=64, image=32):
            super().__init__()
            self.hparams = {"text": text, "image": image}
            self.text = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(text, text // 16, 2 * text), 3, enable_nested_tensor=False
            )
            self.image = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(image, image // 16, 2 * image), 2, enable_nested_tensor=False
            )

    scaling = plan(Towers(256, 64), base={"text": 64, "image": 32}, rule="mup")
    assert scaling["text.layers.0.linear1.weight"].lr == 0.25
    assert scaling["image.layers.0.linear1.weight"].lr == 0.5
    assert any("grow by different ratios (2, 4)" in note for note in scaling.notes)


def test_size_and_scale_of_attention_heads_by_other_names():
    class Bert(nn.Module):
        def __init__(self, width=64, heads=4):
            super().__init__()
            self.hparams = {"width": width, "heads": heads}
            config = transformers.BertConfig(
                hidden_size=width, num_attention_heads=heads, intermediate_size=128, num_hidden_layers=2, vocab_size=50
            )
            self.bert = transformers.BertModel(config)

    scaling = plan(Bert(128), base={"width": 64}, rule="mup")
    assert scaling.axes["head_dim"] == 32
    assert scaling.folded == {"attention": pytest.approx(0.5**0.5)}


def test_own_scale_of_the_attention_is_taken_into_account():
    """Gemma2's logits have a scale of their own that does not follow the head size, so all of k^-1 is folded."""
    sizes = {"attn_implementation": "eager", "query_pre_attn_scalar": 256}
    scaling = plan(CausalLM("Gemma2", head_dim=32, **sizes), base={"head_dim": 16}, rule="mup")
    assert scaling.folded == {"attention": 0.5}


def test_declared_sizes_do_not_switch_off_the_others():
    class Declared(CausalLM):
        def mue_axes(self):
            return {"width": self.hparams.width, "depth": 2}

    scaling = plan(Declared("Llama", width=128, head_dim=32), base={"width": 64, "head_dim": 16})
    assert scaling.folded == {"attention": pytest.approx(0.5**0.5)}
    assert scaling.axes["ffn_width"] == 256


def test_experts_in_a_list_outside_any_layer():
    class Moe(nn.Module):
        def __init__(self, width=32, experts=4):
            super().__init__()
            self.hparams = {"width": width, "experts": experts}
            self.embed, self.norm, self.head = nn.Embedding(10, width), nn.LayerNorm(width), nn.Linear(width, 10)
            self.moe = nn.Module()
            self.moe.gate, self.moe.top_k = nn.Linear(width, experts, bias=False), 2
            self.moe.experts = nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(width, 48), "fc2": nn.Linear(48, width)}) for _ in range(experts)
            )

    scaling = plan(Moe(64, 8), base={"width": 32, "experts": 4})
    assert scaling["moe.gate.weight"].role == "router"
    assert "depth" not in scaling.axes
    assert (scaling.axes["n_experts"], scaling.base_axes["n_experts"]) == (8, 4)
    assert scaling["moe.experts.6.fc2.bias"].base == "moe.experts.3.fc2.bias"
    tied = plan(Moe(64, 8), base={"width": 32, "experts": 4}, rule="mssp-III")
    model = Moe(64, 8)
    initialize(model, tied)
    for part in ("fc1", "fc2"):
        for leaf in ("weight", "bias"):
            assert torch.equal(getattr(model.moe.experts[0][part], leaf), getattr(model.moe.experts[7][part], leaf))


def test_top_k_of_a_metric_is_not_the_routers():
    class Measured(CausalLM):
        def __init__(self, kind, width=64, depth=2, ffn=2, **sizes):
            super().__init__(kind, width, depth, ffn, **sizes)
            self.accuracy = nn.Module()
            self.accuracy.top_k = 5

    scaling = plan(Measured("Mixtral", width=128, **MIXTRAL), base={"width": 64})
    assert scaling.axes["top_k"] == 2


def test_inner_stacks_and_pairs_of_stacks():
    class Stages(nn.Module):
        def __init__(self, width=32, blocks=2):
            super().__init__()
            self.hparams = {"width": width, "blocks": blocks}
            self.layers = nn.ModuleList()
            for n in (2, blocks):
                stage = nn.Module()
                stage.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 64) for _ in range(n))
                self.layers.append(stage)

    deep = plan(Stages(blocks=6), base={"blocks": 2})
    assert (deep.axes["depth"], deep.base_axes["depth"]) == (8, 4)
    assert deep["layers.1.blocks.5.self_attn.out_proj.bias"].base == "layers.1.blocks.1.self_attn.out_proj.bias"

    class Pair(nn.Module):
        def __init__(self, encoder=2, decoder=2):
            super().__init__()
            self.hparams = {"encoder": encoder, "decoder": decoder}
            self.model = nn.Transformer(32, 2, encoder, decoder, 64)

    scaling = plan(Pair(decoder=4), base={"decoder": 2}, rule="mup")
    assert any("stacks of layers grow by different ratios (1, 2)" in note for note in scaling.notes)


def test_gates_of_an_undeclared_router_are_not_known():
    notes = plan(CausalLM("Mixtral", **{**MIXTRAL, "num_local_experts": 8}), base={"num_local_experts": 4}).notes
    assert any(note.startswith("how the router makes its gates is not known") for note in notes)


def test_weight_norm_is_not_scaled_by_mistake():
    class Normed(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.hparams = {"width": width}
            self.inner = nn.utils.weight_norm(nn.Linear(width, width))

    with pytest.raises(
        ValueError, match=r"model: found 2 parameter\(s\) .*weight norm: inner\.weight_g, inner\.weight_v"
    ):
        plan(Normed(64), base={"width": 32})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": {"widht": 32}}, r"base\.widht: .*Did you mean 'width'"),
        ({"base": [64]}, r"base: found \[64\] of type list, expected a mapping"),
        ({"base": {"width": 32}, "roles": {"(": "hidden"}}, r"roles: found '\(' .*, expected a regular expression"),
        (
            {"base": {"width": 32}, "multipliers": {"atention": "scaling"}},
            r"multipliers: found the kind\(s\) atention, expected kinds among residual",
        ),
    ],
)
def test_slips_are_told(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan(CausalLM("Llama", head_dim=16), **arguments)


@pytest.mark.parametrize(
    ("kind", "task", "sizes", "norm", "factor"),
    [
        ("Bert", "MaskedLM", lambda d: {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": d // 16,
          "intermediate_size": d}, "cls.predictions.transform.LayerNorm", 1 / 2),
        ("OPT", "CausalLM", lambda d: {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": d // 16,
          "ffn_dim": d, "word_embed_proj_dim": d // 2}, "model.decoder.final_layer_norm", 1 / 2),
        # T5 multiplies the head's input by d^-1/2 itself, Pegasus the look-up by d^1/2, so that half of the power is left.
        ("T5", "ConditionalGeneration", lambda d: {"d_model": d, "num_layers": 1, "num_heads": d // 16, "d_kv": 16,
          "d_ff": d}, "decoder.final_layer_norm", 2**-0.5),
        ("Pegasus", "ConditionalGeneration", lambda d: {"d_model": d, "encoder_layers": 1, "decoder_layers": 1,
          "encoder_ffn_dim": d, "decoder_ffn_dim": d, "encoder_attention_heads": d // 16,
          "decoder_attention_heads": d // 16, "scale_embedding": True}, "model.decoder.layer_norm", 2**-0.5),
    ],
    ids=["bert", "opt", "t5", "pegasus"],
)  # fmt: skip
def test_norm_before_a_tied_head(kind, task, sizes, norm, factor):
    def make(width):
        config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, pad_token_id=0, **sizes(width))
        return getattr(transformers, f"{kind}For{task}")(config)

    scaling = plan(make(64), base=make(32), rule="complete-p")
    gains = {p.name: p.init.value for p in scaling.parameters if p.name.endswith(("orm.weight", "Norm.weight"))}
    expected = {name: factor if name == f"{norm}.weight" else 1.0 for name in gains}
    assert gains == pytest.approx(expected)
    assert f"{norm}.weight" in gains
    table = next(p for p in scaling.parameters if p.source.endswith("tied"))
    assert table.lr == pytest.approx(2**-0.5 if kind == "Pegasus" else 1.0)
