"""Which weights make an attention's queries, and the size and scale of its heads, read from modules that nobody here wrote."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_mue import plan
from lightning_mue.parameterizations.reading.record import ModelRecord, describe

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
transformers.logging.set_verbosity_error()
SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
GPT = {"n_embd": 32, "n_head": 2, "n_layer": 1}
HF = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
FALCON = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
CODEGEN = {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4}
#: Architecture -> (its name in transformers, its configuration, the attribute of its attention that scales logits).
FUSED = {
    "gpt2": ("GPT2Model", GPT, "scaling"),
    "gpt-neox": ("GPTNeoXModel", {**HF, "intermediate_size": 32}, "scaling"),
    "bloom": ("BloomModel", {"hidden_size": 32, "n_head": 2, "n_layer": 1}, "inv_norm_factor"),
    "falcon multi-query": ("FalconModel", FALCON, "_split_heads"),
    "falcon heads": ("FalconModel", {**FALCON, "multi_query": False}, "_split_heads"),
    "falcon groups": ("FalconModel", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, "_split_heads"),
    "bigcode multi-query": ("GPTBigCodeModel", GPT, "scaling"),
    "bigcode heads": ("GPTBigCodeModel", {**GPT, "multi_query": False}, "scaling"),
    "phi3 groups": ("Phi3Model", {**FALCON, "num_key_value_heads": 2, "intermediate_size": 32}, "scaling"),
    "codegen": ("CodeGenModel", CODEGEN, "scale_attn"),
    "mpt": ("MptModel", {"d_model": 32, "n_heads": 2, "n_layers": 1}, "softmax_scale"),
}  # fmt: skip


def make(name, **sizes):
    kind, config, _ = FUSED[name]
    config = getattr(transformers, kind.replace("Model", "Config"))(**{**SMALL, **config, **sizes})
    return getattr(transformers, kind)(config).double().eval()


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_queries_are_those_that_scale_the_logits(name):
    """Twice these rows gives the output of twice the scale of the logits."""
    model = make(name)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    queries = [info for info in describe(model).parameters if info.query is not None]
    assert queries
    assert all(info.query.rows is not None for info in queries)
    explicit, doubled = copy.deepcopy(model), copy.deepcopy(model)
    for module in explicit.modules():
        attribute = FUSED[name][2]
        if attribute == "_split_heads" and hasattr(module, attribute):
            split = module._split_heads
            module._split_heads = lambda fused, split=split: (2 * split(fused)[0], *split(fused)[1:])
        elif isinstance(getattr(module, attribute, None), float):
            factor = 0.5 if attribute == "scale_attn" else 2  # a divisor
            setattr(module, attribute, getattr(module, attribute) * factor)
    with torch.no_grad():
        for info in queries:
            dim, count, period = info.query.rows
            factors = torch.where(torch.arange(info.shape[dim]) % period < count, 2.0, 1.0).double()
            weight = doubled.get_parameter(info.name)
            weight.mul_(factors if dim == weight.dim() - 1 else factors[:, None])
    tokens = torch.randint(3, 40, (2, 9))
    want, got = (m(tokens).last_hidden_state.detach() for m in (explicit, doubled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (model(tokens).last_hidden_state - want).abs().max() > 1e-2


@pytest.mark.parametrize("name", FUSED)
def test_the_factor_follows_the_size_of_a_head_at_a_fixed_number(name):
    width = next(key for key in ("n_embd", "hidden_size", "d_model") if key in FUSED[name][1])
    small = make(name)
    large = make(name, **{width: 4 * FUSED[name][1][width]})
    scaling = plan(large, base=small, rule="mup")
    factors = [p.rows.factor for p in scaling.parameters if p.rows is not None]
    assert factors == pytest.approx([0.5] * len(factors))
    assert scaling.folded == {"attention": pytest.approx(0.5)}
    assert "that make queries" in str(scaling)


class Attention(nn.Module):
    """Attention as in many a repository; ``how`` sets what it keeps of its heads and its scale."""

    def __init__(self, width, heads, how):
        super().__init__()
        dim = width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if how == "head_dim":
            self.head_dim = dim
        elif how == "divisor":
            self.num_heads, self.scale = heads, dim**0.5
        elif how == "muP":
            self.num_heads, self.scale = heads, 1 / dim
        elif how == "constant":
            self.num_heads, self.scale = heads, 1.0
        elif how == "config":
            self.config = {"n_head": heads}
        elif how == "normed":
            self.num_heads, self.q_norm = heads, nn.RMSNorm(dim, elementwise_affine=False)
        elif how in ("heads", "number on the model"):
            self.heads = heads if how == "heads" else None


class Net(nn.Module):
    def __init__(self, width, heads, how):
        super().__init__()
        if how == "number on the model":
            self.n_head = heads
        self.embed = nn.Embedding(7, width)
        blocks = [nn.ModuleDict({"norm": nn.LayerNorm(width), "mixer": Attention(width, heads, how)}) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 7, bias=False)


@pytest.mark.parametrize(
    ("how", "factor"),
    [("head_dim", 0.5), ("heads", 0.5), ("config", 0.5), ("number on the model", 0.5), ("divisor", 0.5), ("muP", None),
     ("constant", 0.25)],
)  # fmt: skip
def test_heads_and_scales_however_they_are_kept(how, factor):
    scaling = plan(Net(64, 2, how), base=Net(16, 2, how), rule="mup")
    factors = [p.rows.factor for p in scaling.parameters if p.rows is not None]
    assert factors == ([] if factor is None else pytest.approx([factor] * 4))
    assert scaling.folded == ({} if factor is None else {"attention": pytest.approx(factor)})
    assert not any("attention head" in note for note in scaling.notes)
    kept = plan(Net(64, 8, how), base=Net(16, 2, how), rule="mup")  # more heads, not larger ones
    assert not any(p.rows for p in kept.parameters) or how == "muP"


def test_unknown_heads_and_norms_without_weights_are_said():
    unknown = plan(Net(64, 2, "nothing"), base=Net(16, 2, "nothing"), rule="mup")
    assert any("attention head is not known for blocks.0.mixer.qkv.weight" in note for note in unknown.notes)
    with pytest.raises(
        ValueError, match=r"attention multiplier.*blocks\.0\.mixer\.qkv\.weight.*Keep the head dimension"
    ):
        plan(Net(64, 2, "normed"), base=Net(16, 2, "normed"), rule="mup")


def test_towers_have_factors_of_their_own():
    class Towers(nn.Module):
        def __init__(self, text, image):
            super().__init__()
            layers = [nn.TransformerEncoderLayer(width, 2, 2 * width) for width in (text, image)]
            self.text, self.image = (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in layers)

    scaling = plan(Towers(128, 32), base=Towers(32, 16), rule="mup")
    for tower, factor in (("text", 0.5), ("image", 0.5**0.5)):
        assert scaling[f"{tower}.layers.1.self_attn.in_proj_weight"].rows.factor == pytest.approx(factor)
        assert scaling[f"{tower}.layers.1.self_attn.in_proj_bias"].rows.factor == pytest.approx(factor)


def test_a_list_of_heads_with_matrices_of_their_own():
    class Head(nn.Module):
        def __init__(self, width, size):
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))

    class Heads(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.hparams = {"n_head": heads}
            self.embed = nn.Embedding(7, width)
            self.heads = nn.ModuleList([Head(width, width // heads) for _ in range(heads)])
            self.head = nn.Linear(width, 7, bias=False)

    scaling = plan(Heads(64, 4), base=Heads(16, 4), rule="mup")
    assert scaling["heads.3.query.weight"].lr == pytest.approx(0.25 * 0.5)
    assert scaling["heads.3.key.weight"].lr == pytest.approx(0.25)


def test_saved_bases_keep_queries_and_older_ones_load():
    record = describe(Net(16, 2, "heads"))
    assert ModelRecord.from_dict(record.to_dict()) == record
    old = record.to_dict()
    for entry in old["parameters"]:
        del entry["query"]
    assert ModelRecord.from_dict(old).parameters[3].query is None
