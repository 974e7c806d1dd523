"""Which parameter goes where, what is said about it, and which input is refused."""

from __future__ import annotations

import io
import logging
import warnings

import pytest
import torch
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer, groups
from lightning_mue.optim.groups import classify
from lightning_mue.parameterizations.rules.roles import Role


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.experts = param(5, 8, 4)
        self.conv = nn.Conv1d(2, 4, 3)
        self.patch = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 11, bias=False)


def kinds(optimizer: HyperSphereOptimizer) -> dict[str, str]:
    return {name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]}


def test_a_network_is_split_by_name_and_shape():
    network = Network()
    optimizer = HyperSphereOptimizer(network.named_parameters())
    sphere = {f"blocks.{i}.weight" for i in range(3)} | {"experts", "conv.weight", "patch.weight"}
    found = kinds(optimizer)
    assert {name for name, kind in found.items() if kind == "sphere"} == sphere
    assert {name for name, kind in found.items() if kind == "adam_sphere"} == {"lm_head.weight"}
    assert set(found) == {name for name, _ in network.named_parameters()}
    assert [group["name"] for group in optimizer.param_groups] == ["sphere", "adam_sphere", "adamw"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wte.weight", "adamw"),
        ("transformer.wpe.weight", "adamw"),
        ("tok_emb.weight", "adamw"),
        ("tok_embeddings.weight", "adamw"),
        ("model.embed_tokens.weight", "adamw"),
        ("_orig_mod.embedding.weight", "adamw"),
        ("pos_embed", "adamw"),
        ("patch_embed.proj.weight", "sphere"),
        ("lm_head.weight", "adam_sphere"),
        ("model.head.weight", "adam_sphere"),
        ("output.weight", "adam_sphere"),
        ("unembed.weight", "adam_sphere"),
        ("unembedding", "adam_sphere"),
        ("embed_out.weight", "adam_sphere"),
        ("layers.3.attention.output.weight", "sphere"),
        ("layers.3.attention.out_proj.weight", "sphere"),
        ("layers.0.experts.up", "sphere"),
        ("layers.0.experts.up_bias", "adamw"),
        ("layers.0.q_norm.weight", "adamw"),
    ],
)
def test_names_of_two_dimensional_parameters(name, kind):
    assert classify(name, param(6, 4))[0] == kind


@pytest.mark.parametrize("role", Role)
def test_roles_decide_before_names(role):
    weight = param(6, 4)
    weight.mue_role = role
    vectors = {"embedding", "balance_bias", "norm", "qk_norm", "final_norm", "bias", "scalar", "modulation"}
    expected = "adam_sphere" if role == "unembedding" else "adamw" if role in vectors else "sphere"
    name = "lm_head.weight" if expected == "sphere" else "experts.up"  # the name says something else
    assert classify(name, weight) == (expected, f"role {role.value}")
    weight.mue_role = role.value
    assert classify(name, weight)[0] == expected
    assert classify(name, param(6))[0] == "adamw", "a vector is no matrix, for any role"


def test_three_dimensions_are_a_stack_and_vectors_get_adamw():
    assert [classify(None, param(*shape))[0] for shape in [(), (3,), (3, 3), (3, 3, 3), (3, 3, 3, 3)]] == [
        "adamw",
        "adamw",
        "sphere",
        "sphere",
        "sphere",
    ]


def test_groups_keep_their_names_options_and_kinds():
    optimizer = HyperSphereOptimizer(
        [
            {"params": [("a.weight", param(3, 3)), ("a.bias", param(3))], "name": "body", "momentum": 0.5},
            {"params": [("b.weight", param(3, 3))], "kind": "adamw", "name": "frozen-ish", "weight_decay": 0.3},
            {"params": [("c.weight", param(3, 3)), ("c.bias", param(3))]},
            {"params": [("d.weight", param(3, 3)), ("d.bias", param(3))]},
        ]
    )
    names = ["body/sphere", "body/adamw", "frozen-ish", "sphere", "adamw", "sphere-2", "adamw-2"]
    assert [group["name"] for group in optimizer.param_groups] == names
    assert [group["momentum"] for group in optimizer.param_groups[:3]] == [0.5, 0.5, 0.95]
    assert [group["weight_decay"] for group in optimizer.param_groups[:3]] == [0, 0, 0.3]
    assert kinds(optimizer)["b.weight"] == "adamw"


def test_adamw_lr_goes_to_the_adamw_side_only():
    groups = [
        {"params": [param(3, 3), param(3)]},
        {"params": [param(3, 3), param(3)], "lr": 0.5},
        {"params": [param(3, 3), param(3)], "lr": 0.5, "adamw_lr": 0.25},
        {"params": [param(3)], "kind": "adamw"},
        {"params": [param(3)], "kind": "adamw", "lr": 0.125},
        {"params": [param(3)], "kind": "adamw", "lr": 0.125, "adamw_lr": 0.0625},
        {"params": [param(3, 3), param(3)], "adamw_lr": 0.25},
        {"params": [param(3, 3), param(3)], "lr": 0.5, "adamw_lr": None},
        {"params": [param(3, 3)], "kind": "sphere", "adamw_lr": 0.25},
    ]
    with pytest.warns(UserWarning, match="hidden matrices"):
        optimizer = HyperSphereOptimizer(groups, lr=0.02, adamw_lr=0.001)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.02, 0.001, 0.5, 0.5, 0.5, 0.25, 0.001, 0.125, 0.0625, 0.02, 0.25, 0.5, 0.5, 0.02]
    decays = [{key.replace("lr", "weight_decay"): value for key, value in group.items()} for group in groups]
    with pytest.warns(UserWarning, match="hidden matrices"):
        decayed = HyperSphereOptimizer(decays, weight_decay=0.02, adamw_weight_decay=0.001)
    assert [group["weight_decay"] for group in decayed.param_groups] == rates
    for group in (*optimizer.param_groups, *decayed.param_groups):
        assert not {"adamw_lr", "adamw_weight_decay"} & group.keys()
    with pytest.warns(UserWarning, match="hidden matrices"):
        plain = HyperSphereOptimizer(groups[:1], lr=0.02)
    assert [group["lr"] for group in plain.param_groups] == [0.02, 0.02]
    none = HyperSphereOptimizer([("b", param(3))], weight_decay=0.1, adamw_weight_decay=0)
    assert none.param_groups[0]["weight_decay"] == 0


def test_description_names_every_group():
    weight = param(4, 4)
    weight.mue_role = Role.ROUTER
    optimizer = HyperSphereOptimizer([*Network().named_parameters(), ("router", weight)])
    lines = optimizer.describe().splitlines()
    assert "  blocks.*.weight [4, 4] by shape (x3)" in lines
    assert "  lm_head.weight [11, 4] by name" in lines
    assert "  router [4, 4] by role router" in lines
    heads = [line for line in lines if not line.startswith(" ")]
    for head, group in zip(heads, optimizer.param_groups, strict=True):
        values = sum(p.numel() for p in group["params"])
        assert head == f"{group['kind']}: {group['kind']}, lr 0.01, {len(group['params'])} parameters, {values} values"
    given = HyperSphereOptimizer([{"params": [("blocks.0.weight", weight)], "kind": "adamw"}])
    assert given.describe().splitlines()[1] == "  blocks.*.weight [4, 4] by given"
    rate = torch.tensor([0.25])
    assert ", lr 0.25, " in HyperSphereOptimizer([("w", param(4, 4))], lr=rate, capturable=True).describe()


def test_groups_are_logged_once_and_by_the_first_rank_only(caplog, monkeypatch):
    monkeypatch.setattr(groups, "_logged", set())
    weights = [(f"blocks.{i}.weight", param(4, 4)) for i in range(3)]
    with caplog.at_level(logging.INFO, logger="lightning_mue"):
        optimizer = HyperSphereOptimizer(weights)
        (record,) = caplog.records
        assert optimizer.describe() in record.getMessage()
        HyperSphereOptimizer(weights[:2])  # the same names
        assert len(caplog.records) == 1
        HyperSphereOptimizer([*weights, ("head.weight", param(4, 4))])
        HyperSphereOptimizer(weights, sphere=False)
        assert len(caplog.records) == 3
        for rank in (1, 0):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            HyperSphereOptimizer([("other.weight", param(4, 4))])
            assert len(caplog.records) == (3 if rank else 4)


def test_the_log_is_seen_without_setting_up_logging(monkeypatch):
    """The package's own handler, which stands back where a program (or pytest) has handlers on the root."""
    monkeypatch.setattr(groups, "_logged", set())
    (handler,) = logging.getLogger("lightning_mue").handlers
    for root_handlers, expected in (([], 1), ([logging.NullHandler()], 0)):
        monkeypatch.setattr(logging.root, "handlers", root_handlers)
        seen = io.StringIO()
        before = handler.setStream(seen)
        for rows in (3, 5):
            HyperSphereOptimizer([("some.weight", param(rows, 4))])
        handler.setStream(before)
        assert seen.getvalue().count("  some.weight [3, 4] by shape") == expected


def test_guesses_are_warned_of_once_and_only_when_they_are_guesses():
    with pytest.warns(UserWarning, match=r"found 2 of 4 parameters \(numbers 0, 3\)") as caught:
        HyperSphereOptimizer([{"params": [param(3, 3), param(3)]}, {"params": [param(2, 2, 2), param(5, 3)]}])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    weight = param(3, 3)
    weight.mue_role = Role.HIDDEN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HyperSphereOptimizer([("w", param(3, 3))])
        HyperSphereOptimizer([weight, param(3), param(2, 2, 2)])
        HyperSphereOptimizer([{"params": [param(3, 3)], "kind": "sphere"}])


def test_generators_single_tensors_and_later_groups():
    network = Network()
    optimizer = HyperSphereOptimizer(p for p in network.named_parameters() if "blocks" in p[0])
    optimizer.add_param_group({"params": (p for p in network.named_parameters() if "blocks" not in p[0]), "lr": 0.5})
    assert len(kinds(optimizer)) == len(list(network.named_parameters()))
    assert [group["name"] for group in optimizer.param_groups][:3] == ["sphere", "adamw", "mixed"]
    assert optimizer.param_groups[2]["lr"] == 0.5
    single = HyperSphereOptimizer([{"params": param(3, 3), "kind": "sphere"}])
    assert len(single.param_groups[0]["params"]) == 1


def test_user_dicts_are_not_changed():
    group = {"params": [("w", param(3, 3))], "lr": 0.5}
    HyperSphereOptimizer([group])
    assert set(group) == {"params", "lr"}


ZERO_EXPERT = torch.ones(3, 2, 2)
ZERO_EXPERT[1] = 0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            [("router.weight", nn.Parameter(torch.zeros(3, 3)))],
            r"'router.weight' of shape \[3, 3\]: found zero .*adamw",
        ),
        ([("experts", nn.Parameter(ZERO_EXPERT))], r"'experts'.*matrix 1 of the stack: found zero"),
        ([("lm_head.weight", nn.Parameter(torch.zeros(3, 3)))], "'lm_head.weight'.*Initialize it"),
        ([param(3), nn.Parameter(torch.zeros(3, 3))], "parameter number 1 of shape"),
        (
            [{"params": [param(3)], "kind": "sphere"}],
            r"number 0 of shape \[3\]: found a vector or scalar, expected a matrix in a group of kind 'sphere'",
        ),
        (
            [{"params": [param(3)], "kind": "lion"}],
            "kind: found 'lion', expected one of 'sphere', 'muon', 'adam_sphere', 'adamw'",
        ),
        ([{"weights": [param(3)]}], "param group: found only the keys weights, expected the key 'params'"),
        ([], "^params: found no parameters"),
        ([{"params": []}], "^params: found no parameters"),
        ([("w", nn.Parameter(torch.full((3, 3), 1e-30)))], "Frobenius norm is 0"),  # too small to have one in float32
    ],
)
def test_parameters_that_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        HyperSphereOptimizer(params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (param(3), "ordered iterable"),
        ({param(3)}, "params: found .*set.*ordered iterable"),
        ([{"params": {param(3)}}], "params: found .*set.*ordered iterable"),
        ([param(3), {"params": [param(3)]}], "params: found group dicts mixed with parameters"),
        ([("w", 3)], "'w'"),
        ([3.0], "float"),
        ([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))], "'w'.*complex"),
        ([{"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))], "kind": "adamw"}], "complex"),
    ],
)
def test_params_of_a_wrong_type(params, words):
    with pytest.raises(TypeError, match=words):
        HyperSphereOptimizer(params)


def test_unknown_role_is_refused():
    weight = param(3, 3)
    weight.mue_role = "expert"
    with pytest.raises(ValueError, match=r"mue_role of parameter 'w'.*found 'expert', expected one of .*expert_up"):
        HyperSphereOptimizer([("w", weight)])


def test_zero_is_allowed_where_it_cannot_hurt():
    zero = nn.Parameter(torch.zeros(3, 3))
    HyperSphereOptimizer([{"params": [zero], "kind": "adamw"}])
    HyperSphereOptimizer([("w", nn.Parameter(torch.zeros(3, 3, device="meta")))])
    HyperSphereOptimizer([("w", nn.Parameter(torch.zeros(3, 3), requires_grad=False))])
    HyperSphereOptimizer([("w", nn.Parameter(torch.full((3, 3), 1e-15)))])


def test_zero_is_found_at_the_first_step():
    weight = param(3, 3)
    optimizer = HyperSphereOptimizer([("w", weight)])
    unnamed = HyperSphereOptimizer([{"params": [weight], "kind": "sphere"}])
    weight.data.zero_()
    weight.grad = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"'w' of shape.*: found zero"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"number 0 of group 'sphere'.*: found zero"):
        unnamed.step()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1e-3}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"lr": "1e-3"}, TypeError),
        ({"lr": torch.tensor(0.1)}, TypeError),
        ({"lr": True}, TypeError),
        ({"adamw_lr": -1.0}, ValueError),
        ({"adamw_weight_decay": float("inf")}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"momentum": -0.1}, ValueError),
        ({"nesterov": "yes"}, TypeError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": (-0.1, 0.9)}, ValueError),
        ({"betas": (0.9,)}, ValueError),
        ({"betas": 0.9}, ValueError),
        ({"eps": -1e-8}, ValueError),
        ({"weight_decay": -0.1}, ValueError),
        ({"weight_decay": float("nan")}, ValueError),
        ({"preset": "polar"}, ValueError),
        ({"compute_dtype": "int8"}, ValueError),
        ({"compute_dtype": torch.int32}, ValueError),
    ],
)
def test_options_out_of_range_are_named(options, error):
    (key,) = options
    with pytest.raises(error, match=f"^{key}: found "):
        HyperSphereOptimizer([("w", param(3, 3))], **options)
    with pytest.raises(error, match=f"^{key}: found "):
        HyperSphereOptimizer([{"params": [("w", param(3, 3))], **options}])


def test_options_are_held_as_plain_types():
    optimizer = HyperSphereOptimizer([("w", param(3, 3))], betas=[0.8, 0.9], compute_dtype=torch.bfloat16)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["compute_dtype"] == "bfloat16"


def test_vectors_in_disguise_get_adamw_and_convolutions_over_one_dimension_are_named():
    shapes = {
        "gamma": (16, 1, 1),
        "class_token": (1, 1, 8),
        "scale": (1, 1),
        "conv1.weight": (6, 4, 3),
        "row.weight": (1, 8),
    }
    params = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    with pytest.warns(UserWarning, match=r"found conv1\.weight with three dimensions.*kind 'adamw'"):
        optimizer = HyperSphereOptimizer(params)
    kinds = {name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]}
    assert kinds == {**dict.fromkeys(shapes, "adamw"), "conv1.weight": "sphere", "row.weight": "sphere"}
    assert "conv1.weight 6 matrices [4, 3] by shape" in optimizer.describe()


def test_a_parameter_given_twice_is_refused_before_anything_changes():
    weight = param(3, 3)
    with pytest.raises(ValueError, match=r"'w'.*found it given twice"):
        HyperSphereOptimizer([{"params": [("w", weight), ("w", weight)], "kind": "sphere"}])
    optimizer = HyperSphereOptimizer([("w", weight)])
    with pytest.raises(ValueError, match="found it given twice"):
        optimizer.add_param_group({"params": [("bias", param(3)), ("w", weight)]})
    assert len(optimizer.param_groups) == 1
