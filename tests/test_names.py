"""One reading of names: the same module is a head, a table or a vector for the plan, the optimizer and the monitors."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue import plan
from lightning_mue.callbacks import LogitsZMonitor
from lightning_mue.names import clean_name, is_head, plain_name, split_layer
from lightning_mue.optim import HyperSphereOptimizer

VOCAB = 24


class Model(LightningModule):
    """Two numbered blocks between a table and what a test adds, at a dotted path."""

    def __init__(self, path, make, width):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(width), "fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)}
            )
            for _ in range(2)
        )
        self.norm_f = nn.LayerNorm(width)
        *parents, leaf = path.split(".")
        owner = self
        for parent in parents:
            if not hasattr(owner, parent):
                setattr(owner, parent, nn.Module())
            owner = getattr(owner, parent)
        setattr(owner, leaf, make(width))


class StateSpace(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1.0, 5.0).log().expand(width, 4).clone())


def linear(width):
    return nn.Linear(width, VOCAB, bias=False)


def table(width):
    return nn.Embedding(VOCAB, width)


def normed_table(width):
    return nn.utils.parametrizations.weight_norm(nn.Embedding(VOCAB, width))


def normed_head(width):
    return nn.utils.parametrizations.weight_norm(nn.Linear(width, VOCAB, bias=False))


def several(make):
    return lambda width: nn.ModuleList([make(width), make(width)])


def saved_head(width):
    """As PEFT keeps a head that is trained beside its adapters."""
    wrapper = nn.Module()
    wrapper.original_module = linear(width).requires_grad_(False)
    wrapper.modules_to_save = nn.ModuleDict({"default": linear(width)})
    return wrapper


def saved_table(width):
    wrapper = nn.Module()
    wrapper.modules_to_save = nn.ModuleDict({"default": table(width)})
    return wrapper


REFUSED = None  # the plan does not scale the parts of a weight norm by themselves
HEAD, TABLE = ("unembedding", "adam_sphere", True), ("embedding", "adamw", False)
HIDDEN_UP = ("ffn_up", "sphere", False)

CASES = [
    *((name, linear, HEAD) for name in ("lm_head", "head", "output", "score", "classifier", "embed_out", "readout")),
    *((name, linear, HEAD) for name in ("generator", "proj_out", "to_logits", "decoder", "output_layer", "mlm_head")),
    *((name, linear, HEAD) for name in ("unembed", "net.lm_head", "output_projection", "cls.predictions.decoder")),
    ("heads", several(linear), HEAD),
    ("lm_head", saved_head, HEAD),
    ("module.lm_head", linear, HEAD),
    ("lm_head", normed_head, (REFUSED, "adam_sphere", True)),
    ("embed_tokens", table, TABLE),
    ("value_embeds", several(table), TABLE),
    ("word_embeddings", saved_table, TABLE),
    ("embedding", normed_table, (REFUSED, "adamw", False)),
    ("wpe", table, TABLE),
    ("mixer", StateSpace, ("scalar", "adamw", False)),
]


def added(model):
    known = {id(p) for part in (model.tokens, model.blocks, model.norm_f) for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in known and p.requires_grad and p.ndim > 1}


@pytest.mark.parametrize(
    ("path", "make", "expected"), CASES, ids=[f"{path}-{make.__name__}" for path, make, _ in CASES]
)
def test_plan_optimizer_and_monitor_read_a_name_alike(path, make, expected):
    role, kind, watched = expected
    model = Model(path, make, 32)
    parameters = added(model)
    assert parameters

    arguments = {"base": lambda: Model(path, make, 16), "rule": "hyperp", "family": "sphere"}
    if role is REFUSED:
        with pytest.raises(ValueError, match=r"roles: found no role for .*original0.*original1"):
            plan(model, **arguments)
    else:
        made = plan(model, **arguments)
        assert {made[name].role for name in parameters} == {role}
        assert {made[name].kind for name in parameters} == {kind}

    optimizer = HyperSphereOptimizer((name, p) for name, p in parameters.items() if not name.endswith("original0"))
    assert {group["kind"] for group in optimizer.param_groups} == {kind}

    probes = LogitsZMonitor().find_probes(model)
    found = [probe for probe in probes if probe.label.startswith("lm_logits")]
    assert bool(found) is watched


@pytest.mark.parametrize(
    ("path", "make", "kind"),
    [
        ("blocks.0.head", linear, "sphere"),  # of an attention: a head of the model is outside the blocks
        ("decoder.layers.0.fc1", linear, "sphere"),
        ("head.0", linear, "sphere"),  # of a Sequential: its shapes tell which layer is the last
        ("time_embed.2", linear, "sphere"),
        ("embed_proj", linear, "sphere"),
        ("blocks.0.out_proj", linear, "sphere"),
        ("blocks.0.out_proj.parametrizations.weight.original0", linear, "adamw"),  # lengths
    ],
)
def test_names_that_only_look_like_heads_and_tables(path, make, kind):
    (group,) = HyperSphereOptimizer([(path if "original" in path else f"{path}.weight", make(8).weight)]).param_groups
    assert group["kind"] == kind
    assert not is_head(path)


def test_names_identify_and_names_mean():
    parts = ("embed.parametrizations.weight.original0", "embed.parametrizations.weight.original1")
    assert {plain_name(part) for part in parts} == {"embed.weight"}
    assert {clean_name(part) for part in parts} == set(parts)  # two parameters stay two
    assert plain_name("module.lm_head.base_layer.weight") == "lm_head.weight"
    assert plain_name("embed.weight_v") == "embed.weight"
    assert plain_name("module") == "module"
    assert split_layer("_orig_mod.blocks.3.w") == ("_orig_mod.blocks.*.w", 3)
