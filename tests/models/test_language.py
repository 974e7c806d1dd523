from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_mue import MoELanguageModel, MoELayer, plan
from lightning_mue.models.transformer import RMSNorm, RotaryEmbedding
from lightning_mue.moe import FeedForward
from lightning_mue.optim.schedule import WarmupDecay


def make_model(**kwargs):
    torch.manual_seed(0)
    return MoELanguageModel(**{"context_length": 16, "width": 32, "n_heads": 4, "depth": 2, "n_experts": 4, **kwargs})


def tokens(batch=2, length=16, seed=0, vocab=256):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(model, ids):
    """The dense model written out in float64 from its equations, one head and one position at a time."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    hp = model.hparams
    d, heads, kv = hp["width"], hp["n_heads"], hp["n_kv_heads"] or hp["n_heads"]
    k = model.head_dim

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x):  # [S, k]
        half = k // 2
        out = torch.empty_like(x)
        for s in range(x.shape[0]):
            for i in range(half):
                angle = s * hp["rope_base"] ** (-2 * i / k)
                a, b = x[s, i], x[s, i + half]
                out[s, i] = a * math.cos(angle) - b * math.sin(angle)
                out[s, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["transformer.embedding.weight"][ids]
    for i, block in enumerate(model.transformer.blocks):
        p = f"transformer.blocks.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, key, v = (h @ w[p + f"attention.w_{n}"].T for n in "qkv")
        outputs = []
        for head in range(heads):
            g = head * kv // heads
            q_h = rotate(norm(q[:, head * k : (head + 1) * k], w[p + "attention.q_norm.weight"]))
            k_g = rotate(norm(key[:, g * k : (g + 1) * k], w[p + "attention.k_norm.weight"]))
            v_g = v[:, g * k : (g + 1) * k]
            rows = []
            for s in range(len(ids)):
                p_s = torch.softmax(block.attention.core.scale * (k_g[: s + 1] @ q_h[s]), 0)
                rows.append(p_s @ v_g[: s + 1])
            gate = torch.sigmoid(h @ w[p + "attention.w_g"][head])[:, None] if hp["gated_attention"] else 1.0
            outputs.append(gate * torch.stack(rows))
        x = x + block.residual_multiplier * torch.cat(outputs, -1) @ w[p + "attention.w_o"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        hidden = F.silu(h @ w[p + "ffn.w_gate"].T) * (h @ w[p + "ffn.w_up"].T)
        x = x + block.residual_multiplier * block.ffn.output_multiplier * hidden @ w[p + "ffn.w_down"].T
    assert x.shape == (len(ids), d)
    return hp["output_multiplier"] * norm(x, w["transformer.final_norm.weight"]) @ w["transformer.unembedding.weight"].T


@pytest.mark.parametrize(("n_kv_heads", "gated"), [(4, False), (2, True), (1, False)])
def test_logits_equal_a_literal_float64_transformer(n_kv_heads, gated):
    model = make_model(
        gated_attention=gated,
        n_experts=0,
        n_kv_heads=n_kv_heads,
        residual_multiplier=0.7,
        ffn_multiplier=1.3,
        output_multiplier=2.0,
        attention_multiplier=0.4,
        unembedding_std=0.3,
    )
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = tokens(1)
    expected = reference_logits(model, ids[0])
    # float32 round-off through two blocks: 1e-6 a product, some tens of products deep.
    torch.testing.assert_close(model(ids)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_later_tokens_do_not_reach_earlier_ones():
    model, ids = make_model(), tokens()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    torch.testing.assert_close(model(ids)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:])


def test_batch_rows_do_not_mix():
    model, ids = make_model(), tokens(4)
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=1e-4, atol=1e-5)


def test_experts_that_no_block_has_are_warned_of():
    with pytest.warns(UserWarning, match=r"moe_every: found 5 with depth=4 .*no block has experts.* Lower moe_every"):
        make_model(depth=4, n_experts=4, moe_every=5)


@pytest.mark.parametrize(
    ("n_experts", "moe_every", "kinds"), [(0, 1, "dddd"), (4, 1, "mmmm"), (4, 2, "dmdm"), (4, 4, "dddm")]
)
def test_which_blocks_are_moe(n_experts, moe_every, kinds):
    model = make_model(depth=4, n_experts=n_experts, moe_every=moe_every)
    types = {FeedForward: "d", MoELayer: "m"}
    assert "".join(types[type(block.ffn)] for block in model.transformer.blocks) == kinds
    assert len(model.moe_layers) == kinds.count("m")


def test_experts_default_to_the_dense_active_width():
    model = make_model(ffn_width=96, top_k=3, n_experts=4)
    assert model.expert_width == 32
    assert model.mue_axes()["active_width"] == 96
    assert make_model(shared_width=8).mue_axes()["active_width"] == 2 * make_model().expert_width + 8
    assert make_model(n_experts=0, ffn_width=96).mue_axes()["active_width"] == 96


def test_tied_embeddings_are_one_parameter():
    model = make_model(tie_embeddings=True)
    assert model.transformer.unembedding.weight is model.transformer.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "transformer.unembedding.weight" not in names


def test_loss_is_cross_entropy_and_auxiliary_losses_are_trained_on():
    model = make_model(aux_loss_coef=0.5)
    batch = {"tokens": tokens(), "targets": tokens(seed=1)}
    model.log = lambda *args, **kwargs: None
    total = model.training_step(batch, 0)
    loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
    aux = sum(layer.aux_loss for layer in model.moe_layers)
    assert float(aux.detach()) > 0.5
    torch.testing.assert_close(total, loss + aux)


def test_learns_and_logs(tmp_path):
    row = torch.arange(17).repeat(8, 1)
    data = DataLoader([{"tokens": r[:-1], "targets": r[1:]} for r in row], batch_size=8)
    model = make_model(scheduler=WarmupDecay, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=5,
    )
    trainer.fit(model, data, data)
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) < 0.5 < math.log(256)
    assert float(metrics["val/bits_per_byte"]) == pytest.approx(float(metrics["val/loss"]) / math.log(2), rel=1e-6)
    # The schedule ends where the trainer does.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    out = trainer.predict(model, data)
    assert out[0].shape == (8, 16)
    assert float(out[0].mean()) == pytest.approx(float(metrics["val/bits_per_byte"]), rel=1e-4)


def test_bfloat16_autocast_trains():
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss({"tokens": tokens(), "targets": tokens(seed=1)})
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_generates():
    model = make_model()
    model.train()
    greedy = model.generate(tokens(2, 4), 20, temperature=0)
    assert greedy.shape == (2, 24)
    assert torch.equal(greedy, model.generate(tokens(2, 4), 20, top_k=1, seed=3))
    one, other = (model.generate("def ", 12, seed=seed) for seed in (1, 2))
    assert one.startswith("def ")
    assert one == model.generate("def ", 12, seed=1)
    assert one != other
    assert model.training


def test_greedy_continuation_of_a_learned_row():
    row = torch.arange(17)[None]
    model = make_model(n_experts=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss({"tokens": row[:, :-1], "targets": row[:, 1:]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.generate(torch.arange(4), 12, temperature=0).tolist() == list(range(16))


def test_rotary_embedding_depends_on_distance_only():
    rotary = RotaryEmbedding(8, 32)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    turned_q, turned_k = (rotary(v.expand(1, 1, 32, 8))[0, 0] for v in (q, k))
    torch.testing.assert_close(turned_q[5] @ turned_k[2], turned_q[25] @ turned_k[22], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="head_dim: found 7"):
        RotaryEmbedding(7, 32)


def test_norm_in_bfloat16_keeps_the_dtype():
    assert RMSNorm(8).bfloat16()(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_heads": 5}, "n_heads: found 5, expected a divisor of width=32"),
        ({"n_kv_heads": 3}, "n_kv_heads: found 3, expected a divisor of n_heads=4"),
        ({"top_k": 5}, "top_k: found 5, expected at most n_experts=4"),
        ({"n_experts": -1}, "n_experts: found -1"),
        ({"depth": 0}, "depth: found 0"),
        ({"vocab_size": 0}, "vocab_size: found 0"),
        ({"moe_every": 0}, "moe_every: found 0"),
        ({"head_dim": 7}, "head_dim: found 7"),
        ({"head_dim": 0}, "head_dim: found 0"),
        ({"embedding_std": -1.0}, "embedding_std: found -1"),
        ({"residual_multiplier": float("nan")}, "residual_multiplier: found nan"),
        ({"rope_base": 0.0}, "rope_base: found 0"),
        ({"scoring": "softmax"}, "scoring"),
        ({"gate": "cubic"}, "gate"),
        ({"balance": "some"}, "balance"),
        ({"expert_width": 0}, "expert_width"),
    ],
)
def test_bad_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


@pytest.mark.parametrize(
    ("name", "value"), [("width", 32.0), ("n_experts", True), ("top_k", "2"), ("head_dim", 8.0), ("init_std", "auto")]
)
def test_bad_types(name, value):
    with pytest.raises(TypeError, match=f"^{name}: found {value!r} of type"):
        make_model(**{name: value})


@pytest.mark.parametrize("n_experts", [0, 4])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *((k, "sofmax", ValueError) for k in ("activation", "scoring", "gate", "balance", "balance_scope", "backend")),
        ("route_scale", float("inf"), ValueError),
        ("jitter", -0.1, ValueError),
        ("aux_loss_coef", "none", TypeError),
    ],
)
def test_options_of_experts_are_checked_in_a_dense_model_too(n_experts, name, value, error):
    with pytest.raises(error, match=name):
        make_model(n_experts=n_experts, **{name: value})


def test_sizes_of_experts_are_checked_in_a_model_without_an_moe_block_too():
    with pytest.raises(ValueError, match=r"^top_k: found 5, expected at most n_experts=4"):
        make_model(n_experts=4, top_k=5, depth=1, moe_every=2)
    with pytest.raises(ValueError, match=r"^n_expert_groups: found 3, expected a divisor of n_experts=4"):
        make_model(n_experts=4, n_expert_groups=3, depth=1, moe_every=2)


@pytest.mark.parametrize("n_experts", [0, 4])
def test_unknown_options_are_refused_in_a_dense_model_too(n_experts):
    with pytest.raises(TypeError, match="'scorring'"):
        make_model(n_experts=n_experts, scorring="sigmoid")
    for name, own in {"bias": "ffn_bias", "n_groups": "n_expert_groups"}.items():
        with pytest.raises(TypeError, match=f"^{name}: found 1, expected nothing: the model calls it {own}"):
            make_model(n_experts=n_experts, **{name: 1})


def test_a_dense_model_may_have_the_options_of_a_model_with_experts():
    """A base often overrides n_experts alone."""
    options = {"n_expert_groups": 4, "shared_gate": True, "shared_width": 0, "choice": "token", "router_init_std": 0.1}
    assert make_model(n_experts=0, **options).moe_layers == []


def counted_flops(model):
    """FLOPs of a training step per token as torch counts them, with attention as two matrix products of full size."""
    ids = tokens(2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss({"tokens": ids, "targets": ids}).backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_heads": 2, "activation": "gelu", "tie_embeddings": True, "ffn_bias": True}]
)
def test_flops_of_a_dense_model_are_those_that_torch_counts(settings):
    """torch counts all S x S attention scores; the method half of them, as the causal mask leaves half."""
    model = make_model(n_experts=0, **settings)
    masked = 12 * 2 * 4 * 8 * 16 / 2  # 12 depth n_heads head_dim context_length / 2
    assert model.flops_per_token() == counted_flops(model) - masked


def test_flops_of_experts_are_those_of_the_active_ones():
    """A model with experts costs what a dense one of its active width does, and its routers."""
    settings = {"n_experts": 8, "top_k": 2, "expert_width": 24, "shared_width": 16, "ffn_bias": True}
    model, dense = make_model(**settings), make_model(n_experts=0, ffn_width=2 * 24 + 16)
    routers = 2 * 8 * 32  # depth n_experts width
    assert model.flops_per_token() == dense.flops_per_token() + 6 * routers


def test_biases_and_a_gated_shared_expert():
    model = make_model(moe_every=2, shared_width=8, shared_gate=True, ffn_bias=True)
    dense, moe = (block.ffn for block in model.transformer.blocks)
    assert dense.b_up is not None
    assert moe.experts.b_up is not None
    assert moe.shared.b_up is not None
    assert moe.shared_gate is not None
    loss = model.loss({"tokens": tokens(), "targets": tokens(seed=1)})
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_use():
    model = make_model()
    with pytest.raises(ValueError, match="context_length: found sequences of 17 tokens, expected at most 16"):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match="prompt: found an empty prompt"):
        model.generate("", 3)
    with pytest.raises(ValueError, match=r"prompt: found text, .* vocabulary of 300, and text needs one of 256 bytes"):
        make_model(vocab_size=300).generate("text", 3)


def test_a_uniform_draw_has_the_bounds_of_fan_in():
    """Every matrix of the blocks, each expert's too, lies within +-fan_in^-1/2 and has std (3 fan_in)^-1/2."""
    model = make_model(width=64, uniform_init=True, gated_attention=True, embedding_std=1e-4, router_init_std=0.5)
    for name, p in model.transformer.blocks.named_parameters():
        if p.ndim > 1 and not name.endswith("router.weight"):
            fan_in = p.shape[-1]
            assert float(p.abs().max()) <= fan_in**-0.5, name
            assert float(p.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name
    assert float(model.transformer.blocks[0].ffn.router.weight.std()) == pytest.approx(0.5, rel=0.2)
    assert float(model.transformer.embedding.weight.std()) == pytest.approx(1e-4, rel=0.05)
    normal = make_model(width=64).transformer.blocks[0].attention.w_q
    assert float(normal.abs().max()) > 64**-0.5  # negative control
    with pytest.raises(ValueError, match=r"init_std: found 0\.1"):
        make_model(uniform_init=True, init_std=0.1)


@pytest.mark.parametrize(("rule", "family"), [("complete-mue", "adam"), ("mssp", "adam"), ("hyperp", "sphere")])
def test_the_gate_of_attention_scales_as_a_hidden_matrix(rule, family):
    torch.manual_seed(0)
    sizes = {
        "gate": "sqrt" if rule == "hyperp" else "linear",
        "scoring": "sigmoid" if rule == "mssp" else "softmax-topk",
    }
    model = make_model(width=128, n_heads=16, gated_attention=True, **sizes)
    scaling = plan(model, base={"width": 32, "n_heads": 4}, rule=rule, family=family)
    rows = {p.name: p for p in scaling.parameters}
    gate, query = (rows[f"transformer.blocks.0.attention.{w}"] for w in ("w_g", "w_q"))
    assert (gate.role, gate.lr) == ("hidden", query.lr)
    assert gate.lr == pytest.approx(1.0 if rule == "hyperp" else 0.25)
    # Measured on a base of 4 x 32 entries: a standard error of 6 %.
    assert gate.init.value == pytest.approx(query.init.value, rel=0.25)
