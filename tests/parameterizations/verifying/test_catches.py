"""verify finds every plan that was once wrong: each fix is undone in turn, and what it names is the parameter or the cause.

Sizes are those of the zoo: width 32, depth 2, 4 experts as the base.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from helpers.zoo_layouts import LAYOUTS
from helpers.zoo_models import DENSE, MOE, OTHERS, build, causal, experts_of, images, named, noise, tokens
from lightning_mue import plan, verify_plan
from lightning_mue.parameterizations.applying import scaled_step
from lightning_mue.parameterizations.planning import evaluate, match, multipliers, tied
from lightning_mue.parameterizations.reading.roles import folding
from lightning_mue.parameterizations.reading.stacks import Stacks

ZOO = {**DENSE, **MOE, **OTHERS, **LAYOUTS}
pytestmark = pytest.mark.slow


@contextmanager
def replaced(*places):
    """Sets (object, name, value) for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setattr(*place)
        yield


def misread(pattern, **fields):
    """Parameters whose name holds a pattern get other fields (a role, fans) than the reading gives them."""
    original = match._with_roles

    def change(target, base):
        return tuple(
            [dataclasses.replace(info, **fields) if pattern in info.name else info for info in infos]
            for infos in original(target, base)
        )

    return match, "_with_roles", change


def check(make_target, make_base, case, **arguments):
    torch.manual_seed(0)
    return verify_plan(make_target(), case.batch(), base=make_base, loss=case.loss, **arguments)


def of(name, target, base=(32, 2, 4), **arguments):
    case = ZOO[name]
    return check(lambda: case.make(*target), lambda: case.make(*base), case, **arguments)


def named_by(result, part):
    return [str(d) for d in result.deviations if part in d.parameter]


def test_depth_that_counts_experts_of_a_list():
    original = Stacks.depths

    def depths(self):
        experts = len({i.name.split("experts.")[1].split(".")[0] for i in self.infos if "experts." in i.name}) or 1
        return {name: count * experts for name, count in original(self).items()}

    with replaced((Stacks, "depths", depths)):
        result = of("litgpt moe", (32, 2, 8), (32, 2, 0))
    assert named_by(result, "attn.proj")
    assert "takes the depth to grow by 8, while the number of layers that run grows by 1" in str(result)


def test_tied_weight_drawn_as_a_head():
    """The rule that this project had: init and rate of an unembedding, no multiplier on the logits."""
    row = lambda self, role, info, family: self.rule.table(family)[role]  # noqa: E731
    with replaced((evaluate.Scale, "_row", row), (tied.TiedHead, "of", classmethod(lambda *args: None))):
        result = of("GPT2", (128, 2, 0))
    assert named_by(result, "wte")


def test_tied_logits_without_their_multiplier():
    with replaced((tied.TiedHead, "of", classmethod(lambda *args: None))):
        result = of("GPT2", (128, 2, 0))
    assert "the model's output at initialization" in str(result) or named_by(result, "wte")


@pytest.mark.parametrize("undo", [False, True])
def test_down_matrices_of_swiglu_experts_read_as_up(undo):
    """4 active experts from a dense base: A grows by 4, and the down matrices' std by 2."""
    case = causal("Mixtral", experts_of("num_local_experts", num_experts_per_tok=4))
    original = folding._folds_of
    places = [
        (evaluate.Scale, "parameter", as_up(evaluate.Scale.parameter)),
        (folding, "_folds_of", lambda info: frozenset() if info.role is match.Role.EXPERT_DOWN else original(info)),
    ]
    with replaced(*(places if undo else [])):
        result = check(lambda: case.make(32, 2, 8), lambda: ZOO["Llama"].make(32, 2, 0), case)
    assert bool(named_by(result, "experts.down_proj")) is undo, str(result)


def as_up(original):
    def parameter(self, info, folded):
        if info.role is match.Role.EXPERT_DOWN:
            info = dataclasses.replace(info, role=match.Role.EXPERT_UP)
        return original(self, info, folded)

    return parameter


def llama(width, ffn):
    sizes = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": 2, "num_attention_heads": width // 8}
    return build("Llama", "ForCausalLM", **sizes, num_key_value_heads=2, vocab_size=48, tie_word_embeddings=False)


def test_wider_ffn_at_the_same_width_is_no_fault():
    result = check(lambda: llama(32, 512), lambda: llama(32, 64), ZOO["Llama"])
    assert result.passed, str(result)


def test_end_of_a_branch_not_found():
    original = folding.residual_ends
    ends = lambda infos: {path for path in original(infos) if "mlp" not in path}  # noqa: E731
    with replaced((folding, "residual_ends", ends), (multipliers, "why_not_foldable", lambda *args: None)):
        result = of("Llama", (32, 8, 0))
    assert named_by(result, "mlp.down_proj")
    assert not named_by(result, "o_proj")


@pytest.mark.parametrize("undo", [False, True])
def test_fixed_heads_whose_rows_are_not_folded(undo):
    """GPT-2 with 4 heads at every width: the logits need k^-1."""
    case = named("GPT2", "LMHeadModel", "n_embd n_layer unused n_inner", n_head=4)
    original = folding._folds_of
    bare = lambda info: original(info) - {"attention"}  # noqa: E731
    places = [(folding, "_folds_of", bare), (multipliers, "without_query", lambda *args: [])] if undo else []
    with replaced(*places):
        result = check(lambda: case.make(256, 2, 0), lambda: case.make(32, 2, 0), case)
    assert ("factor k^-1 of the head dimension" in str(result)) is undo, str(result)


class Upsampler(nn.Module):
    """A convolution, a depthwise transposed one that doubles the image, and a head."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, width, 3, padding=1), nn.ConvTranspose2d(width, width, 4, 2, 1, groups=width)
        self.norm, self.head = nn.GroupNorm(4, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.up(torch.relu(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize("undo", [False, True])
def test_fans_of_a_depthwise_transposed_convolution(undo):
    """Its fan-in does not grow with the channels."""

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    original = match._with_roles

    def change(target, base):
        wrong = lambda i: dataclasses.replace(i, role=match.Role.HIDDEN, fans=(i.shape[0] * 16, 16), groups=1)  # noqa: E731
        return tuple([wrong(i) if i.name == "up.weight" else i for i in infos] for infos in original(target, base))

    torch.manual_seed(0)
    with replaced(*([(match, "_with_roles", change)] if undo else [])):
        result = verify_plan(Upsampler(256), images(), base=lambda: Upsampler(32), loss=loss)
    assert bool(named_by(result, "up.weight")) is undo, str(result)


def test_time_constants_read_as_a_hidden_matrix_are_scaled_and_drawn_as_before():
    """Their fan-in does not grow and their values are kept, so that reading leaves the plan as it is."""
    scalings = []
    for places in ([], [misread("A_log", role=match.Role.HIDDEN)]):
        with replaced(*places):
            scalings.append(plan(ZOO["Mamba"].make(128, 2, 0), base=lambda: ZOO["Mamba"].make(32, 2, 0)))
    right, wrong = (scaling["backbone.layers.0.mixer.A_log"] for scaling in scalings)
    assert (wrong.role, wrong.lr, wrong.init.kind) == ("hidden", right.lr, right.init.kind) == ("hidden", 1.0, "keep")


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as Lookahead does; its own groups hold no rate that counts."""

    mue_family = "adam"

    def __init__(self, optimizer):
        self.optimizer = self.base_optimizer = optimizer
        super().__init__([dict(group) for group in optimizer.param_groups], {})

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("undo", [False, True])
def test_inner_optimizer_that_stays_unscaled(undo):
    places = [(scaled_step, "inner_optimizer", lambda optimizer: optimizer)] if undo else []
    with replaced(*places):
        result = of(
            "Llama", (128, 2, 0), (32, 2, 0), optimizer=lambda model: Wrapper(AdamW(model.parameters(), lr=1e-2))
        )
    found = named_by(result, "mlp.up_proj")
    assert bool(found) is undo, str(result)
    assert all("learning rate or multiplier is too large" in text for text in found)


@pytest.mark.parametrize(
    ("name", "target", "pattern", "role"),
    [
        ("Llama", (128, 2, 0), r"up_proj", "embedding"),
        ("Llama", (128, 2, 0), r"o_proj", "bias"),
        ("Llama", (128, 2, 0), r"lm_head", "embedding"),
        ("Llama", (128, 2, 0), r"embed_tokens", "hidden"),
        ("GPTNeoX", (128, 2, 0), r"query_key_value\.weight", "embedding"),
        ("minGPT", (128, 2, 0), r"c_fc\.weight", "embedding"),
        ("DiT", (128, 2, 0), r"adaLN_modulation.*weight", "embedding"),
        ("Mixtral", (128, 2, 4), r"experts\.gate_up_proj", "embedding"),
        ("Mixtral", (128, 2, 4), r"experts\.down_proj", "embedding"),
        ("Mamba", (128, 2, 0), r"in_proj", "embedding"),
        ("ViT", (128, 2, 0), r"attention\.v_proj\.weight", "embedding"),
        ("nanoMoE", (128, 2, 4), r"experts\.c_fc", "embedding"),
    ],
)
def test_wrong_role(name, target, pattern, role):
    result = of(name, target, (32, 2, target[2]), roles={pattern: role})
    last = pattern.replace("\\", "").split(".weight")[0].split(".*")[0]
    assert named_by(result, last), str(result)
    assert not [d for d in result.deviations if last not in d.parameter and d.quantity == "input update"]


def test_helpers_give_fresh_batches():
    """The control of the controls: without any of it, nothing is found."""
    assert torch.equal(tokens(), tokens())
    assert noise(2, 2).shape == (2, 2)
    assert of("Llama", (128, 8, 0), (32, 2, 0)).passed
