"""Weights that are not finite are refused by name; gradients that are not stay in their matrix; refused groups."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.parameterizations.rules.kinds import KINDS

BAD = [float("nan"), float("inf"), -float("inf")]


def pairs(kind: str, count: int = 3) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shape = (2, 6, 8) if kind != "adamw" else (7,)
    return [(f"layers.{i}.weight", nn.Parameter(torch.randn(shape))) for i in range(count)]


def build(members, kind, **options) -> HyperSphereOptimizer:
    return HyperSphereOptimizer([{"params": members, "kind": kind}], lr=0.1, **options)


def spoil(param: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        param.view(-1)[-1] = value


def set_grads(members) -> None:
    for i, (_, param) in enumerate(members):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_refused_when_built_and_when_added(kind, value):
    members = pairs(kind)
    optimizer = build(members[:1], kind)
    spoil(members[1][1], value)
    spoil(members[2][1], value)
    message = r"'layers.1.weight' of shape .* \(and 1 more\): found NaN or infinite entries, expected finite weights"
    with pytest.raises(ValueError, match=message):
        build(members, kind)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": members[1:], "kind": kind})
    assert len(optimizer.param_groups) == 1, "nothing was added"


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_refused_at_their_first_step_each_time_and_accepted_once_repaired(kind, lr):
    members = pairs(kind)
    thawed = members[1][1].requires_grad_(False)
    good = thawed.clone()
    spoil(thawed, float("nan"))
    optimizer = build(members, kind)  # frozen weights are nobody's business yet
    optimizer.param_groups[0]["lr"] = lr
    set_grads([members[0], members[2]])
    optimizer.step()
    thawed.requires_grad_(True)
    set_grads(members)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'layers.1.weight' .*: found NaN or infinite entries"):
            optimizer.step()
    with torch.no_grad():
        thawed.copy_(good)
    optimizer.step()
    assert thawed.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_later_steps_do_not_look(kind, monkeypatch):
    """A look would be a wait for a GPU at each step."""
    members = pairs(kind)
    optimizer = build(members, kind, capturable=True)
    set_grads(members)
    optimizer.step()
    for name in ("isfinite", "tolist", "aminmax"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    optimizer.step()


def test_the_largest_finite_weights_are_accepted():
    table = nn.Parameter(torch.full((4,), torch.finfo(torch.float32).max))
    half = nn.Parameter(torch.full((4, 5), torch.finfo(torch.float16).max, dtype=torch.float16))
    HyperSphereOptimizer([{"params": [table], "kind": "adamw"}, {"params": [half], "kind": "sphere"}])


@pytest.mark.parametrize("zero_gradient", ["skip", "momentum"])
@pytest.mark.parametrize("retraction", ["project", "geodesic"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_spoil_their_own_matrix_only(kind, value, retraction, zero_gradient):
    options = {"retraction": retraction, "zero_gradient": zero_gradient}
    members, clean = pairs(kind), pairs(kind)
    for chosen, last in ((members, value), (clean, 0.5)):
        optimizer = build(chosen, kind, **options)
        set_grads(chosen)
        spoil(chosen[1][1].grad, last)
        optimizer.step()
    for i, ((_, param), (_, other)) in enumerate(zip(members, clean, strict=True)):
        if i != 1:
            assert torch.allclose(param, other, rtol=0, atol=1e-6)
        elif kind == "adamw":
            assert torch.equal(param[:-1], other[:-1])
            assert param[-1].isnan()
        else:
            assert param[-1].isnan().all(), "it shows"
            assert torch.allclose(param[0], other[0], rtol=0, atol=1e-6), "the other matrix of the stack"


def test_grad_scaler_skips_what_is_not_finite():
    members = pairs("sphere")
    optimizer, scaler = build(members, "sphere"), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [param.detach().clone() for _, param in members]
    scaled, plain = pairs("sphere"), None
    for bad in (True, False):
        scaler.scale(sum((param * param).sum() for _, param in members)).backward()
        if bad:
            spoil(members[1][1].grad, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert all(torch.equal(param, w) for (_, param), w in zip(members, before, strict=True))
            assert not optimizer.state, "no step was taken"
    plain = build(scaled, "sphere")
    sum((param * param).sum() for _, param in scaled).backward()
    plain.step()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for (_, a), (_, b) in zip(members, scaled, strict=True))


def test_manual_optimization_steps_as_by_hand(tmp_path):
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization, self.layer = False, nn.Linear(6, 4)

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.layer(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return HyperSphereOptimizer(self.named_parameters(), lr=0.05)

    lit, plain, data = Module(), Module(), torch.randn(3, 5, 6)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(lit, torch.utils.data.DataLoader(data, batch_size=None))
    optimizer = plain.configure_optimizers()
    for batch in data:
        plain.layer(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(lit.layer.weight, plain.layer.weight)


GROUP_FAULTS = {
    r"sphere: found False in a param group, .*give the group a `kind`": {"sphere": False},
    r"process_group: found .* in a param group, .*Pass it to the optimizer": {"process_group": "auto"},
    r"amsgrad: found True in a param group, .*Leave it out": {"amsgrad": True},
    r"ns_steps: found 6 in a param group, .*`preset` chooses": {"ns_steps": 6},
    r"param_names: found 2 names, expected one for each of 1 params": {"param_names": ["a", "b"]},
}


@pytest.mark.parametrize("message", GROUP_FAULTS)
def test_what_a_group_cannot_set_is_refused_not_ignored(message):
    group = {"params": [nn.Parameter(torch.ones(3, 4))], "kind": "sphere", **GROUP_FAULTS[message]}
    with pytest.raises(ValueError, match=message):
        HyperSphereOptimizer([group])
    optimizer = HyperSphereOptimizer([("w", nn.Parameter(torch.ones(3, 4)))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
