"""transformers' Mixture-of-Experts blocks and models become ours, with equal outputs and gradients, and go back.

Tolerances: float32 sums in another order, about 1e-7 a block; a hundred times that is allowed.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue.moe import MoELayer, moe_from_transformers, replace_moe_blocks
from lightning_mue.moe.convert.pretrained import run_block
from lightning_mue.moe.convert.replacing import TransformersMoE, transformers_state_dict
from lightning_mue.moe.convert.transformers_state import (
    LAYOUTS,
    state_dict_from_transformers,
    state_dict_to_transformers,
)

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
transformers.logging.set_verbosity_error()

D, E, K, VOCABULARY = 32, 6, 2, 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
}
FINE = {"num_experts": E, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    **LATENT,
}
MODELS = {
    "Mixtral": ("Mixtral", {"num_local_experts": E}),
    "Qwen2Moe": ("Qwen2Moe", {**FINE, "shared_expert_intermediate_size": 40}),
    "Qwen2Moe-normalized": ("Qwen2Moe", {**FINE, "shared_expert_intermediate_size": 40, "norm_topk_prob": True}),
    "Qwen3Moe": ("Qwen3Moe", {**FINE, "head_dim": 8, "norm_topk_prob": False}),
    "Qwen3Moe-normalized": ("Qwen3Moe", {**FINE, "head_dim": 8, "norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"}),
    "Olmoe": ("Olmoe", {"num_experts": E}),
    "DeepseekV3": ("DeepseekV3", {**DEEPSEEK, "norm_topk_prob": True}),
    "DeepseekV3-plain": ("DeepseekV3", {**DEEPSEEK, "norm_topk_prob": False}),
    # Has the correction bias on the block instead of the router.
    "MiniMaxM2": ("MiniMaxM2", {"num_local_experts": E, "head_dim": 8, "router_jitter_noise": 0.0}),
    # Says nowhere that it does not normalize.
    "Jamba": ("Jamba", {"num_experts": E, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
                        "attn_layer_offset": 0, "use_mamba_kernels": False}),
}  # fmt: skip
EXPECTED = {
    "Mixtral": "topk-softmax",
    "Qwen2Moe": "softmax-topk",
    "Qwen2Moe-normalized": "topk-softmax",
    "Qwen3Moe": "softmax-topk",
    "Qwen3Moe-normalized": "topk-softmax",
    "Olmoe": "softmax-topk",
    "DeepseekV3": "sigmoid-normalized",
    "DeepseekV3-plain": "sigmoid",
    "MiniMaxM2": "sigmoid-normalized",
    "Jamba": "softmax-topk",
}


def make_model(kind, **changes):
    torch.manual_seed(0)
    name, sizes = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **sizes, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def block_of(model):
    layer = model.model.layers[-1]
    return layer.mlp if hasattr(layer, "mlp") else layer.feed_forward


def make_block(kind, **changes):
    return block_of(make_model(kind, **changes))


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def gradients_as_ours(block):
    """The gradients of a block's weights, by our names: the converter takes them for weights."""
    return state_dict_from_transformers({name: p.grad for name, p in block.named_parameters()})


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_equal_the_blocks(kind):
    block = make_block(kind)
    layer = moe_from_transformers(block)
    assert layer.router.scoring == layer.hparams.scoring == EXPECTED[kind]
    x = torch.randn(2, 20, D)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = block(a), layer(b)
    assert y.shape == expected.shape
    assert relative(y, expected) < 1e-5
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    assert relative(b.grad, a.grad) < 1e-5
    for name, gradient in gradients_as_ours(block).items():
        if name != "router.balance_bias":
            assert relative(layer.get_parameter(name).grad, gradient) < 1e-5, name


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "DeepseekV3"])
def test_the_comparison_bites(kind):
    """Gate and up exchanged, another scoring, another scale: none of it passes for the block."""
    block = make_block(kind)
    x = torch.randn(1, 20, D)
    for change in ("swap", "scoring", "scale"):
        layer = moe_from_transformers(block)
        if change == "swap":
            layer.experts.w_gate, layer.experts.w_up = layer.experts.w_up, layer.experts.w_gate
        elif change == "scale":
            layer.route_scale *= 1.1
        else:
            others = {"topk": "sigmoid", "soft": "topk-softmax", "sigm": "sigmoid"}
            layer.router.scoring = others[layer.router.scoring[:4]]
        assert relative(layer(x), block(x)) > 1e-2


def test_against_the_formula_in_float64():
    """Independent of transformers' own arithmetic, whose gates are float32 even here."""
    block = make_block("Qwen2Moe-normalized").double()
    block.experts.config._experts_implementation = "eager"  # its grouped_mm knows no float64
    layer = moe_from_transformers(block)
    x = torch.randn(30, D, dtype=torch.float64)
    logits = x @ block.gate.weight.T
    chosen = logits.topk(K, dim=-1)
    gates = chosen.values.softmax(-1)
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for gate, e in zip(gates[t], chosen.indices[t], strict=True):
            g, u = (block.experts.gate_up_proj[e] @ x[t]).chunk(2)
            y[t] += gate * (block.experts.down_proj[e] @ (F.silu(g) * u))
    y += torch.sigmoid(x @ block.shared_expert_gate.weight.T) * block.shared_expert(x)
    assert relative(layer(x), y) < 1e-10
    assert relative(block(x[None])[0], y) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_there_and_back(kind, layout):
    block = make_block(kind)
    ours = state_dict_from_transformers(block.state_dict())
    names = {"correction_name": "e_score_correction_bias"} if kind == "MiniMaxM2" else {}
    names["router"] = "router" if hasattr(block, "router") else "gate"
    theirs = state_dict_to_transformers(ours, layout, **names)
    assert layout == "stacked" or sum(".3." in name for name in theirs) == 3
    back = state_dict_from_transformers({f"model.x.{name}": t for name, t in theirs.items()}, "model.x.")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    if layout == "stacked":
        assert theirs.keys() == block.state_dict().keys()
        assert all(torch.equal(t, theirs[name]) for name, t in block.state_dict().items())


def test_a_correction_bias_goes_where_the_block_has_one():
    """Also while it is zero; and never silently nowhere."""
    for kind, has in (("DeepseekV3", True), ("MiniMaxM2", True), ("Mixtral", False)):
        model = make_model(kind)
        twin = copy.deepcopy(model)
        replace_moe_blocks(model)
        block_of(model).moe.router.balance_bias.zero_()
        twin.load_state_dict(transformers_state_dict(model))
        block_of(model).moe.router.balance_bias[0] = 0.5
        name = next(n for n in transformers_state_dict(model) if n.endswith("correction_bias"))
        assert (name in twin.state_dict()) == has


class MixtralExpertOf4(nn.Module):
    """As transformers 4 had them: a module an expert."""

    def __init__(self, h):
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, h, bias=False), nn.Linear(D, h, bias=False)
        self.w2, self.act_fn = nn.Linear(h, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class QwenExpertOf4(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, h, bias=False), nn.Linear(D, h, bias=False)
        self.down_proj, self.act_fn = nn.Linear(h, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BlockOf4(nn.Module):
    """A block of transformers 4: a Linear router, a list of experts, logits returned beside the output."""

    def __init__(self, expert, h, *, norm_topk_prob=None):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList([expert(h) for _ in range(E)])
        self.top_k = K
        if norm_topk_prob is not None:
            self.norm_topk_prob = norm_topk_prob

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        logits = self.gate(x)
        gates, chosen = logits.softmax(-1).topk(K, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            gates = gates / gates.sum(-1, keepdim=True)
        y = sum(
            ((chosen == e) * gates).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(self.experts)
        )  # fmt: skip
        return y.view_as(hidden_states), logits


@pytest.mark.parametrize("normalized", [None, True, False])
@pytest.mark.parametrize("expert", [MixtralExpertOf4, QwenExpertOf4])
def test_blocks_of_transformers_4(expert, normalized):
    block = BlockOf4(expert, 40, norm_topk_prob=normalized)
    layer = moe_from_transformers(block)
    x = torch.randn(2, 9, D)
    assert relative(layer(x), block(x)[0]) < 1e-5
    model = nn.Sequential(nn.Linear(D, D), block)
    expected, logits = model(x)
    assert replace_moe_blocks(model) == ["1"]
    y, own_logits = model(x)  # a pair, as before
    assert relative(y, expected) < 1e-5
    assert relative(own_logits, logits) < 1e-5
    assert own_logits.requires_grad
    exported = transformers_state_dict(model, "mixtral" if expert is MixtralExpertOf4 else "qwen")
    fresh = nn.Sequential(nn.Linear(D, D), BlockOf4(expert, 40, norm_topk_prob=normalized))
    fresh.load_state_dict(exported)
    assert relative(fresh(x)[0], expected) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_computes_the_same_and_trains(kind):
    model = make_model(kind)
    ids = torch.randint(1, VOCABULARY, (2, 12))
    twin = copy.deepcopy(model)
    names = replace_moe_blocks(model)
    assert len(names) == (1 if kind.startswith("Deepseek") else 2)
    assert all(isinstance(model.get_submodule(name), TransformersMoE) for name in names)
    assert relative(model(ids).logits, twin(ids).logits) < 1e-5
    for m in (model, twin):
        m.train()
        m(ids, labels=ids).loss.backward()
    name = "model.embed_tokens.weight"
    assert relative(model.get_parameter(name).grad, twin.get_parameter(name).grad) < 1e-4
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    trained = model.eval()(ids).logits
    assert relative(trained, twin.eval()(ids).logits) > 1e-3
    # And back into a model of transformers' own.
    twin.load_state_dict(transformers_state_dict(model))
    assert relative(twin(ids).logits, trained) < 1e-5


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "hooked-before"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_router_logits_and_auxiliary_loss(kind, before):
    """transformers installs its hooks at the first call that asks for logits: that may be before or after the exchange."""
    model = make_model(kind, router_aux_loss_coef=0.5)
    ids = torch.randint(1, VOCABULARY, (2, 12))
    twin = copy.deepcopy(model)
    if before:
        model(ids, output_router_logits=True)
    replace_moe_blocks(model)
    a, b = (m(ids, labels=ids, output_router_logits=True) for m in (model, twin))
    assert len(a.router_logits) == len(b.router_logits) == 2
    assert all(relative(p, q) < 1e-5 for p, q in zip(a.router_logits, b.router_logits, strict=True))
    assert float(a.aux_loss) == pytest.approx(float(b.aux_loss), rel=1e-5)
    assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-5)
    a.aux_loss.backward()
    b.aux_loss.backward()
    router = block_of(model).moe.router.weight
    assert float(router.grad.norm()) > 0
    assert relative(router.grad, block_of(twin).gate.weight.grad) < 1e-4
    assert model(ids).router_logits is None


def test_a_model_generates_copies_and_is_saved():
    model = make_model("Mixtral")
    ids = torch.randint(1, VOCABULARY, (1, 5))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    replace_moe_blocks(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    out = twin(ids, output_router_logits=True)
    assert out.router_logits[0].requires_grad
    torch.save(model, "model.pt")
    loaded = torch.load("model.pt", weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "(recorder): " in repr(model)


def test_an_exchanged_block_compiles_without_a_graph_break():
    model = make_model("Olmoe")
    replace_moe_blocks(model, backend="torch")
    block, x = block_of(model), torch.randn(2, 5, D)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), block(x)) < 1e-6


def test_gradient_checkpointing_works():
    model = make_model("Olmoe").train()
    ids = torch.randint(1, VOCABULARY, (2, 12))
    replace_moe_blocks(model)
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for m in (model, twin):
        m(ids, labels=ids).loss.backward()
    a, b = (block_of(m).moe.experts.w_up.grad for m in (model, twin))
    assert relative(a, b) < 1e-5


def test_a_block_used_twice_stays_one():
    block = make_block("Mixtral")
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block), "c": nn.Linear(2, 2)})
    assert replace_moe_blocks(model) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_follows_the_block_and_shares_nothing():
    block = make_block("Qwen2Moe").bfloat16().train()
    block.experts.requires_grad_(False)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    layer = moe_from_transformers(block, backend="torch")
    assert layer.experts.backend == "torch"
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.experts.parameters())
    assert layer.router.weight.requires_grad
    assert layer.shared.w_up.requires_grad
    assert layer.last_routing is None
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


def test_the_trial_leaves_no_trace_in_the_block():
    class Counting(BlockOf4):
        def __init__(self):
            super().__init__(QwenExpertOf4, 24)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, hidden_states):
            self.calls += 1
            return super().forward(hidden_states)

    block, seen = Counting(), []
    handle = block.gate.register_forward_hook(lambda *args: seen.append(1))
    model = nn.Sequential(block)
    block(torch.randn(1, 2, D))  # the counters count
    assert (int(block.calls), len(seen)) == (1, 1)
    replace_moe_blocks(model)
    assert (int(block.calls), len(seen)) == (1, 1)
    block(torch.randn(1, 2, D))
    handle.remove()
    block(torch.randn(1, 2, D))
    assert (int(block.calls), len(seen)) == (3, 2)


def test_exchanged_weights_are_put_back_in_a_module_with_two_paths():
    twice = nn.Linear(4, 4, bias=False)
    module, before = nn.Sequential(twice, twice), twice.weight.clone()
    x, other = torch.randn(3, 4), torch.randn(4, 4)
    assert relative(run_block(module, x, {"0.weight": other}), x @ other.T @ other.T) < 1e-6
    assert torch.equal(twice.weight, before)


def test_on_the_meta_device():
    """Nothing can be compared there; what the block says of itself counts."""
    layer = moe_from_transformers(make_block("Qwen3Moe").to("meta"))
    assert layer.router.scoring == "softmax-topk"
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_balance_is_the_models_own_unless_asked_for():
    assert moe_from_transformers(make_block("Mixtral")).balance == "none"
    assert moe_from_transformers(make_block("DeepseekV3")).balance == "bias"
    layer = moe_from_transformers(make_block("Mixtral"), balance="switch", aux_loss_coef=0.1).train()
    layer(torch.randn(4, D))
    assert float(layer.aux_loss) > 0


class Doubled(nn.Module):
    """A block that does more than its weights say."""

    def __init__(self, block):
        super().__init__()
        self.gate, self.experts, self.top_k = block.gate, block.experts, K

    def forward(self, x):
        tokens = x.reshape(-1, D)
        _, gates, chosen = self.gate(tokens)
        return 2 * self.experts(tokens, chosen, gates).view_as(x)


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match=r"^block: found DeepseekV3MoE, which chooses 2 of 4 groups .*topk_group=2"):
        moe_from_transformers(make_block("DeepseekV3", topk_group=2))
    with pytest.raises(ValueError, match="noise in training"):
        moe_from_transformers(make_block("Mixtral", router_jitter_noise=0.1))
    with pytest.raises(ValueError, match="activation ReLU"):
        moe_from_transformers(make_block("Mixtral", hidden_act="relu"))
    with pytest.raises(ValueError, match="no Mixture-of-Experts block"):
        moe_from_transformers(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"^block: found a value of type str, expected a torch.nn.Module"):
        moe_from_transformers("Qwen/Qwen3-30B-A3B")
    with pytest.raises(TypeError, match=r"^model: found a value of type str, expected a torch.nn.Module"):
        replace_moe_blocks("Qwen/Qwen3-30B-A3B")
    with pytest.raises(ValueError, match="no Mixture-of-Experts block"):
        moe_from_transformers(MoELayer(D, 8, E))
    doubled = Doubled(make_block("Mixtral"))
    with pytest.raises(ValueError, match="computes something else"):
        moe_from_transformers(doubled)
    assert isinstance(moe_from_transformers(doubled, verify=False), MoELayer)
    del doubled.top_k
    del doubled.gate.top_k
    with pytest.raises(ValueError, match=r"block.top_k: .*how many experts a token gets"):
        moe_from_transformers(doubled)


def test_groups_are_refused_though_most_tokens_get_the_same_experts():
    with pytest.raises(ValueError, match=r"n_groups: found 2, expected none"):
        moe_from_transformers(make_block("Olmoe"), n_groups=2)


def test_models_and_state_dicts_without_blocks():
    with pytest.raises(ValueError, match="model: found Sequential, which holds no Mixture-of-Experts block"):
        replace_moe_blocks(nn.Sequential(nn.Linear(4, 4)))
    block = make_block("Mixtral")
    with pytest.raises(ValueError, match="is itself a block"):
        replace_moe_blocks(block)
    state = block.state_dict()
    with pytest.raises(ValueError, match=r"under prefix='mlp'.*missing: router.weight"):
        state_dict_from_transformers(state, "mlp")
    with pytest.raises(ValueError, match=r"unknown: experts.gate_up_proj_bias;"):
        state_dict_from_transformers({**state, "experts.gate_up_proj_bias": torch.zeros(E, 96)})
    with pytest.raises(ValueError, match="Transposed and interleaved"):
        state_dict_from_transformers({**state, "experts.gate_up_proj": state["experts.gate_up_proj"].mT})
    layer = MoELayer(D, 8, E, activation="gelu", bias=True)
    with pytest.raises(ValueError, match=r"missing weights: experts.w_gate, expected .*gated experts without biases"):
        state_dict_to_transformers(layer.state_dict())
    with pytest.raises(ValueError, match="layout: found 'flat'"):
        state_dict_to_transformers(layer.state_dict(), "flat")


def test_the_guide_runs_as_it_stands():
    guide = Path(__file__).parents[3] / "docs" / "upcycling.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "DeepseekV3"])
def test_save_pretrained_writes_what_the_models_own_class_loads(kind, tmp_path):
    model, ids = make_model(kind), torch.randint(VOCABULARY, (2, 9))
    replace_moe_blocks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(1.5)
    for name, each in (("model", model), ("twin", twin)):
        each.save_pretrained(tmp_path / name)
        loaded, info = type(model).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert relative(loaded(ids).logits, each(ids).logits) < 1e-5


@pytest.mark.parametrize("layers", [1, 2])
def test_the_auxiliary_loss_in_transformers_convention(layers):
    """Theirs is K times ours for one layer, of real tokens; over layers they pool, and ours is the sum."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = make_model("Mixtral", num_hidden_layers=layers).train()
    names = replace_moe_blocks(model, balance="switch", aux_loss_coef=1.0)
    ids, mask = torch.randint(VOCABULARY, (4, 32)), torch.arange(32) < torch.tensor([[20], [4], [12], [8]])
    logits = model(ids, attention_mask=mask.long(), output_router_logits=True).router_logits
    theirs = [load_balancing_loss_func((each,), E, K, mask.long()) for each in logits]
    ours = [model.get_submodule(name).moe for name in names]
    assert [int(layer.last_routing.counts.sum()) for layer in ours] == [88] * layers  # 44 of 128 tokens are real
    for layer, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(K * layer.aux_loss, expected)
    pooled = load_balancing_loss_func((logits[0],) * 2, E, K, mask.long())  # two layers of one load
    torch.testing.assert_close(pooled, theirs[0])


def test_options_without_effect_in_a_replaced_block_are_refused():
    for name, value in (("optimizer", torch.optim.SGD), ("init_std", 0.1), ("router_init_std", 0.1)):
        with pytest.raises(ValueError, match=f"^{name}: found"):
            replace_moe_blocks(make_model("Mixtral"), **{name: value})


def test_a_block_of_one_active_expert_is_warned_of():
    with pytest.warns(UserWarning, match="top_k: found 1 .* Use scoring='softmax-topk'"):
        moe_from_transformers(make_block("Mixtral", num_experts_per_tok=1))
