"""Which matrix takes the multiplier of a residual branch whose parts have unusual names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mue import plan


def module(**children):
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def sequential(d):
    return module(norm=nn.LayerNorm(d), mlp=nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d)))


def dit(d):
    return module(
        attn=module(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d)),
        mlp=module(fc1=nn.Linear(d, 4 * d), fc2=nn.Linear(4 * d, d)),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d)),
    )


def rwkv(d):
    names = ("key", "value", "receptance", "output")
    return module(
        ln=nn.LayerNorm(d),
        att=module(**{name: nn.Linear(d, d) for name in names}),
        ffn=module(key=nn.Linear(d, 4 * d), receptance=nn.Linear(d, d), value=nn.Linear(4 * d, d)),
    )


def unet(d):
    conv = {"kernel_size": 3, "padding": 1}
    return module(
        norm1=nn.GroupNorm(4, d), conv1=nn.Conv2d(d, d, **conv), time_emb_proj=nn.Linear(12, d), norm2=nn.GroupNorm(4, d),
        conv2=nn.Conv2d(d, d, **conv), conv_shortcut=nn.Conv2d(d, d, 1),
    )  # fmt: skip


def resnet(d):
    return module(
        conv1=nn.Conv2d(d, d, 3), bn1=nn.BatchNorm2d(d), conv2=nn.Conv2d(d, d, 3, bias=False), bn2=nn.BatchNorm2d(d)
    )


def s4(d):
    return module(norm=nn.LayerNorm(d), output_linear=nn.Sequential(nn.Conv1d(d, 2 * d, 1), nn.GLU(1)))


def flat(d):
    names = {name: nn.Linear(d, d) for name in ("wq", "wk", "wv", "wo")}
    return module(norm=nn.LayerNorm(d), **names, first=nn.Linear(d, 2 * d), second=nn.Linear(2 * d, d))


class Net(nn.Module):
    def __init__(self, block, d=16, depth=2):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, d), nn.LayerNorm(d), nn.Linear(d, 20)
        self.blocks = nn.ModuleList(block(d) for _ in range(depth))


@pytest.mark.parametrize(
    ("block", "ends"),
    [
        (sequential, {"mlp.2"}),
        (dit, {"attn.proj", "mlp.fc2"}),
        (rwkv, {"att.output", "ffn.value"}),
        (flat, {"wo", "second"}),
        (unet, {"conv2"}),
        (resnet, {"bn2"}),  # the norm behind undoes a factor in front of it
    ],
)
def test_end_of_each_branch(block, ends):
    scaling = plan(Net(block, depth=6), base=lambda: Net(block, depth=2), rule="complete-p")
    assert scaling.folded == {"residual": pytest.approx(1 / 3)}
    layer = [p for p in scaling.parameters if p.name.startswith("blocks.4.")]
    found = {p.name.removeprefix("blocks.4.").rpartition(".")[0]: p.lr for p in layer if p.lr != 1.0}
    assert found == dict.fromkeys(ends, pytest.approx(1 / 3))


def nameless(d):
    return module(norm=nn.LayerNorm(d), **{name: nn.Linear(d, d) for name in ("a", "b", "c", "e")})


def test_every_undecided_branch_is_named_and_the_remedy_works():
    with pytest.raises(ValueError, match=r"not known in blocks\.\* \(blocks\.0\.a\.weight.*blocks\.0\.e\.weight"):
        plan(Net(nameless, depth=4), base=lambda: Net(nameless), rule="complete-p")
    scaling = plan(
        Net(nameless, depth=4), base=lambda: Net(nameless), rule="complete-p", roles={r"[ce]\.weight": "ffn_down"}
    )
    halved = {p.name for p in scaling.parameters if p.name.startswith("blocks.1.") and p.lr == 0.5}
    assert halved == {f"blocks.1.{name}.{leaf}" for name in ("c", "e") for leaf in ("weight", "bias")}


@pytest.mark.parametrize("roles", [{}, {"output_linear.*weight": "ffn_down"}])
def test_matrix_in_front_of_a_gate_takes_no_multiplier(roles):
    with pytest.raises(ValueError, match="last matrix of the branch is not known"):
        plan(Net(s4, depth=4), base=lambda: Net(s4), rule="complete-p", roles=roles)


def keys_of_fixed_size(d):
    return module(norm=nn.LayerNorm(d), mix=module(to_a=nn.Linear(d, d), to_b=nn.Linear(d, 6), to_out=nn.Linear(d, d)))


def test_matrix_of_fixed_outputs_inside_a_layer_is_no_head():
    """Such are keys and values of a fixed number of heads: with an unembedding's init their products would shrink."""
    scaling = plan(Net(keys_of_fixed_size, d=64), base=lambda: Net(keys_of_fixed_size, d=16), rule="mup")
    keys, head = scaling["blocks.0.mix.to_b.weight"], scaling["head.weight"]
    assert (keys.role, head.role) == ("hidden", "unembedding")
    base_std = 16**-0.5 / 3**0.5  # uniform in +-fan_in^-1/2
    assert keys.init.value == pytest.approx(base_std / 2, rel=0.2)
    assert head.init.value == pytest.approx(base_std / 4, rel=0.1)


class Lens(nn.Module):
    """TransformerLens' layout: raw parameters, [in, out], attention head by head."""

    def __init__(self, d=16, depth=2, k=8):
        super().__init__()
        n = d // k

        def raw(**shapes):
            return module(**{name: nn.Parameter(torch.randn(shape) / 8) for name, shape in shapes.items()})

        self.embed, self.unembed = raw(W_E=(20, d)), raw(W_U=(d, 20), b_U=(20,))
        heads = {"W_Q": (n, d, k), "W_O": (n, k, d), "b_Q": (n, k), "b_O": (d,), "W_K": (n, d, k), "W_V": (n, d, k)}
        ffn = {"W_in": (d, 4 * d), "b_in": (4 * d,), "W_out": (4 * d, d), "b_out": (d,)}
        self.blocks = nn.ModuleList(
            module(ln1=nn.LayerNorm(d), attn=raw(**heads), mlp=raw(**ffn)) for _ in range(depth)
        )
        self.ln_final = nn.LayerNorm(d)


def test_transformer_lens():
    scaling = plan(Lens(64, 4), base=lambda: Lens(16, 2), rule="complete-p")
    factors = {
        p.name.rpartition(".")[2]: (p.role, p.lr) for p in scaling.parameters if "W_" in p.name or "b_" in p.name
    }
    assert factors == {
        "W_E": ("embedding", 1), "W_U": ("unembedding", 0.25), "b_U": ("bias", 1), "W_Q": ("hidden", 0.25),
        "W_K": ("hidden", 0.25), "W_V": ("hidden", 0.25), "W_O": ("hidden", 0.125), "b_Q": ("bias", 1), "b_O": ("bias", 0.5),
        "W_in": ("ffn_up", 0.25), "b_in": ("bias", 1), "W_out": ("ffn_down", 0.125), "b_out": ("bias", 0.5),
    }  # fmt: skip
