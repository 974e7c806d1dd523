"""Fused matrices in parts: a fused parameter is stepped exactly as its parts are as separate parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.hypersphere_steps import matrices, normal, orth
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.optim.split import note_splits

#: split -> (shape of the fused parameter, dimension that is cut, sizes)
CASES = {
    "q, k, v": (3, (24, 8), 0, (8, 8, 8)),
    "grouped queries": ([16, 4, 4], (24, 8), 0, (16, 4, 4)),
    "heads": ({"heads": 6}, (24, 8), 0, (4,) * 6),
    "Conv1D": ({"columns": 3}, (8, 24), 1, (8, 8, 8)),
    "Conv1D, unequal": ({"columns": [16, 4, 4]}, (8, 24), 1, (16, 4, 4)),
    "gate and up of experts": (2, (3, 12, 8), 1, (6, 6)),
    "experts, unequal": ([8, 4], (3, 12, 8), 1, (8, 4)),
    "experts, columns": ({"columns": [8, 4]}, (3, 8, 12), 2, (8, 4)),
    "convolution": ([4, 2], (6, 3, 3, 3), 0, (4, 2)),
}


def train_both(name, kind, *, steps=4, dtype=torch.float64, reload=False, **options):
    """Returns the fused parameter and the parts after some steps of the same gradients."""
    split, shape, dim, sizes = CASES[name]
    fused = nn.Parameter(normal(shape, 1, dtype))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(sizes, dim)]
    options = {"lr": 0.05, "compute_dtype": "float64" if dtype == torch.float64 else "float32", **options}
    one = HyperSphereOptimizer([{"params": [fused], "kind": kind, "split": split}], **options)
    many = HyperSphereOptimizer([{"params": parts, "kind": kind}], **options)
    for step in range(steps):
        if reload and step == steps // 2:
            state, one = one.state_dict(), HyperSphereOptimizer([{"params": [fused], "kind": kind}], **options)
            one.load_state_dict(copy.deepcopy(state))
        fused.grad = normal(shape, 10 + step, dtype)
        for part, grad in zip(parts, fused.grad.split(sizes, dim), strict=True):
            part.grad = grad.clone()
        one.step()
        many.step()
    return fused.detach(), torch.cat([part.detach() for part in parts], dim), one


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize("name", CASES)
def test_a_fused_matrix_trains_as_its_parts(name, kind):
    fused, parts, optimizer = train_both(name, kind, weight_decay=0.1)
    torch.testing.assert_close(fused, parts, rtol=1e-11, atol=1e-12)
    if kind == "sphere":
        _, shape, _, sizes = CASES[name]
        (state,) = optimizer.state.values()
        assert state["radius"].shape == ((shape[0], len(sizes)) if len(shape) == 3 else (len(sizes),))


@pytest.mark.parametrize("options", [{"retraction": "geodesic"}, {"normalize": "neuron"}, {"radius": 2.0}])
@pytest.mark.parametrize("name", ["q, k, v", "grouped queries", "gate and up of experts", "experts, unequal"])
def test_options_of_the_step_hold_for_each_part(name, options):
    fused, parts, _ = train_both(name, "sphere", **options)
    torch.testing.assert_close(fused, parts, rtol=1e-11, atol=1e-12)


def test_in_float32_and_through_a_checkpoint():
    fused, parts, _ = train_both("grouped queries", "sphere", dtype=torch.float32, reload=True)
    torch.testing.assert_close(fused, parts, rtol=2e-5, atol=2e-5)
    exact, parts, optimizer = train_both("gate and up of experts", "sphere", reload=True, normalize="neuron")
    torch.testing.assert_close(exact, parts, rtol=1e-11, atol=1e-12)
    assert optimizer.param_groups[0]["split"] == 2


def test_without_a_split_a_fused_matrix_trains_otherwise():
    """The negative control: parts of the whole matrix's orthogonal direction are not the parts' own."""
    fused = nn.Parameter(normal((24, 8), 1, torch.float64))
    optimizer = HyperSphereOptimizer([{"params": [fused], "kind": "sphere"}], lr=0.05, compute_dtype="float64")
    for step in range(4):
        fused.grad = normal((24, 8), 10 + step, torch.float64)
        optimizer.step()
    _, parts, _ = train_both("q, k, v", "sphere")
    assert (fused.detach() - parts).abs().max() > 1e-2


def test_a_checkpoint_of_whole_matrices_goes_on_whole():
    def built(**options):
        weight = nn.Parameter(normal((24, 8), 1))
        return weight, HyperSphereOptimizer([{"params": [("qkv.weight", weight)], "kind": "sphere", **options}])

    weight, old = built()
    weight.grad = normal((24, 8), 2)
    old.step()
    state = old.state_dict()
    del state["param_groups"][0]["split"], state["param_groups"][0]["normalize"]  # of a version without them
    weight, new = built(split=3)
    with pytest.warns(UserWarning, match="split: found None in the checkpoint, expected 3"):
        new.load_state_dict(state)
    assert new.param_groups[0]["split"] is None
    weight.grad = normal((24, 8), 3)
    new.step()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)  # in_proj_weight [24, 8]
        self.gate_up_proj = nn.Linear(8, 32, bias=False)
        self.out = nn.Linear(8, 8, bias=False)


def splits_of(optimizer):
    return {name: group["split"] for group in optimizer.param_groups for name in group["param_names"]}


def test_auto_splits_what_has_one_known_layout(recwarn):
    optimizer = HyperSphereOptimizer(Block().named_parameters(), split="auto")
    whole = ["out.weight", "attn.out_proj.weight", "attn.in_proj_bias", "attn.out_proj.bias"]
    assert splits_of(optimizer) == {**dict.fromkeys(whole), "attn.in_proj_weight": 3, "gate_up_proj.weight": 2}
    table = optimizer.describe()
    assert "attn.in_proj_weight [24, 8] by shape, split in 3 parts by rows" in table
    assert "gate_up_proj.weight [32, 8] by shape, split in 2 parts by rows" in table
    assert not recwarn


NAMES = [
    "qkv",
    "qkv_proj",
    "Wqkv",
    "c_attn",
    "att_proj",
    "query_key_value",
    "attn",
    "in_proj",
    "kv_proj",
    "to_kv",
    "kv_b_proj",
]


@pytest.mark.parametrize("rows", [24, 16])  # [3 d, d] may be interleaved or grouped, too
@pytest.mark.parametrize("name", [*NAMES, "queries_keys_values", "w13", "gate_up"])
def test_auto_leaves_what_models_lay_out_differently_whole_and_says_so(name, rows):
    pairs = [(f"layers.0.{name}.weight", nn.Parameter(normal((rows, 8), 1)))]
    with pytest.warns(UserWarning, match=rf"(?s)layers.0.{name}.weight \[{rows}, 8\].*split=\[q, k, v\]"):
        optimizer = HyperSphereOptimizer(pairs, split="auto")
    assert splits_of(optimizer) == {pairs[0][0]: None}


def test_a_note_on_the_tensor_decides_and_nameless_matrices_are_named_in_a_warning(recwarn):
    noted, whole = nn.Parameter(normal((24, 8), 1)), nn.Parameter(normal((24, 8), 2))
    noted.mue_split, whole.mue_split = [8, 8, 8], 1
    optimizer = HyperSphereOptimizer([("a.qkv.weight", noted), ("b.qkv.weight", whole)], split="auto")
    assert splits_of(optimizer) == {"a.qkv.weight": [8, 8, 8], "b.qkv.weight": None}
    assert not recwarn
    with pytest.warns(UserWarning, match="leaves whole.*they have no name"):
        HyperSphereOptimizer([nn.Parameter(normal((24, 8), 3))], split="auto")
    noted.mue_split = "auto"
    with pytest.raises(ValueError, match=r"mue_split of 'a\.qkv\.weight'"):
        HyperSphereOptimizer([("a.qkv.weight", noted)], split="auto")


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [((3, 12, 8), (3, 8, 6), 2), ((3, 8, 12), (3, 6, 8), None), ((3, 16, 8), (3, 8, 8), 2), ((3, 12, 8), None, None)],
    ids=["rows", "columns", "square", "alone"],
)
def test_auto_reads_a_stack_of_gate_and_up_beside_its_down(up, down, expected, recwarn):
    pairs = [("experts.gate_up_proj", nn.Parameter(torch.randn(up)))]
    pairs += [("experts.down_proj", nn.Parameter(torch.randn(down)))] if down else []
    optimizer = HyperSphereOptimizer(pairs, split="auto")
    splits = {name: group["split"] for group in optimizer.param_groups for name in group["param_names"]}
    assert splits["experts.gate_up_proj"] == expected
    assert bool(recwarn) == (expected is None)


class GroupedAttention(nn.Module):
    """Says all sizes, but its forward might read the rows head by head."""

    num_heads, num_key_value_heads, head_dim = 4, 2, 4

    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(16, 32, bias=False)

    def forward(self, x):
        return self.qkv_proj(x)


def test_of_layers_of_unknown_packages_nothing_is_noted():
    model = nn.ModuleList([GroupedAttention()])
    assert note_splits(model) == {}
    with pytest.warns(UserWarning, match=r"0.qkv_proj.weight \[32, 16\]"):
        HyperSphereOptimizer(model.named_parameters(), split="auto")


def transformers_layer(name):
    common = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    if name == "Phi3":
        from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3Config

        return Phi3Attention(Phi3Config(**common, pad_token_id=0), 0)
    if name == "GPT2":
        from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config

        return GPT2Attention(GPT2Config(n_embd=16, n_head=4), layer_idx=0)
    if name == "CodeGen":
        from transformers.models.codegen.modeling_codegen import CodeGenAttention, CodeGenConfig

        return CodeGenAttention(CodeGenConfig(n_embd=16, n_head=4, rotary_dim=2), layer_idx=0)
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXConfig

    return GPTNeoXAttention(GPTNeoXConfig(hidden_size=16, num_attention_heads=4), 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi3", {"0.qkv_proj.weight": [16, 8, 8]}),
        ("GPT2", {"0.c_attn.weight": {"columns": [16, 16, 16]}}),
        ("CodeGen", {}),
        ("GPTNeoX", {}),
    ],
)
def test_sizes_of_grouped_queries_are_read_from_layers_whose_order_is_known(name, expected, recwarn):
    pytest.importorskip("transformers")
    model = nn.ModuleList([transformers_layer(name)])
    assert note_splits(model) == expected
    recwarn.clear()
    optimizer = HyperSphereOptimizer(model.named_parameters(), split="auto")
    assert {name: split for name, split in splits_of(optimizer).items() if split} == expected
    assert any("leaves whole" in str(warning.message) for warning in recwarn) == (not expected)


@pytest.mark.parametrize(
    ("split", "error", "words"),
    [
        (5, ValueError, r"5 for 24 rows"),
        ([16, 4], ValueError, r"\(16, 4\) for 24 rows"),
        (0, ValueError, "at least 1"),
        ({"columns": 3}, ValueError, "3 for 8 columns"),
        ({"rows": 3, "columns": 2}, ValueError, "split: found"),
        ("qkv", TypeError, "split: found 'qkv'"),
        (True, TypeError, "split: found True"),
    ],
)
def test_splits_that_do_not_fit_are_refused(split, error, words):
    with pytest.raises(error, match=words):
        HyperSphereOptimizer([{"params": [nn.Parameter(normal((24, 8), 0))], "kind": "sphere", "split": split}])


def test_a_kind_without_orthogonalization_cannot_be_split():
    with pytest.raises(ValueError, match="3 in a group of kind 'adamw'"):
        HyperSphereOptimizer([{"params": [nn.Parameter(normal((24, 8), 0))], "kind": "adamw", "split": 3}])


def reference_neuron(weight, grads, *, lr, momentum, decay, kind):
    """NorMuon in float64, one matrix at a time, with the bias of the second moment corrected as Adam does."""
    m, v = torch.zeros_like(weight), torch.zeros((*weight.shape[:-1], 1), dtype=torch.float64)
    radius = weight.norm(dim=(-2, -1), keepdim=True)
    for t, grad in enumerate(grads, 1):
        m = momentum * m + grad
        o = torch.stack([orth(u, "scheduled") for u in momentum * m + grad])
        v = decay * v + (1 - decay) * o.square().mean(-1, keepdim=True)
        n = o / (v / (1 - decay**t)).sqrt()
        n = n * (o.norm(dim=(-2, -1), keepdim=True) / n.norm(dim=(-2, -1), keepdim=True))
        if kind == "sphere":
            weight = weight - lr * radius * n / n.norm(dim=(-2, -1), keepdim=True)
            weight = weight * radius / weight.norm(dim=(-2, -1), keepdim=True)
        else:
            rows, columns = weight.shape[-2:]
            weight = weight - lr * (rows / columns) ** 0.5 * n
    return weight


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (3, 6, 8), (6, 3, 3, 3)])
def test_rows_are_normalized_as_the_paper_says(shape, kind):
    param = nn.Parameter(normal(shape, 3, torch.float64))
    options = {"lr": 0.05, "compute_dtype": "float64", "normalize": "neuron"}
    optimizer = HyperSphereOptimizer([{"params": [param], "kind": kind}], **options)
    start, grads = matrices(param), [normal(shape, 20 + step, torch.float64) for step in range(4)]
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    wide = [matrices(grad) for grad in grads]
    expected = reference_neuron(start, wide, lr=0.05, momentum=0.95, decay=0.95, kind=kind)
    torch.testing.assert_close(matrices(param), expected, rtol=1e-9, atol=1e-10)
    plain = reference_neuron(start, wide, lr=0.05, momentum=0.95, decay=0.5, kind=kind)
    assert (matrices(param) - plain).abs().max() > 1e-5  # the decay is seen, where rows differ


def test_second_moments_take_a_number_for_each_row():
    param = nn.Parameter(normal((3, 6, 8), 3).bfloat16())
    optimizer = HyperSphereOptimizer([{"params": [param], "kind": "sphere"}], normalize="neuron")
    param.grad = torch.ones_like(param)
    param.grad[:, 2] = 0
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["row_square"].shape == (3, 6)
    assert state["row_square"].dtype == torch.float32
    assert optimizer.memory()["row_square"] == 3 * 6 * 4
    assert param.isfinite().all()
    assert (state["row_square"][:, 2] < 1e-8).all()  # a row without a gradient


def test_neurons_of_transposed_matrices_are_refused():
    param = nn.Parameter(normal((8, 24), 3))
    group = {"params": [param], "kind": "sphere", "split": {"columns": 3}}
    with pytest.raises(ValueError, match="split by columns"):
        HyperSphereOptimizer([group], normalize="neuron")
    optimizer = HyperSphereOptimizer([group])
    optimizer.param_groups[0]["normalize"] = "neuron"  # later
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="split by columns"):
        optimizer.step()
