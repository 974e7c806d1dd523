"""A tied head: init and learning rate of the embedding, and the multiplier d^-1 on the logits, set or folded into a norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, initialize, param_groups, plan
from lightning_mue.parameterizations import get_rule

VOCABULARY, BASE = 17, 16


class Tied(nn.Module):
    """A look-up, one layer, a norm, and the same table as head; ``factor`` is on the head's input, so a bias stays out of it."""

    def __init__(self, width=64, exposed=False, norm=nn.LayerNorm, bias=True, tie=True, factor=1.0):
        super().__init__()
        self.hparams = {"width": width, "exposed": exposed, "norm": norm, "bias": bias, "tie": tie, "factor": factor}
        self.wte = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())])
        self.ln_f, self.head = norm(width), nn.Linear(width, VOCABULARY, bias=bias)
        if tie:
            self.head.weight = self.wte.weight
        self.head.logit_factor = factor
        self.head.register_forward_pre_hook(lambda head, args: (head.logit_factor * args[0],))
        if exposed:
            self.head.mue_multipliers = {"output": "logit_factor"}

    def forward(self, tokens):
        x = self.wte(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.ln_f(x))


class PlusOne(nn.Module):
    """Gemma's form of a gain."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class PlusOneNorm(PlusOne):
    pass


@pytest.mark.parametrize("rule", ["mup", "complete-p", "complete-mue", "moe-dmft", "mssp-I", "mssp-III", "hyperp"])
def test_table_is_the_embedding_and_the_logits_are_multiplied(rule):
    model = Tied(64, exposed=True)
    family = "sphere" if rule == "hyperp" else "adam"
    scaling = plan(model, base={"width": BASE, "factor": 0.5}, rule=rule, family=family)
    entry, embedding = scaling["wte.weight"], get_rule(rule).table(family)["embedding"]
    assert (entry.lr, entry.kind) == (1.0, "adamw")
    assert entry.eps == (0.25 if embedding.eps.startswith("d^-1") else 1.0)
    assert entry.init.value == pytest.approx(1.0, rel=0.15)
    assert scaling.multipliers == {"head.logit_factor": pytest.approx(0.5 / 4)}  # the base's own value counts
    assert scaling["head.bias"].lr == 1.0


@pytest.mark.parametrize("rule", ["sp", "hyperp-paper"])
def test_rules_that_leave_the_head_alone(rule):
    scaling = plan(Tied(64), base={"width": BASE}, rule=rule, family="sphere")
    assert scaling.folded == {}


@pytest.mark.parametrize("family", ["adam", "sgd", "sphere"])
def test_folded_and_multiplied_runs_have_the_same_losses(family):
    rule = {"sphere": "hyperp"}.get(family, "mup")
    curves = []
    settings = {"lr": 0.3 if family == "sgd" else 3e-3, "weight_decay": 0.1} | (
        {} if family == "sgd" else {"eps": 1e-4}
    )
    for exposed in (True, False):
        torch.manual_seed(0)
        model = Tied(64, exposed)
        scaling = plan(model, base={"width": BASE}, rule=rule, family=family)
        assert scaling.folded == ({} if exposed else {"output": 0.25})
        initialize(model, scaling, seed=1)
        groups = param_groups(model.double(), scaling, **settings)
        builders = {"sgd": torch.optim.SGD, "sphere": lambda g: HyperSphereOptimizer(g, compute_dtype=torch.float64)}
        optimizer, losses = builders.get(family, torch.optim.AdamW)(groups), []
        tokens = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
        for _ in range(8):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses, dtype=torch.float64))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "norm", [PlusOneNorm, lambda width: nn.LayerNorm(width, elementwise_affine=False), nn.Identity]
)
def test_without_a_gain_to_fold_into_it_is_refused_and_the_remedy_works(norm):
    with pytest.raises(ValueError, match=r"rule: found 'mup'.*register_forward_pre_hook"):
        plan(Tied(64, norm=norm), base={"width": BASE}, rule="mup")
    scaling = plan(Tied(64, norm=norm), base={"width": BASE}, rule="mup", multipliers={"output": "logit_factor$"})
    assert (scaling.folded, scaling.multipliers) == ({}, {"head.logit_factor": 0.25})


def test_two_norms_that_could_be_the_last_are_refused_until_one_is_named():
    class Two(Tied):
        def __init__(self, width=64):
            super().__init__(width)
            self.hparams = {"width": width}
            self.norm_a, self.norm_b, self.ln_f = nn.LayerNorm(width), nn.LayerNorm(width), nn.Identity()

    with pytest.raises(ValueError, match="one norm with a gain right before the head"):
        plan(Two(), base={"width": BASE}, rule="mup")
    named = plan(Two(), base={"width": BASE}, rule="mup", roles={"norm_a": "final_norm"})
    assert (named["norm_a.weight"].init.value, named["norm_b.weight"].init.value) == (0.25, 1.0)
    assert (named["norm_a.bias"].lr, named["norm_b.bias"].lr) == (0.25, 1.0)


def test_only_one_side_tied_is_refused():
    for target, base in ((True, False), (False, True)):
        with pytest.raises(ValueError, match=r"base: found embedding and unembedding tied in the .* alone"):
            plan(Tied(64, tie=target), base={"width": BASE, "tie": base})


def test_table_used_by_name_alone_is_tied_by_a_pattern():
    class Functional(nn.Module):
        def __init__(self, width=64):
            super().__init__()
            self.hparams = {"width": width}
            self.wte, self.inner, self.norm = nn.Embedding(9, width), nn.Linear(width, width), nn.LayerNorm(width)

        def forward(self, tokens):
            return self.norm(self.inner(self.wte(tokens))) @ self.wte.weight.T

    scaling = plan(Functional(), base={"width": BASE}, rule="mup", roles={"wte": "unembedding"})
    assert (scaling["wte.weight"].lr, scaling["norm.weight"].init.value) == (1.0, 0.25)


def test_an_untied_head_beside_the_tied_one_keeps_its_multiplier():
    class Heads(Tied):
        def __init__(self, width=64):
            super().__init__(width, exposed=True)
            self.hparams = {"width": width}
            self.aux_head = nn.Linear(width, 5)
            self.aux_head.mue_multipliers, self.aux_head.factor = {"output": "factor"}, 3.0

    scaling = plan(Heads(), base={"width": BASE}, rule="mup")
    assert scaling.multipliers == {"head.logit_factor": 0.25}
    assert scaling["aux_head.weight"].lr == 0.25


def _model(width, tied_rule=True):
    torch.manual_seed(width)
    model = MoELanguageModel(
        VOCABULARY, 16, width, 2, width // 16, tie_embeddings=True, unembedding_std=1.0, optimizer=torch.optim.AdamW
    )
    base = {"width": 64, "n_heads": 4}
    scaling = plan(model, base=base, rule="complete-p", multipliers=None)
    initialize(model, scaling, seed=width)
    if not tied_rule:  # negative control: the logits of the base
        model.transformer.unembedding.output_multiplier = 1.0
    return model, scaling


def _effects(width, tied_rule):
    """(RMS of the logits' change by the tied weight's as head, its share of the stream as embedding), after some steps."""
    model, scaling = _model(width, tied_rule)
    groups = param_groups(model, scaling, lr=2e-3, weight_decay=0.0)
    optimizer, generator = torch.optim.AdamW(groups, betas=(0.9, 0.95)), torch.Generator().manual_seed(5)
    table = model.transformer.embedding.weight
    before = table.detach().clone()
    for _ in range(4):
        tokens = torch.randint(0, VOCABULARY, (8, 17), generator=generator)
        loss = model.loss({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        kept = {}
        model.transformer.final_norm.register_forward_hook(lambda m, args, y: kept.update(stream=args[0], normed=y))
        model(tokens[:, :-1])
        logits = model.transformer.unembedding.output_multiplier * kept["normed"] @ (table - before).T
        share = table[tokens[:, :-1]].square().mean() / kept["stream"].square().mean()
    return logits.square().mean().sqrt().item(), share.sqrt().item()


@pytest.mark.slow
def test_effect_of_the_tied_weight_has_no_slope_in_width():
    widths = [64, 128, 256, 512, 1024]
    x = torch.tensor(widths, dtype=torch.float64).log2()

    def slopes(tied_rule):
        values = torch.tensor([_effects(width, tied_rule) for width in widths], dtype=torch.float64).log2()
        centered = x - x.mean()
        return (centered[:, None] * values).sum(0) / centered.square().sum()

    sound, control = slopes(True), slopes(False)
    assert sound.abs().max() < 0.2, sound
    assert control[0] > 0.5, control


def test_model_of_this_package_sets_its_own_multiplier():
    model, scaling = _model(128)
    assert scaling.multipliers["transformer.unembedding.output_multiplier"] == 0.5
    assert model.transformer.unembedding.output_multiplier == 0.5
    assert copy.deepcopy(model).transformer.unembedding.output_multiplier == 0.5
