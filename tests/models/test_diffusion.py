"""FlowMatchingTransformer: the network and its loss against float64, samplers on a known field, roles, draws that resume."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lightning_mue import FlowMatchingTransformer, HyperSphereOptimizer, plan
from lightning_mue.data import DigitsDataModule
from lightning_mue.models.diffusion.sampling import integrate
from lightning_mue.parameterizations.reading.parameters import tag_roles


def make_model(**kwargs):
    torch.manual_seed(0)
    return FlowMatchingTransformer(**{"width": 32, "depth": 2, "n_heads": 4, **kwargs})


def disturbed(model, std=0.1):
    """Moves every weight, so that nothing is zero any more."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += std * torch.randn_like(p)
    return model


def batch(size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand((size, 1, 8, 8), generator=g) * 2 - 1,
        "label": torch.randint(0, 10, (size,), generator=g),
    }


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference_velocity(model, image, t, label):
    """The dense model for one image, written out in float64 from its equations, patch by patch and head by head."""
    w = {name.removeprefix("transformer."): p.detach().double() for name, p in model.named_parameters()}
    side, k = model.hparams["patch_size"], model.head_dim
    patches = [image[0, r : r + side, c : c + side].flatten() for r in range(0, 8, side) for c in range(0, 8, side)]
    x = torch.stack(
        [w["patches.weight"] @ p.double() + w["patches.bias"] + w["patches.position"][i] for i, p in enumerate(patches)]
    )
    angle = [1000.0 * t * 10_000.0 ** (-i / 32) for i in range(32)]
    features = torch.tensor([*map(math.cos, angle), *map(math.sin, angle)], dtype=torch.float64)
    time = w["time.w_out"] @ F.silu(w["time.w_in"] @ features + w["time.b_in"]) + w["time.b_out"]
    c = F.silu(time + w["classes.weight"][label])
    for i, block in enumerate(model.transformer.blocks):
        p = f"blocks.{i}."
        vectors = (w[p + "modulation.weight"] @ c + w[p + "modulation.bias"]).view(6, -1)
        h = norm(x) * (1 + vectors[1]) + vectors[0]
        heads = []
        for head in range(model.width // k):
            rows = slice(head * k, (head + 1) * k)
            q, key, v = (h @ w[p + f"attention.w_{n}"][rows].T for n in "qkv")
            q, key = norm(q) * w[p + "attention.q_norm.weight"], norm(key) * w[p + "attention.k_norm.weight"]
            heads.append(torch.softmax(block.attention.core.scale * q @ key.T, -1) @ v)
        m = block.residual_multiplier
        x = x + m * vectors[2] * (torch.cat(heads, -1) @ w[p + "attention.w_o"].T)
        h = norm(x) * (1 + vectors[4]) + vectors[3]
        hidden = F.silu(h @ w[p + "ffn.w_gate"].T) * (h @ w[p + "ffn.w_up"].T)
        x = x + m * vectors[5] * block.ffn.output_multiplier * (hidden @ w[p + "ffn.w_down"].T)
    shift, scale = (w["head.modulation.weight"] @ c + w["head.modulation.bias"]).view(2, -1)
    v = (norm(x) * (1 + scale) + shift) @ w["head.weight"].T + w["head.bias"]
    out = torch.empty(8, 8, dtype=torch.float64)
    for i, patch in enumerate(v):
        r, col = divmod(i, 8 // side)
        out[r * side : (r + 1) * side, col * side : (col + 1) * side] = patch.view(side, side)
    return out[None]


@pytest.mark.parametrize("patch_size", [2, 4])
def test_velocities_equal_a_literal_float64_network(patch_size):
    model = disturbed(
        make_model(patch_size=patch_size, residual_multiplier=0.7, attention_multiplier=0.3, ffn_multiplier=1.3)
    )
    images, t, labels = batch(3)["image"], torch.tensor([0.0, 0.37, 1.0]), torch.tensor([3, 9, 10])
    got = model(images, t, labels).double()
    expected = torch.stack(
        [reference_velocity(model, *each) for each in zip(images, t.tolist(), labels.tolist(), strict=True)]
    )
    # float32 round-off of some tens of products; angles up to 1000 rad are known to 3e-5.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=5e-4)
    other = reference_velocity(model, images[0], 0.02, 3)
    assert (got[0] - other).abs().max() > 0.01, "another time is another velocity"


def test_loss_equals_its_definition_in_float64():
    model, b = disturbed(make_model()).eval(), batch(5)
    loss = model.loss(b, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    noise, shift = torch.randn((5, 1, 8, 8), generator=g), float(torch.rand(1, generator=g))
    total = 0.0
    for i in range(5):
        t = (i / 5 + shift) % 1
        x_t = (1 - t) * noise[i] + t * b["image"][i]
        v = reference_velocity(model, x_t, t, int(b["label"][i]))
        total += float((v - (b["image"][i] - noise[i]).double()).square().mean()) / 5
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


def test_times_are_uniform_and_spread_over_a_batch():
    model, seen = make_model().eval(), []
    model.forward = lambda x, t, labels: seen.append(t) or torch.zeros_like(x)
    for seed in range(200):
        model.loss(batch(5), torch.Generator().manual_seed(seed))
    t = torch.stack(seen)
    assert torch.allclose((t.sort(dim=1).values * 5).floor(), torch.arange(5.0))  # one in each fifth
    assert abs(float(t[:, 0].mean()) - 0.5) < 4 * 12**-0.5 / 200**0.5  # the first image's alone is uniform


@pytest.mark.parametrize("n_experts", [0, 4])
def test_starts_as_the_identity_and_every_weight_learns(n_experts):
    model, b = make_model(n_experts=n_experts, class_dropout=0.5), batch()
    labels, t = b["label"], torch.full((6,), 0.3)
    assert torch.equal(model(b["image"], t, labels), model(b["image"], t + 0.5, labels.flip(0))), "adaLN-zero"
    optimizer = model.optimizer(list(model.parameters()))
    for _ in range(3):  # the gates open in the first step, the branches learn in the second
        optimizer.zero_grad()
        model.with_auxiliary(model.loss(b)).backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()
    assert model(b["image"], t, labels).shape == b["image"].shape
    assert len(model.moe_layers) == (2 if n_experts else 0)


def test_every_patch_sees_every_other():
    model, images = disturbed(make_model(depth=1)), batch(1)["image"]
    changed = images.clone()
    changed[0, 0, 7, 7] += 1
    t, label = torch.tensor([0.5]), torch.tensor([1])
    difference = (model(images, t, label) - model(changed, t, label)).abs()
    assert float(difference.detach()[0, 0, :2, :2].min()) > 0


# The field x' = x cos t has the solution x(0) exp(sin t); it depends on state and time.
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_samplers(method, order):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = start * math.exp(math.sin(1.0))
    errors = [float((integrate(lambda x, t: x * math.cos(t), start, n, method) - exact).norm()) for n in (20, 40, 80)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_straight_paths_are_exact_in_one_step(method):
    goal, start = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(integrate(lambda x, t: goal - start, start, 1, method), goal)


def test_samples_are_fixed_by_their_seed_and_leave_the_global_random_state():
    model, labels = disturbed(make_model(class_dropout=0.1)).train(), torch.arange(10)
    state = torch.get_rng_state()
    images = model.sample(labels, 2, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert images.shape == (10, 1, 8, 8)
    assert torch.equal(images, model.sample(labels, 2, seed=5))
    assert not torch.equal(images, model.sample(labels, 2, seed=6))
    assert not torch.allclose(images, model.sample(labels, 2, seed=5, guidance=2.0))


def test_guidance_extrapolates_from_no_class():
    model, labels = disturbed(make_model(class_dropout=0.1)).eval(), torch.arange(3)
    one = [model.sample(labels, 1, "euler", guidance=g) for g in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(one[2], one[0] + 3 * (one[1] - one[0]), rtol=1e-4, atol=1e-5)
    none = model.sample(torch.full((3,), 10), 1, "euler")
    torch.testing.assert_close(one[0], none, rtol=1e-4, atol=1e-5)


def test_guidance_needs_a_model_that_knows_no_class():
    with pytest.raises(ValueError, match=r"guidance: found 2\.0, expected 1.*class_dropout=0\.1"):
        make_model().sample(torch.arange(2), guidance=2.0)


def test_classes_are_hidden_in_training_only():
    model, seen = make_model(class_dropout=0.5), []
    model.forward = lambda x, t, labels: seen.append(labels) or torch.zeros_like(x)
    for training in (True, False):
        model.train(training).loss(batch(400), torch.Generator().manual_seed(0))
    share = float((seen[0] == 10).float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / 20
    assert not (seen[1] == 10).any()


def roles_of(target, rule, family):
    return {p.name.removeprefix("transformer."): p for p in target_plan(target, rule, family).parameters}


def target_plan(target, rule, family):
    return plan(target, base={"width": 32, "ffn_width": 96, "n_experts": 0}, rule=rule, family=family)


#: Parameter -> role, and the factors of init and lr at width x 2 under complete-mue and lr under hyperp, kind there.
TABLE = {
    "patches.weight": ("embedding", 1, 1, 1, "adamw"),
    "patches.bias": ("bias", None, 1, 1, "adamw"),
    "patches.position": ("embedding", 1, 1, 1, "adamw"),
    "time.w_in": ("embedding", 1, 1, 1, "adamw"),
    "time.b_in": ("bias", None, 1, 1, "adamw"),
    "time.w_out": ("hidden", 2**-0.5, 0.5, 1, "sphere"),
    "time.b_out": ("bias", None, 1, 1, "adamw"),
    "classes.weight": ("embedding", 1, 1, 1, "adamw"),
    "blocks.0.modulation.weight": ("modulation", None, 0.5, 0.5, "adamw"),
    "blocks.0.modulation.bias": ("bias", None, 1, 1, "adamw"),
    "blocks.0.attention.w_q": ("hidden", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.attention.w_k": ("hidden", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.attention.w_v": ("hidden", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.attention.w_o": ("hidden", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.attention.q_norm.weight": ("qk_norm", None, 1, 1, "adamw"),
    "blocks.0.attention.k_norm.weight": ("qk_norm", None, 1, 1, "adamw"),
    "blocks.0.ffn.router.weight": ("router", None, 0.5, 1, "sphere"),
    "blocks.0.ffn.experts.w_gate": ("expert_up", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.ffn.experts.w_up": ("expert_up", 2**-0.5, 0.5, 1, "sphere"),
    "blocks.0.ffn.experts.w_down": ("expert_down", 2**-0.5, 0.5, 1, "sphere"),
    "head.weight": ("unembedding", 0.5, 0.5, 1, "adam_sphere"),
    "head.bias": ("bias", None, 1, 1, "adamw"),
    "head.modulation.weight": ("modulation", None, 0.5, 0.5, "adamw"),
    "head.modulation.bias": ("bias", None, 1, 1, "adamw"),
}


def test_every_parameter_has_its_role_and_rate():
    target = make_model(width=64, n_experts=4, ffn_width=192)
    adam, sphere = roles_of(target, "complete-mue", "adam"), roles_of(target, "hyperp", "sphere")
    assert {name for name in adam if "blocks.1." not in name} == set(TABLE)
    for name, (role, init, lr, lr_sphere, kind) in TABLE.items():
        a, s = adam[name], sphere[name]
        assert (a.role, a.lr, s.lr, s.kind) == (role, pytest.approx(lr), pytest.approx(lr_sphere), kind), name
        if init is not None:
            assert a.init_factor == pytest.approx(init), name
    for entry in (*adam.values(), *sphere.values()):
        if "modulation" in entry.name:
            assert (entry.init.kind, entry.init.value) == ("constant", 0.0), "adaLN-zero stays zero"


@pytest.mark.parametrize("n_experts", [0, 4])
def test_the_sphere_trains_the_modulation_by_adamw(n_experts):
    model = make_model(n_experts=n_experts)
    optimizer = HyperSphereOptimizer(list(model.named_parameters()), lr=0.02)
    kind_of = {name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {kind for name, kind in kind_of.items() if "modulation" in name} == {"adamw"}
    for _ in range(2):
        optimizer.zero_grad()
        model.with_auxiliary(model.loss(batch())).backward()
        optimizer.step()
    assert all(bool(p.any()) for name, p in model.named_parameters() if "modulation" in name)


class ForeignModulation(torch.nn.Module):
    """adaLN-zero of somebody else: nothing is declared."""

    def __init__(self):
        super().__init__()
        self.adaln = torch.nn.Linear(4, 24)
        torch.nn.init.zeros_(self.adaln.weight)


def test_a_zero_matrix_is_refused_with_a_remedy_that_works():
    model = ForeignModulation()
    with pytest.raises(ValueError, match=r"adaln\.weight.*found zero.*mue_roles.*tag_roles\(model\)"):
        HyperSphereOptimizer(model.named_parameters())
    model.adaln.mue_roles = {"weight": "modulation"}
    tag_roles(model)
    optimizer = HyperSphereOptimizer(model.named_parameters())
    assert [group["kind"] for group in optimizer.param_groups] == ["adamw"]


def quiet_trainer(**options):
    defaults = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", num_sanity_val_steps=0, **{**defaults, "enable_checkpointing": False, **options})


def test_validation_repeats_its_noise_whatever_training_drew():
    model, data, losses = disturbed(make_model(depth=1)), DigitsDataModule(100), []
    for draws, model.seed in ((0, 0), (7, 0), (7, 1)):
        torch.manual_seed(draws)
        losses.append(quiet_trainer(limit_val_batches=1).validate(model, data, verbose=False)[0]["val/loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 3}, "patch_size: found 3, expected a divisor of image_size=8"),
        ({"n_heads": 5}, "n_heads: found 5, expected a divisor of width=32"),
        ({"class_dropout": 1.0}, r"class_dropout: found 1\.0"),
        ({"output_std": -1.0}, r"output_std: found -1\.0"),
        ({"n_experts": 4, "top_k": 5}, "top_k: found 5, expected at most n_experts=4"),
        ({"scoring": "softmax"}, "scoring"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"image_size: found \[1, 16, 16\], expected \[1, 8, 8\]"):
        make_model()(torch.zeros(2, 1, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.slow
def test_resume_is_exact(tmp_path):
    """Noise, times, dropped classes and images of a resumed run are those of one that never stopped."""

    def run(steps, path=None, **options):
        model = make_model(n_experts=4, class_dropout=0.2)
        trainer = quiet_trainer(max_steps=steps, limit_val_batches=0, **options)
        torch.manual_seed(steps)  # the global generator plays no part
        trainer.fit(model, datamodule=DigitsDataModule(32), ckpt_path=path)
        return trainer, torch.cat([p.detach().flatten() for p in model.parameters()])

    _, whole = run(60)  # more than one epoch of 44 batches
    trainer, part = run(50)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = run(60, tmp_path / "part.ckpt")
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, part)
