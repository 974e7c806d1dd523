"""An exported plan trains a model of the other code base as MuECallback trains ours: rates, decay, eps, initial sizes, folds."""

import re

import pytest
import torch
from helpers.code_bases import Rebuilt, by_place, load, megatron_groups, renamed, torchtitan_groups

from lightning_mue.models import MoELanguageModel
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.parameterizations import initialize, plan
from lightning_mue.parameterizations.applying.groups import scale_groups
from lightning_mue.parameterizations.exporting.export import export_plan
from lightning_mue.parameterizations.exporting.settings import settings_of
from lightning_mue.parameterizations.reading.parameters import named_tensors

BASE = {"width": 16, "depth": 2, "n_heads": 1, "n_experts": 0}


def make(rule="complete-mue", base=BASE, moe_every=2, **options):
    torch.manual_seed(options.pop("seed", 0))
    model = MoELanguageModel(
        vocab_size=40, context_length=16, width=32, depth=4, n_heads=2, n_experts=4, moe_every=moe_every, **options
    )
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.5, eps=1e-6)
    return model, plan(model, base=base, rule=rule, alpha=0.5), optimizer


def folds(model, made, optimizer):
    """(place, layer) -> the multiplier that its weight carries, from the initial std."""
    tensors = named_tensors(model)
    names = {tensor: name for name, tensor in tensors.items()}
    groups = {names[p]: g for g in scale_groups(optimizer.param_groups, made, names) for p in g["params"]}
    settings = settings_of(made, groups)
    found = {}
    for entry in made.parameters:
        ((place, layer),) = by_place({entry.name: 0})
        setting = next(s for s in settings if s.place == place and (not s.layers or layer in s.layers))
        found[place, layer] = setting.init.value / entry.init.value
    return found


def scaled(tensors, factors, power):
    keys = {name: next(iter(by_place({name: 0}))) for name in tensors}
    return {name: tensor * factors[keys[name]] ** power for name, tensor in tensors.items()}


def step_of_ours(model, made, optimizer):
    """Our update, and the gradients that made it."""
    initialize(model, made)
    for path, value in made.multipliers.items():
        module, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(module), attribute, value)
    tokens = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(3))
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    names = {p: n for n, p in model.named_parameters()}
    torch.optim.AdamW(scale_groups(optimizer.param_groups, made, names)).step()
    return before, gradients, {name: p.detach() - before[name] for name, p in model.named_parameters()}


CASES = {
    "megatron, local experts": ("megatron", 0, megatron_groups),
    "megatron, grouped experts": ("megatron", 1, megatron_groups),
    "torchtitan 0.3": ("torchtitan", 0, torchtitan_groups),
    "torchtitan 0.2": ("torchtitan", 1, torchtitan_groups),
    "transformers, stacked": ("transformers", 0, lambda module, exported: exported.param_groups(module)),
    "transformers, lists": ("transformers", 1, lambda module, exported: exported.param_groups(module)),
}


@pytest.mark.parametrize("rule", ["complete-mue", "moe-dmft"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_update_of_every_weight_is_ours(case, rule):
    base = BASE if rule == "complete-mue" else {**BASE, "n_experts": 2, "top_k": 1}
    target, alternative, groups_of = CASES[case]
    model, made, optimizer = make(rule, base, shared_width=16 if rule == "complete-mue" else 0)
    exported = load(export_plan(model, made, [optimizer], to=target))
    before, gradients, update = step_of_ours(model, made, optimizer)
    factors = folds(model, made, optimizer)
    assert rule == "moe-dmft" or len({round(f, 6) for f in factors.values()}) >= 3  # something is folded
    theirs = Rebuilt(renamed(scaled(before, factors, 1), target, alternative))
    for name, gradient in renamed(scaled(gradients, factors, -1), target, alternative).items():
        theirs.get_parameter(name).grad = gradient
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    torch.optim.AdamW(groups_of(theirs, exported)).step()
    wanted = renamed(scaled(update, factors, 1), target, alternative)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.detach() - start[name], wanted[name], rtol=1e-3, atol=1e-7)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.5, eps=1e-6)
    assert len(plain.param_groups[0]["params"]) == len(wanted)  # the control below is over the same weights
    for name, p in theirs.named_parameters():
        p.data.copy_(start[name])
    plain.step()
    off = [n for n, p in theirs.named_parameters() if not torch.allclose(p - start[n], wanted[n], rtol=1e-3)]
    assert off  # without the plan's groups the step is another


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_get_the_planned_size(case):
    target, alternative, _ = CASES[case]
    model, made, optimizer = make()
    exported = load(export_plan(model, made, [optimizer], to=target))
    before, _, _ = step_of_ours(model, made, optimizer)
    drawn = {
        name: torch.ones_like(t) if t.dim() == 1 else torch.randn_like(t)
        for name, t in renamed(before, target, alternative).items()
    }
    theirs = Rebuilt(drawn)
    exported.initialize(theirs)
    wanted = renamed(scaled(before, folds(model, made, optimizer), 1), target, alternative)
    for name, p in theirs.named_parameters():
        rms, planned = p.square().mean().sqrt(), wanted[name].square().mean().sqrt()
        assert abs(rms / planned - 1) < 6 / (2 * p.numel()) ** 0.5, name  # ours is a draw of as many entries


def test_an_own_loop_gets_names_multipliers_and_any_update():
    model, _, _ = make(moe_every=1)
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.05, adamw_lr=0.01, momentum=0.8)
    made = plan(model, base=BASE, rule="hyperp", family="sphere")
    exported = load(export_plan(model, made, [optimizer], to="param-groups"))
    exported.initialize(model)
    exported.set_multipliers(model)
    stepper = HyperSphereOptimizer(exported.param_groups(model))
    by_name = {id(p): g for g in stepper.param_groups for p in g["params"]}
    names = {p: n for n, p in model.named_parameters()}
    for group in scale_groups(optimizer.param_groups, made, names):
        for p in group["params"]:
            theirs = by_name[id(p)]
            assert all(theirs[key] == pytest.approx(group[key], rel=1e-9) for key in ("lr", "momentum", "eps", "betas"))
            assert theirs["kind"] == group["kind"]
    assert {path: _get(model, path) for path in made.multipliers} == made.multipliers


def _get(model, path):
    module, _, attribute = path.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def test_other_layers_get_other_lines():
    model, made, optimizer = make()
    source = export_plan(model, made, [optimizer], to="param-groups")
    assert "'transformer.blocks.*.attention.w_q'" in source
    exported = load(source)
    with pytest.raises(ValueError, match=r"head\.weight: found in 0 groups, expected one"):
        exported.initialize(Rebuilt({"head.weight": torch.ones(2, 2)}))
    zeros = Rebuilt({"transformer.unembedding.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"transformer\.unembedding\.weight: found only zeros"):
        exported.initialize(zeros)


class Foreign(torch.nn.Module):
    """Names that no layout has."""

    def __init__(self, width=32):
        super().__init__()
        self.hparams = {"width": width}
        self.tok, self.out = torch.nn.Embedding(10, width), torch.nn.Linear(width, 10, bias=False)
        self.mix = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(2))


def test_unknown_names_are_refused_or_given():
    model = Foreign()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    made = plan(model, base={"width": 16}, rule="mup", roles={"mix": "hidden", "out": "unembedding"})
    with pytest.raises(
        ValueError, match=r"names: found 4 parameter\(s\) whose place is not known by name: tok\.weight"
    ):
        export_plan(model, made, [optimizer], to="megatron")
    names = {r"^tok\.": "embedding", r"^out\.": "unembedding", r"^mix\.(?P<layer>\d+)\.": "o"}
    exported = load(export_plan(model, made, [optimizer], to="megatron", names=names))
    rates = {pattern: options["lr"] for patterns, options in exported.GROUPS for pattern in patterns}
    assert rates["decoder.layers.*.self_attention.linear_proj.weight"] == made["mix.0.weight"].lr * 1e-2


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [
        (
            {"gated_attention": True},
            "megatron",
            r"--to: found weights that the models of megatron lack: attention_gate",
        ),
        ({"ffn_bias": True}, "torchtitan", r"--to: found weights that the models of torchtitan lack: .*up\.bias"),
        ({}, "nemo", r"--to: found 'nemo', expected one of 'param-groups'"),
    ],
)
def test_what_a_code_base_lacks_is_refused(options, to, message):
    model, made, optimizer = make(moe_every=1, **options)
    with pytest.raises(ValueError, match=message):
        export_plan(model, made, [optimizer], to=to)


def test_the_sphere_is_for_own_loops():
    model, _, _ = make()
    sphere = HyperSphereOptimizer(model.named_parameters(), lr=0.05)
    made = plan(model, base=BASE, rule="hyperp", family="sphere")
    with pytest.raises(ValueError, match=re.escape("plan: found the update(s) adam_sphere, sphere")):
        export_plan(model, made, [sphere], to="torchtitan")
