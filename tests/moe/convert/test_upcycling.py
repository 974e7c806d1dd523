"""Dense feed-forward networks of all makes become layers that start where they stand.

Tolerances: sums in another order give about 1e-7 in float32 and 1e-16 in float64; ten times that and more is allowed.
"""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue import MuECallback
from lightning_mue.moe import FeedForward, MoELayer, moe_from_ffn
from lightning_mue.moe.convert.dense_ffn import read_ffn
from lightning_mue.parameterizations.applying.initial_weights import has_weights

D, H, E = 16, 48, 8
WITHOUT_BIAS = {"w_gate", "w_up", "w_down"}


class NanoGPT(nn.Module):
    """Two Linear and a functional activation."""

    def __init__(self, bias=True, approximate="none"):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)
        self.dropout, self.approximate = nn.Dropout(0.5), approximate

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Fused(nn.Module):
    """One map for gate and up, in any of four orders."""

    def __init__(self, interleaved, up_first):
        super().__init__()
        self.both, self.out = nn.Linear(D, 2 * H), nn.Linear(H, D)
        self.interleaved, self.up_first = interleaved, up_first

    def forward(self, x):
        z = self.both(x)
        a, b = (z[..., ::2], z[..., 1::2]) if self.interleaved else z.chunk(2, dim=-1)
        return self.out(F.silu(b) * a if self.up_first else F.silu(a) * b)


class Raw(nn.Module):
    """Parameters without modules, transposed; d == h on request, so that shapes tell nothing."""

    def __init__(self, h=H):
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.randn(D, h)), nn.Parameter(torch.randn(h))
        self.w_out = nn.Parameter(torch.randn(h, D))

    def forward(self, x):
        return F.relu(x @ self.w_in + self.b_in).square() @ self.w_out


class Square(nn.Module):
    """Three maps of one shape, whose names say the opposite of what they are."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.gate = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        return self.gate(F.gelu(self.up(x)) * self.down(x))


def huggingface(kind):
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    models = transformers.models
    sizes = {"hidden_size": D, "intermediate_size": H, "num_attention_heads": 2}
    if kind == "bert":
        layer = models.bert.modeling_bert.BertLayer(transformers.BertConfig(**sizes))
        return [layer.intermediate, layer.output.dense]
    return {
        "llama": lambda: models.llama.modeling_llama.LlamaMLP(transformers.LlamaConfig(**sizes, mlp_bias=True)),
        "mistral": lambda: models.mistral.modeling_mistral.MistralMLP(transformers.MistralConfig(**sizes)),
        "qwen2": lambda: models.qwen2.modeling_qwen2.Qwen2MLP(transformers.Qwen2Config(**sizes)),
        "gemma": lambda: models.gemma.modeling_gemma.GemmaMLP(transformers.GemmaConfig(**sizes)),
        "phi3": lambda: models.phi3.modeling_phi3.Phi3MLP(transformers.Phi3Config(**sizes)),
        "gpt2": lambda: models.gpt2.modeling_gpt2.GPT2MLP(H, transformers.GPT2Config(n_embd=D)),
        "neox": lambda: models.gpt_neox.modeling_gpt_neox.GPTNeoXMLP(transformers.GPTNeoXConfig(**sizes)),
        "t5": lambda: models.t5.modeling_t5.T5DenseGatedActDense(
            transformers.T5Config(d_model=D, d_ff=H, feed_forward_proj="gated-gelu")
        ),
        "nemotron": lambda: models.nemotron.modeling_nemotron.NemotronMLP(transformers.NemotronConfig(**sizes)),
    }[kind]()


OWN = {
    "ours": (lambda: FeedForward(D, H), "swiglu"),
    "ours-gelu": (lambda: FeedForward(D, H, activation="gelu-tanh", bias=True), "gelu-tanh"),
    "sequential": (lambda: nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout(0.3)), "gelu"),
    "relu": (lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), "relu"),
    "nanogpt": (NanoGPT, "gelu"),
    "nanogpt-tanh": (lambda: NanoGPT(bias=False, approximate="tanh"), "gelu-tanh"),
    "fused": (lambda: Fused(False, False), "swiglu"),
    "fused-up-first": (lambda: Fused(False, True), "swiglu"),
    "interleaved": (lambda: Fused(True, False), "swiglu"),
    "interleaved-up-first": (lambda: Fused(True, True), "swiglu"),
    "raw": (Raw, "relu2"),
    "raw-square": (lambda: Raw(D), "relu2"),
    "square": (Square, "geglu"),
}
FOREIGN = {
    "llama": "swiglu",
    "mistral": "swiglu",
    "qwen2": "swiglu",
    "gemma": "geglu-tanh",
    "phi3": "swiglu",
    "gpt2": "gelu-tanh",
    "neox": "gelu",
    "t5": "geglu-tanh",
    "nemotron": "relu2",
    "bert": "gelu",
}


def make(kind):
    """A module of random weights and biases, or a list of modules; and the activation."""
    module, activation = (OWN[kind][0](), OWN[kind][1]) if kind in OWN else (huggingface(kind), FOREIGN[kind])
    for part in module if isinstance(module, list) else [module]:
        for p in part.parameters():
            nn.init.normal_(p, std=2 / math.sqrt(min(p.shape)) if p.ndim > 1 else 1.0)
        part.eval()
    return module, activation


def run(module, x):
    return nn.Sequential(*module)(x) if isinstance(module, list) else module(x)


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("kind", [*OWN, *FOREIGN])
def test_reads_what_a_module_computes(kind):
    module, activation = make(kind)
    ffn = read_ffn(module)
    x = torch.randn(3, 5, D)
    assert ffn.activation == activation
    assert relative(ffn(x), run(module, x)) < 1e-6
    if ffn.w_gate is not None:
        swapped = ffn._replace(w_gate=ffn.w_up, w_up=ffn.w_gate, b_gate=ffn.b_up, b_up=ffn.b_gate)
        assert relative(swapped(x), run(module, x)) > 0.1
    else:
        other = ffn._replace(activation="gelu" if activation != "gelu" else "gelu-tanh")
        assert relative(other(x), run(module, x)) > 1e-5


@pytest.mark.parametrize("change", ["bfloat16", "meta", "zero"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reads_where_the_weights_themselves_say_nothing(change, approximate):
    """In bfloat16 the two forms of GELU round to the same numbers; weights of zero or on meta give none at all."""
    module = NanoGPT(approximate=approximate)
    if change == "zero":
        for p in module.parameters():
            nn.init.zeros_(p)
    else:
        module = module.to({"bfloat16": torch.bfloat16, "meta": "meta"}[change])
    assert read_ffn(module).activation == {"none": "gelu", "tanh": "gelu-tanh"}[approximate]


def test_reading_leaves_no_trace():
    module = NanoGPT().train()
    module.dropout.eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    state = torch.get_rng_state()
    read_ffn(module)
    assert torch.equal(state, torch.get_rng_state())
    assert module.training
    assert not module.dropout.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


class Counting(NanoGPT):
    """Changes a buffer in place whenever it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_the_trial_runs_on_copies_of_buffers_and_without_hooks():
    module, seen = Counting(), []
    module.c_fc.register_forward_pre_hook(lambda *args: seen.append("before"))
    handle = module.register_forward_hook(lambda *args: seen.append("after"))
    module(torch.randn(2, D))  # both count
    assert (int(module.calls), seen) == (1, ["before", "after"])
    moe_from_ffn(module, 4)
    assert (int(module.calls), seen) == (1, ["before", "after"])
    with pytest.raises(ValueError, match="computes something else"):
        read_ffn(module, activation="relu")
    module(torch.randn(2, D))
    assert (int(module.calls), seen) == (2, ["before", "after"] * 2)
    handle.remove()  # a handle still knows its hook
    module(torch.randn(2, D))
    assert seen[4:] == ["before"]


@pytest.mark.parametrize("what", ["weight", "module"])
def test_tied_maps_are_read_as_two(what):
    s = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    if what == "weight":
        s[2].weight = s[0].weight
    else:
        s[2] = s[0]
    x = torch.randn(5, 8)
    expected = s(x)
    layer = moe_from_ffn(s, 4)
    assert torch.equal(s(x), expected)
    assert relative(layer(x), s(x)) < 1e-6
    assert torch.equal(layer.experts.w_up, layer.experts.w_down)
    layer.experts.w_down.data.zero_()  # and are two from then on
    assert not torch.equal(layer.experts.w_up, layer.experts.w_down)
    told = read_ffn(s, up_name="0", down_name="2", activation="gelu")
    assert relative(told(x), s(x)) < 1e-6


def test_names_and_activation_stand_above_what_is_found():
    module, _ = make("square")
    x = torch.randn(4, D)
    ffn = read_ffn(module, gate_name="up", up_name="down", down_name="gate")
    assert relative(ffn(x), module(x)) < 1e-6
    with pytest.raises(ValueError, match=r"computes something else .* off by"):
        read_ffn(module, gate_name="gate")
    # All told: nothing is tried, right or wrong.
    told = read_ffn(module, gate_name="gate", up_name="up", down_name="down", activation="swiglu")
    assert torch.equal(told.w_gate, module.gate.weight)
    with pytest.raises(ValueError, match=r"no feed-forward network can be read \(with up_name='upp'\)"):
        read_ffn(module, up_name="upp")
    with pytest.raises(ValueError, match="activation: found 'swish'"):
        read_ffn(module, activation="swish")


def test_named_maps_of_a_module_that_is_more_than_a_feed_forward_network():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.fc1, self.fc2, self.norm = nn.Linear(D, D), nn.Linear(D, H), nn.Linear(H, D), nn.LayerNorm(D)

        def forward(self, x, y):
            return x + self.fc2(F.gelu(self.fc1(self.norm(self.q(y)))))

    block = Block()
    ffn = read_ffn(block, up_name="fc1", down_name="fc2", activation="gelu")
    x = torch.randn(4, D)
    assert torch.allclose(ffn(x), block.fc2(F.gelu(block.fc1(x))), atol=1e-6)
    with pytest.raises(ValueError, match=r"q \[16, 16\] with bias, fc1 \[48, 16\] with bias.*expected down"):
        read_ffn(block)


class Residual(NanoGPT):
    def forward(self, x):
        return x + super().forward(x)


class Pair(NanoGPT):
    def forward(self, x):
        return super().forward(x), x


class Picky(NanoGPT):
    def forward(self, x, y):
        return super().forward(x + y)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, D)), r"other parts: 1 \(Tanh\).*swiglu, geglu"),
        (Residual(), "computes something else"),
        (Pair(), "does not return a tensor .* but tuple"),
        (Picky(), "cannot be run .*TypeError"),
        (nn.Linear(D, D), r"can be read; linear maps \[out, in\]: weight"),
        (nn.LayerNorm(D), "can be read; linear maps .*: none"),
        (nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, 40)), "in which no feed-forward network can be read"),
    ],
    ids=["tanh", "residual", "tuple", "two-inputs", "one-map", "none", "other-width"],
)
def test_what_cannot_be_read_is_said(module, message):
    with pytest.raises(ValueError, match=message):
        read_ffn(module)


@pytest.mark.parametrize("kind", [*OWN, *FOREIGN])
@pytest.mark.parametrize("how", ["copy", "split"])
def test_output_and_gradients_are_those_of_the_dense_network(kind, how):
    """Copies or parts: the sum of the experts' gradients is the dense network's, because the gates sum to one."""
    module, _ = make(kind)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    for part in module if isinstance(module, list) else [module]:
        part.double()
    layer = moe_from_ffn(module, E, 2 if how == "copy" else E, how=how)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = run(module, a), layer(b)
    assert relative(y, expected) < 1e-12
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    assert relative(b.grad, a.grad) < 1e-12
    # As the source's own parameters have them, in the source's layout: read the gradients as if they were weights.
    for part in module if isinstance(module, list) else [module]:
        for p in part.parameters():
            p.data = p.grad.clone()
    dense = read_ffn(module)
    for name in ("w_up", "w_down", "b_up", "b_down", "w_gate", "b_gate"):
        source, stack = getattr(dense, name), getattr(layer.experts, name)
        if source is None:
            assert stack is None or name.startswith("b")
            continue
        if how == "copy" or name == "b_down":  # every part has 1 / P of the output's bias
            factor = E if how == "split" else 1
            assert relative(stack.grad.sum(0) / factor, source) < 1e-12, name
        else:
            parts = torch.cat(list(stack.grad), dim=1 if name == "w_down" else 0)
            assert relative(parts, source) < 1e-12, name


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_float32_and_half(kind):
    module, _ = make(kind)
    x = torch.randn(6, D)
    assert relative(moe_from_ffn(module, E)(x), module(x)) < 1e-6
    half = moe_from_ffn(module.bfloat16(), E)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.router.balance_bias.dtype == torch.float32
    assert relative(half(x.bfloat16()).float(), module(x.bfloat16()).float()) < 2e-2


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("expert_width", "top_k", "n_groups"), [(24, 2, 1), (24, 4, 1), (12, 4, 4), (12, 4, 2), (24, 4, 4), (48, 3, 1)]
)
def test_split_is_exact_where_every_part_is_active_equally_often(expert_width, top_k, n_groups, shuffle, caplog):
    module, _ = make("llama")
    x = torch.randn(64, D)
    with caplog.at_level(logging.WARNING, "lightning_mue"):
        layer = moe_from_ffn(
            module, E, top_k, how="split", expert_width=expert_width, n_groups=n_groups, shuffle=shuffle
        )
    assert not caplog.records
    assert layer.experts.w_up.shape == (E, expert_width, D)
    assert relative(layer(x), module(x)) < 1e-6
    if expert_width < H:
        assert len(layer.last_routing.expert_ids.unique(dim=0)) > 1  # not by sending all tokens the same way
        layer.router.weight.data.normal_()  # with the rows no longer tied
        assert relative(layer(x), module(x)) > 0.05


def test_parts_are_the_hidden_units_once_each():
    module, _ = make("ours")
    layer = moe_from_ffn(module, E, 4, how="split", expert_width=12)
    rows = layer.experts.w_up.view(4, 2, 12, D)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 0].reshape(H, D), module.w_up)
    shuffled = moe_from_ffn(module, E, 4, how="split", expert_width=12, shuffle=True)
    found = shuffled.experts.w_up.view(4, 2, 12, D)[:, 0].reshape(H, D)
    assert not torch.equal(found, module.w_up)
    assert torch.equal(found.sort(dim=0).values, module.w_up.sort(dim=0).values)


@pytest.mark.parametrize(("expert_width", "top_k"), [(12, 1), (12, 3), (6, 4)])
def test_split_with_fewer_experts_is_right_on_average(expert_width, top_k, caplog):
    """The mean over all choices of experts, each chosen by a balance bias under a router of zero (equal gates)."""
    module, _ = make("llama")
    x = torch.randn(5, D, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "lightning_mue"):
        layer = moe_from_ffn(module.double(), E, top_k, how="split", expert_width=expert_width)
    assert "only on average" in caplog.text
    assert len(layer.router.weight.unique(dim=0)) == E  # ties would send all tokens to the same parts
    layer.router.weight.data.zero_()
    total, count = torch.zeros_like(x), 0
    for chosen in itertools.combinations(range(E), top_k):
        layer.router.balance_bias.zero_()[list(chosen)] = 10.0
        y = layer(x)
        assert relative(y, module(x)) > 0.1
        total, count = total + y, count + 1
    assert relative(total / count, module(x)) < 1e-6  # gates of 1/3 are rounded


@pytest.mark.parametrize("scoring", ["softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized"])
@pytest.mark.parametrize("gate", ["linear", "sqrt"])
@pytest.mark.parametrize("how", ["copy", "split"])
def test_every_scoring_is_right_at_equal_gates(scoring, gate, how, caplog):
    module, _ = make("gpt2")
    x = torch.randn(16, D)
    with caplog.at_level(logging.WARNING, "lightning_mue"):
        layer = moe_from_ffn(
            module, 4, 2, how=how, expert_width=H // (1 if how == "copy" else 2), scoring=scoring, gate=gate
        )
    normalized = scoring in ("topk-softmax", "sigmoid-normalized")
    # Split into as many parts as there are active experts, the router's tied rows make the gates equal.
    exact = normalized and (gate == "linear" or how == "split")
    assert ("do not sum to a constant" in caplog.text) == (not exact)
    assert (relative(layer(x), module(x)) < 1e-6) == exact
    layer.router.weight.data.mul_(1e-5)
    assert relative(layer(x), module(x)) < 1e-3
    layer.route_scale *= 1.1
    assert relative(layer(x), module(x)) > 0.05


def test_split_with_a_shared_expert():
    module, _ = make("gpt2")
    x = torch.randn(16, D)
    for gate in ("linear", "sqrt"):
        layer = moe_from_ffn(module, 4, 2, how="split", expert_width=16, shared_width=16, gate=gate)
        assert layer.shared.w_up.shape == (16, D)
        assert layer.expert_width == 16
        assert relative(layer(x), module(x)) < 1e-6
        layer.shared.w_down.data.zero_()
        assert relative(layer(x), module(x)) > 0.1


def test_a_route_scale_that_is_given_is_kept_and_allowed_for():
    module, _ = make("gpt2")
    x = torch.randn(16, D)
    for how, width in (("copy", H), ("split", H // 2)):
        layer = moe_from_ffn(module, E, 4, how=how, expert_width=width, route_scale=4.0)
        assert layer.route_scale == layer.hparams.route_scale == 4.0
        assert relative(layer(x), module(x)) < 1e-6
    plain = moe_from_ffn(module, E, 4, how="split", expert_width=H // 2)
    assert plain.route_scale == plain.hparams.route_scale == 2.0


def test_noise_has_the_size_that_was_asked_for():
    module = FeedForward(64, 256, init_std=0.3)
    layer = moe_from_ffn(module, 4, how="noise", noise_std=0.25, route_scale=2.0)
    for name, factor in (("w_gate", 1.0), ("w_up", 1.0), ("w_down", 0.5)):
        difference = (getattr(layer.experts, name) - factor * getattr(module, name)).detach()
        # 16384 numbers a matrix: their std is known to 0.6 percent.
        assert all(abs(float(d.std()) / (0.25 * 0.3 * factor) - 1) < 0.03 for d in difference)
        a, b = difference[0].flatten(), difference[1].flatten()
        assert abs(float(F.cosine_similarity(a, b, dim=0))) < 0.05
    small = moe_from_ffn(module, 4, how="noise", noise_std=1e-4)
    x = torch.randn(9, 64)
    assert 1e-6 < relative(small(x), module(x)) < 1e-3


def test_drop_redraws_the_same_units_of_every_matrix():
    module = FeedForward(64, 100, init_std=0.3)
    module.w_up.data += 1.0
    layer = moe_from_ffn(module, 4, how="drop", drop_fraction=0.3)
    changed = []
    for e in range(4):
        up = (layer.experts.w_up[e] != module.w_up).all(1)
        assert torch.equal(up, (layer.experts.w_gate[e] != module.w_gate).any(1))
        assert torch.equal(up, (layer.experts.w_down[e] != module.w_down).any(0))
        assert int(up.sum()) == 30
        new = layer.experts.w_up[e][up]
        assert abs(float(new.mean()) - 1.0) < 0.05  # 1920 numbers: standard error 0.007
        assert abs(float(new.std()) - 0.3) < 0.03
        changed.append(up)
    assert not torch.equal(changed[0], changed[1])


class Mine(MoELayer):
    pass


def test_follows_the_source_and_shares_nothing():
    module, _ = make("llama")
    module.down_proj.requires_grad_(False)
    layer = moe_from_ffn(module, E)
    trained = {name for name, p in layer.experts.named_parameters() if p.requires_grad}
    assert trained == {"w_gate", "w_up", "b_gate", "b_up"}
    assert layer.router.weight.requires_grad
    assert not layer.training
    assert moe_from_ffn(module.train(), E).training
    with torch.no_grad():
        assert moe_from_ffn(module, E).experts.w_up.requires_grad
    before = [p.clone() for p in module.parameters()]
    for p in layer.parameters():
        p.data.fill_(7.0)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert has_weights(layer)
    assert type(moe_from_ffn(module, E, layer_class=Mine)) is Mine
    meta = moe_from_ffn(FeedForward(D, H).to("meta"), E)
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_our_own_multiplier_is_taken_along():
    module = FeedForward(D, H)
    module.output_multiplier = 0.25
    layer = moe_from_ffn(module, E)
    x = torch.randn(4, D)
    assert layer.output_multiplier == 0.25
    assert relative(layer(x), module(x)) < 1e-6
    assert relative(read_ffn(module)(x), module(x)) < 1e-6
    for wrapped in ([module], nn.Sequential(module), nn.Sequential(torch.compile(module, backend="eager"))):
        prefix = "0._orig_mod." if hasattr(wrapped[0], "_orig_mod") else "0."
        told = {f"{n}_name": f"{prefix}w_{n}" for n in ("gate", "up", "down")} | {"activation": "swiglu"}
        for names in {}, told:
            layer = moe_from_ffn(wrapped, E, **names)
            assert layer.output_multiplier == 0.25
            assert relative(layer(x), module(x)) < 1e-6


def test_a_generator_fixes_all_draws():
    module, _ = make("gpt2")
    for how, arguments in (("noise", {}), ("drop", {}), ("split", {"shuffle": True})):
        a, b, c = (
            moe_from_ffn(module, E, how=how, generator=torch.Generator().manual_seed(seed), **arguments)
            for seed in (1, 1, 2)
        )
        state = torch.get_rng_state()
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert not torch.equal(a.experts.w_up, c.experts.w_up)
        assert not torch.equal(a.router.weight, c.router.weight)
        moe_from_ffn(module, E, how=how, generator=torch.Generator(), **arguments)
        assert torch.equal(state, torch.get_rng_state())
    assert abs(float(moe_from_ffn(FeedForward(256, 8), 64, router_init_std=0.5).router.weight.std()) - 0.5) < 0.02


def test_nothing_of_the_meta_device_stays_behind():
    layer = moe_from_ffn(FeedForward(D, H), E, balance="switch")
    tensors = [t for m in layer.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    assert not any(t.is_meta for t in [*tensors, *layer.state_dict().values()])
    assert torch.equal(layer.router.balance_bias, torch.zeros(E))
    reloaded = MoELayer(**layer.hparams)
    reloaded.load_state_dict(layer.state_dict())
    x = torch.randn(4, D)
    assert torch.equal(reloaded(x), layer(x))


@pytest.mark.parametrize("upcycled", [True, False])
def test_a_layer_trained_alone_keeps_its_weights_under_a_plan(upcycled):
    """The callback draws a fresh layer's weights anew, and leaves those that came from a network."""
    layer = moe_from_ffn(FeedForward(D, H), 4, optimizer=frozen) if upcycled else MoELayer(D, H, 4, optimizer=frozen)
    before = layer.experts.w_up.clone()
    data = DataLoader(TensorDataset(torch.randn(8, D), torch.randn(8, D)), batch_size=8)
    trainer = Trainer(
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=[MuECallback(base={"width": 8}, verbose=False)],
    )
    trainer.fit(layer, data)
    assert torch.equal(layer.experts.w_up, before) == upcycled


def frozen(parameters):
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)


def test_it_trains_and_the_copies_grow_apart():
    module, _ = make("nanogpt")
    layer = moe_from_ffn(module, 4, 2).train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(64, D), torch.randn(64, D)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target) + layer.aux_loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert relative(layer.experts.w_up[0], layer.experts.w_up[1]) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "clone"}, "how: found 'clone'"),
        ({"n_experts": 0}, "n_experts: found 0"),
        ({"top_k": 9}, "top_k: found 9, expected at most n_experts=8"),
        ({"width": 8}, "width: found 8, expected none: it is the network's, 16"),
        ({"width": None}, "width: found None, expected none: it is the network's, 16"),
        ({"how": "split", "expert_width": 0}, "expert_width: found 0, expected an integer of at least 1"),
        ({"how": "split", "shared_width": -8}, "shared_width: found -8"),
        ({"noise_std": 0.1}, "noise_std: found 0.1, expected it with how='noise' only, not with how='copy'"),
        ({"how": "noise", "noise_std": 0.0}, "noise_std: found 0.0, expected a finite number above 0"),
        ({"how": "drop", "drop_fraction": 1.5}, "drop_fraction: found 1.5, expected a number in .0, 1]"),
        ({"shuffle": True}, "shuffle: found True, expected it with how='split' only, not with how='copy'"),
        ({"expert_width": 24}, "expert_width: found 24, expected the network's own hidden width 48 with how='copy'"),
        ({"how": "split", "expert_width": 20}, r"48 hidden units.*It may be 48, 24, 12, 6\."),
        ({"how": "split", "expert_width": 16}, "expert_width: found 16, expected .* divides n_experts=8"),
        ({"how": "split", "shared_width": 48}, "nothing with this shared_width"),
        ({"shared_width": 8}, "shared_width: found 8, expected 0 with how='copy'"),
        ({"how": "split", "shared_width": 8, "shared_gate": True}, "shared_gate: found True"),
        ({"bias": False}, "bias: found False, expected True: the network has biases"),
        ({"route_scale": 0.0}, "route_scale: found 0.0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    module, _ = make("gpt2")
    with pytest.raises(ValueError, match=message):
        moe_from_ffn(module, **{"n_experts": E, **arguments})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("gpt2", r"module: found a value of type str, expected a torch.nn.Module, or a list of modules"),
        (torch.zeros(3, 3), "module: found a value of type Tensor"),
        (nn.Linear, "module: found the class Linear"),
        ([nn.Linear(D, H), F.gelu, nn.Linear(H, D)], r"module\[1\]: found a value of type builtin_function_or_method"),
    ],
    ids=["str", "tensor", "class", "function"],
)
def test_what_is_no_module_is_named(module, message):
    with pytest.raises(TypeError, match=message):
        moe_from_ffn(module, E)


def test_sizes_that_are_no_integers_and_empty_lists_are_named():
    module, _ = make("gpt2")
    for name in ("expert_width", "shared_width"):
        with pytest.raises(TypeError, match=rf"{name}: found 8.0 of type float, expected an integer of at least 1"):
            moe_from_ffn(module, E, how="split", **{name: 8.0})
    with pytest.raises(ValueError, match="module: found an empty list"):
        moe_from_ffn([], E)
