from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue.analysis.probe import ModuleProbe, tensor_of
from lightning_mue.models import MoELanguageModel
from lightning_mue.moe import RoutingInfo


def rms(x):
    return float(x.detach().double().square().mean().sqrt())


def move(module, scale=0.1, seed=1):
    """Changes every trainable parameter by noise; returns clean name -> how it was before."""
    generator = torch.Generator().manual_seed(seed)
    before = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            before[name] = p.clone()
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return before


def probe(module, *inputs, roles=None, run=None):
    return ModuleProbe(module, run or (lambda: module(*inputs)), roles or {})


def values(measured):
    return {(m.name, m.quantity): m.rms for m in measured}


class Net(nn.Module):
    """Two linear layers, so that the second one's input changes too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_linear_layers_by_their_closed_forms():
    """update = (W_t - W_0) x_t, propagated = W_0 (x_t - x_0), for a bias its own change; to float32 rounding."""
    net, x = Net(), torch.randn(7, 6)
    p = probe(net, x)
    x_0 = torch.tanh(net.first(x)).detach()
    old = move(net)
    x_t = torch.tanh(net.first(x)).detach()
    got = values(p.measure())
    w, w_0 = net.second.weight.detach(), old["second.weight"]
    assert got["second.weight", "update"] == pytest.approx(rms(x_t @ (w - w_0).T), rel=1e-5)
    assert got["second", "propagated"] == pytest.approx(rms((x_t - x_0) @ w_0.T), rel=1e-5)
    bias = (net.second.bias.detach() - old["second.bias"]).expand(7, 5)
    assert got["second.bias", "update"] == pytest.approx(rms(bias), rel=1e-5)
    change = x_t @ w.T + net.second.bias.detach() - (x_0 @ w_0.T + old["second.bias"])
    assert got["second", "change"] == pytest.approx(rms(change), rel=1e-5)
    assert got["first.weight", "update"] == pytest.approx(
        rms(x @ (net.first.weight.detach() - old["first.weight"]).T), rel=1e-5
    )
    assert got["first", "propagated"] == 0.0  # its input is the data
    assert got["second", "output"] == pytest.approx(rms(net(x)), rel=1e-5)


def test_nothing_has_changed_before_training():
    net = Net()
    got = values(probe(net, torch.randn(3, 6)).measure())
    assert all(value == 0.0 for (_, quantity), value in got.items() if quantity != "output")
    assert len(got) == 3 + 2 * 3  # three parameters; change, propagated, output of two modules


def test_embedding_and_tied_head():
    """A tied weight is measured where it looks up and where it projects, under one role."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    net, ids = Tied(), torch.randint(0, 11, (2, 9))
    p = probe(net, ids, roles={"embedding.weight": "unembedding"})
    old = move(net)["embedding.weight"]
    measured = p.measure()
    got, new = values(measured), net.embedding.weight.detach()
    assert got["embedding.weight", "update"] == pytest.approx(rms((new - old)[ids]), rel=1e-5)
    assert got["head.weight", "update"] == pytest.approx(rms(new[ids] @ (new - old).T), rel=1e-5)
    assert {m.role for m in measured if m.quantity == "update"} == {"unembedding"}


def test_calls_of_one_module_are_pooled_and_keyword_inputs_caught():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            return self.scale(x=x) + self.scale(2 * x)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.ones(4))

        def forward(self, x, power=1):
            return self.g * x**power

    net, x = Twice(), torch.randn(5, 4)
    p = probe(net, x)
    move(net)
    expected = rms((net.scale.g.detach() - 1) * torch.cat((x, 2 * x)))
    assert values(p.measure())["scale.g", "update"] == pytest.approx(expected, rel=1e-5)


def test_stacked_experts_and_router():
    """The experts' update is at today's routing; the router is judged by its logits."""
    torch.manual_seed(0)
    model = MoELanguageModel(width=16, depth=1, n_heads=2, n_experts=4, top_k=2, expert_width=8, context_length=8)
    ids = torch.randint(0, 256, (2, 8))
    p = probe(model, ids)
    old = move(model, scale=0.02)
    got = values(p.measure())
    layer, caught = model.transformer.blocks[0].ffn, {}
    layer.experts.register_forward_pre_hook(lambda m, args: caught.update(x=args[0], routing=args[1]))
    layer.router.register_forward_pre_hook(lambda m, args: caught.update(z=args[0]))
    model.eval()(ids)
    name = "transformer.blocks.0.ffn."
    dw = (layer.router.weight - old[name + "router.weight"]).detach()
    assert got[name + "router.weight", "update"] == pytest.approx(rms(caught["z"] @ dw.T), rel=1e-4)

    def experts(w_down):
        y = torch.zeros_like(caught["x"])
        for t, (gates, chosen) in enumerate(zip(caught["routing"].gates, caught["routing"].expert_ids, strict=True)):
            for g, i in zip(gates, chosen, strict=True):
                hidden = F.silu(layer.experts.w_gate[i] @ caught["x"][t]) * (layer.experts.w_up[i] @ caught["x"][t])
                y[t] += g * (w_down[i] @ hidden)
        return y.detach()

    expected = rms(experts(layer.experts.w_down) - experts(old[name + "experts.w_down"]))
    assert got[name + "experts.w_down", "update"] == pytest.approx(expected, rel=1e-4)


class Positions(nn.Module):
    """Position table and gain are used outside of any module of their own: before the layers, and behind them."""

    def __init__(self):
        super().__init__()
        self.position, self.gain = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, x):
        x = x + self.position
        for block in self.blocks:
            x = x + block(x)
        return self.head(x * self.gain)


def test_parameters_around_the_head_are_seen_before_it():
    """At the output of the first layer, which the head's size does not change; those behind the layers only at the logits."""
    net, x = Positions().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    p = probe(net, x, roles={"position": "embedding", "gain": "final_norm", "head.weight": "unembedding"})
    old = move(net)
    got = values(p.measure())
    with torch.no_grad():
        moved = (net.position - old["position"]) @ net.blocks[0].weight.T
        y = net(x)
        net.gain.copy_(old["gain"])
        logits = y - net(x)
    assert got["position", "update"] == pytest.approx(rms(moved), rel=1e-10)
    assert got["gain", "update"] == pytest.approx(rms(logits), rel=1e-10)


def test_fused_attention_of_torch():
    """nn.MultiheadAttention has its projections in one matrix, never calls its out_proj, and returns a tuple."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    p = ModuleProbe(attention, lambda: attention(x, x, x, need_weights=False), {})
    old = move(attention)
    got = values(p.measure())
    assert p.unseen == []
    for name, parameter in attention.named_parameters():
        now, new = parameter.detach().clone(), attention(x, x, x, need_weights=False)[0]
        with torch.no_grad():
            parameter.copy_(old[name])
        expected = rms(new - attention(x, x, x, need_weights=False)[0])
        with torch.no_grad():
            parameter.copy_(now)
        assert got[name, "update"] == pytest.approx(expected, rel=1e-3)


def test_a_transformer_encoder_of_torch_is_seen_whole():
    """In evaluation mode it would take a path that calls no submodule."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    p = probe(net, torch.randn(2, 5, 8))
    move(net)
    got = values(p.measure())
    assert p.unseen == []
    updates = {name for name, quantity in got if quantity == "update"}
    assert updates == {name for name, _ in net.named_parameters()}
    assert ("layers.1", "change") in got
    w_dx = got["layers.0.linear2", "propagated"]
    assert w_dx > 0


def test_dropout_and_modes():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    net[2].eval()
    p = probe(net, torch.randn(6, 4))
    assert values(p.measure())["0", "change"] == 0.0
    assert values(p.measure())["2", "change"] == 0.0  # with dropout on it would not be
    assert (net.training, net[1].training, net[2].training) == (True, True, False)


def test_repeating_a_module_leaves_the_random_numbers_of_the_run_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise, self.last = Noise(), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.noise(x) + torch.randn_like(x))

    class Noise(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)

        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    net, x = Noisy(), torch.randn(5, 4)

    def run():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            net(x)

    p = ModuleProbe(net, run, {})
    assert values(p.measure())["last", "change"] == 0.0


def test_data_dependent_shapes_have_an_update_but_no_change():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.rows = 3

        def forward(self, x):
            return torch.cat((self.experts[0](x[: self.rows]), self.experts[1](x[self.rows :])))

    net, x = Experts(), torch.randn(6, 4)
    p = probe(net, x)
    net.rows = 6
    move(net)
    got = values(p.measure())
    assert ("experts.0.weight", "update") in got
    assert ("experts.0", "change") not in got
    assert ("experts.1.weight", "update") not in got  # no tokens: nothing to measure, and no division by zero


def test_what_the_run_does_not_call_is_unseen_and_frozen_parameters_are_left_out():
    net = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
    net["frozen"].requires_grad_(False)
    x = torch.randn(2, 3)
    p = ModuleProbe(net, lambda: net["frozen"](net["used"](x)), {})
    assert p.unseen == ["idle.weight", "idle.bias"]
    assert not any("frozen" in m.name for m in p.measure())


def test_hooks_do_not_stay():
    net = Net()
    probe(net, torch.randn(2, 6)).measure()
    assert not any(m._forward_hooks for m in net.modules())


def test_tensor_of():
    x = torch.randn(3)
    routing = RoutingInfo(torch.zeros(1, 1).long(), torch.ones(1, 1), x, torch.ones(3).long())
    assert tensor_of(routing) is not None
    assert torch.equal(tensor_of(routing), x)
    assert torch.equal(tensor_of((torch.arange(3), [x])), x)
    assert torch.equal(tensor_of({"ids": torch.arange(3), "hidden": x}), x)
    assert tensor_of((torch.arange(3), None, "text")) is None
