"""TransferMonitor on models that expose no residual multiplier: the plan folds it into the last matrix of each branch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_mue.callbacks.transfer.expectation import _averaged
from lightning_mue.callbacks.transfer.layers import Layers
from lightning_mue.callbacks.transfer.probes import update_probes
from lightning_mue.callbacks.transfer.reach import forward_multipliers
from lightning_mue.parameterizations import ScaledStep, ScalingPlan, initialize, plan

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
transformers.logging.set_verbosity_error()


class Llama(nn.Module):
    """In a module of its own, so that the base can be made from hyperparameters."""

    def __init__(self, depth=2, kind="Llama", **sizes):
        super().__init__()
        common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = getattr(transformers, f"{kind}Config")(
            **common, num_hidden_layers=depth, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
        self.model = getattr(transformers, f"{kind}ForCausalLM")(config)


def reaches(model: nn.Module, scaling: ScalingPlan) -> dict[str, float]:
    layers = Layers(name for name, _ in model.named_parameters())
    probes = update_probes(model, scaling, layers, forward_multipliers(model, None), max_elements=4096)
    return {probe.label.split("/", 2)[2]: probe.reach for probe in probes}


def make_plan(model: nn.Module, family: str = "adam", **sizes: object) -> ScalingPlan:
    rule = {"adam": "complete-p", "sphere": "hyperp"}[family]
    return plan(model, base=lambda: Llama(2, **sizes), rule=rule, family=family)


def test_what_stands_before_the_folded_matrix_reaches_through_it():
    base, target = Llama(2, attention_bias=True), Llama(8, attention_bias=True)
    scaling = make_plan(target, attention_bias=True)
    assert scaling.folded["residual"] == pytest.approx(1 / 4)
    old, new = reaches(base, make_plan(base, attention_bias=True)), reaches(target, scaling)
    for name, reach in new.items():
        entry = scaling[name]
        assert entry.base is not None
        # The mean step of Adam is its rate, so the reach per tuned rate must not depend on the depth.
        assert reach * entry.lr == pytest.approx(old[entry.base]), name
    carried = {name for name, reach in new.items() if reach == old[scaling[name].base] * 4}
    carriers = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight")
    assert carried == {f"model.model.layers.{i}.{name}" for i in range(8) for name in carriers}


def test_a_change_relative_to_the_weight_reaches_through_the_fold_everywhere():
    base, target = Llama(2), Llama(8)
    scaling = make_plan(target, "sphere")
    m = scaling.folded["residual"]
    assert m < 1
    old, new = reaches(base, make_plan(base, "sphere")), reaches(target, scaling)
    for name in ("self_attn.o_proj.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight"):
        name = f"model.model.layers.5.{name}"
        assert new[name] == pytest.approx(old[scaling[name].base] * 4 * m)
    assert new["model.lm_head.weight"] == old["model.lm_head.weight"]


def test_the_effect_on_the_residual_stream_is_as_the_reach_says():
    """Perturbs a matrix of each kind in the last block of a random model and measures the stream's change, times the layers."""

    def effect(depth: int, name: str) -> float:
        torch.manual_seed(0)
        model = Llama(depth).double()
        m = 2 / depth
        with torch.no_grad():
            for block in model.model.model.layers:
                block.self_attn.o_proj.weight *= m
                block.mlp.down_proj.weight *= m
            tokens = torch.arange(1, 33)[None]
            before = model.model.model(tokens, output_hidden_states=True).hidden_states
            weight = model.get_parameter(f"model.model.layers.{depth - 1}.{name}")
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
            weight += 1e-4 * noise
            seen = []
            model.model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            model.model.model(tokens)
            weight -= 1e-4 * noise
            model.model.model(tokens)
        assert len(before) == depth + 1
        return depth * float((seen[0] - seen[1]).square().mean().sqrt())

    names = ("self_attn.v_proj.weight", "mlp.up_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")
    scaling, target, base = make_plan(Llama(8)), Llama(8), Llama(2)
    old, new = reaches(base, make_plan(base)), reaches(target, scaling)
    for name in names:
        a, b = f"model.model.layers.1.{name}", f"model.model.layers.7.{name}"
        # Depth itself changes the stream a little; a missing m = 1/4 would be 2 octaves.
        assert abs(math.log2(effect(8, name) / effect(2, name) / (new[b] / old[a]))) < 0.5, name


class Attention(nn.Module):
    """Queries, keys and values in one matrix, or in three."""

    def __init__(self, width, n_head, fused):
        super().__init__()
        self.n_head, self.fused = n_head, fused
        for name in ("c_attn",) if fused else ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width * (3 if fused else 1), bias=False))
        self.c_proj = nn.Linear(width, width, bias=False)


class Fused(nn.Module):
    def __init__(self, width, fused=True, n_head=2):
        super().__init__()
        self.wte = nn.Embedding(11, width)
        self.h = nn.ModuleList([nn.ModuleDict({"ln_1": nn.LayerNorm(width), "attn": Attention(width, n_head, fused)})])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_queries_that_carry_the_attention_multiplier_are_expected_to(fused, optimizer):
    """What the monitor sees of one step: the same relative update as expected, and the base's reach."""
    base, target = Fused(16, fused), Fused(128, fused)
    family = "adam" if optimizer is torch.optim.AdamW else "sgd"
    scaling = plan(target, base=lambda: Fused(16, fused), rule="mup", family=family)
    m = 8**-0.5  # the heads grow by 8, and the module divides their product by k^1/2
    assert scaling.folded["attention"] == pytest.approx(m)
    initialize(target, scaling)
    old, new = reaches(base, plan(base, rule="mup", family=family)), reaches(target, scaling)
    step = optimizer(target.parameters(), lr=1e-3, **({"weight_decay": 0.0} if family == "adam" else {}))
    scaled = ScaledStep(step, scaling, target)
    # SGD's rows move by m^2 times their gradient, and the gradient of a multiplied row is 1/m times that of one behind.
    names = ["c_attn"] if fused else ["q_proj", "k_proj", "v_proj"]
    for name in names:
        weight = target.get_parameter(f"h.0.attn.{name}.weight")
        weight.grad = torch.ones_like(weight)
        rows = slice(0, 128) if name in ("c_attn", "q_proj") else slice(0, 0)
        if family == "sgd":
            weight.grad[rows] /= m
    before = {name: target.get_parameter(f"h.0.attn.{name}.weight").detach().clone() for name in names}
    step.step()
    for name in names:
        full = f"h.0.attn.{name}.weight"
        weight, entry = target.get_parameter(full).detach(), scaling[full]
        change = float((weight - before[name]).square().mean().sqrt())
        # Of the same factor for all three, 1/8 of the rate under Adam; under SGD the rate itself.
        wanted = {"adam": 1e-3 / 8, "sgd": 1e-3 * scaling["h.0.attn.c_proj.weight"].lr}[family]
        assert new[full] / old[full] * change == pytest.approx(8 * wanted, rel=1e-3), name
        expected = _averaged([(entry, 1.0)], drawn=True)
        assert float(before[name].square().mean().sqrt()) == pytest.approx(expected.init, rel=0.03), name
        if family == "adam":
            assert change == pytest.approx(1e-3 * expected.lr, rel=1e-3), name
    scaled.remove()
