"""The arithmetic of a step, against a literal float64 transcription of docs/theory.md section 5.1 in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_mue.optim.distributed.update as update
import lightning_mue.optim.matrices as matrices_module
from lightning_mue.optim import PRESETS, HyperSphereOptimizer

SHAPES = {"square": (16, 16), "wide": (12, 40), "tall": (40, 12), "stack": (5, 12, 20), "conv": (8, 3, 3, 3)}


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(normal(shape, i, dtype)) for i, (name, shape) in enumerate(SHAPES.items())}


def set_grads(params: dict[str, nn.Parameter], seed: int) -> None:
    for i, param in enumerate(params.values()):
        param.grad = normal(tuple(param.shape), 1000 * (seed + 1) + i, param.dtype)


def matrices(x: torch.Tensor) -> np.ndarray:
    x = x.detach().double()
    return (x if x.ndim == 3 else x.reshape(1, x.shape[0], -1)).numpy().copy()


def reference_orth(u: np.ndarray, preset: str) -> np.ndarray:
    x = u / np.linalg.norm(u)
    for a, b, c in PRESETS[preset].steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference_step(w, m, g, radius, *, lr, mu=0.95, nesterov=True, wd=0.0, preset="scheduled"):
    """One matrix, float64, line by line as the theory has it. Returns the new weight and momentum."""
    m = mu * m + g
    u = mu * m + g if nesterov else m
    o = reference_orth(u, preset)
    w = w - lr * radius * o / np.linalg.norm(o) - lr * wd * w
    return radius * w / np.linalg.norm(w), m


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"momentum": 0.5, "preset": "classic"},
        {"weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Of the radius; 3e-8 and 1e-16 are seen, the rounding of the weights. Another BLAS may round the products otherwise.
    [(torch.float32, 2e-7), (torch.float64, 1e-14)],
)
def test_three_steps_equal_the_literal_reference(options, dtype, tolerance):
    params = parameters(dtype)
    optimizer = HyperSphereOptimizer([{"params": params.items(), "kind": "sphere"}], lr=0.05, **options)
    weights = {name: matrices(p) for name, p in params.items()}
    momenta = {name: np.zeros_like(w) for name, w in weights.items()}
    radii = {name: [np.linalg.norm(x) for x in w] for name, w in weights.items()}
    names = {"momentum": "mu", "weight_decay": "wd"}
    literal = {names.get(key, key): value for key, value in options.items()}
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        for name, param in params.items():
            for i, g in enumerate(matrices(param.grad)):
                weights[name][i], momenta[name][i] = reference_step(
                    weights[name][i], momenta[name][i], g, radii[name][i], lr=0.05, **literal
                )
    for name, param in params.items():
        error = np.abs(matrices(param) - weights[name]).max() / max(radii[name])
        assert error < tolerance, name
        assert np.abs(matrices(optimizer.state[param]["momentum"]) - momenta[name]).max() < 10 * tolerance
        assert np.allclose(optimizer.state[param]["radius"].reshape(-1), radii[name], rtol=tolerance)


def test_negative_control_the_reference_sees_a_wrong_momentum():
    param = nn.Parameter(normal((12, 20), 0))
    w = matrices(param)[0]
    optimizer = HyperSphereOptimizer([("w", param)], lr=0.05, momentum=0.9)
    m = np.zeros_like(w)
    radius = np.linalg.norm(w)
    for step in range(2):
        param.grad = normal((12, 20), step + 1)
        optimizer.step()
        w, m = reference_step(w, m, matrices(param.grad)[0], radius, lr=0.05, mu=0.95)
    assert np.abs(matrices(param)[0] - w).max() / radius > 1e-4


def test_norms_stay_at_their_radii_over_200_steps():
    params = {**parameters(), "large": nn.Parameter(normal((256, 512), 9)), "head": nn.Parameter(normal((64, 32), 8))}
    optimizer = HyperSphereOptimizer(params.items(), lr=0.02, weight_decay=0.1)
    initial = {name: np.linalg.norm(matrices(p), axis=(1, 2)) for name, p in params.items()}
    start = {name: p.detach().clone() for name, p in params.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    for name, param in params.items():
        norms = np.linalg.norm(matrices(param), axis=(1, 2))
        assert np.abs(norms / initial[name] - 1).max() < 1e-6, name  # 1e-7 is seen: the rounding of the weights
        assert (param - start[name]).norm() / start[name].norm() > 0.1, "it should have gone somewhere"


@pytest.mark.parametrize("shape", [(1, 2048, 2048), (1, 3, 1_000_003), (4, 16, 40_000), (3, 5, 7)])
def test_sum_of_squares_is_accurate_at_every_shape(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    exact = x.double().flatten(1).norm(dim=1)
    # Rows are rounded to float32, at random. A plain float32 sum is 8e-5 off at the first.
    assert (matrices_module.sum_squares(x).sqrt() / exact - 1).abs().max() < 6e-8


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
def test_first_step_has_length_lr_in_radii(kind):
    param = nn.Parameter(normal((24, 16), 0, torch.float64))
    before = param.detach().clone()
    param.grad = normal((24, 16), 1, torch.float64)
    param.grad -= (param.grad * before).sum() / before.square().sum() * before
    HyperSphereOptimizer([{"params": [param], "kind": kind}], lr=1e-3).step()
    angle = torch.acos(torch.cosine_similarity(param.flatten(), before.flatten(), dim=0)).item()
    # O is not exactly orthogonal to W though G is; the radial part of the step is then lost.
    assert 0.9e-3 < angle < 1.0001e-3


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
def test_weight_decay_is_a_first_order_no_op(kind):
    def moved(lr: float, decay: float) -> torch.Tensor:
        param = nn.Parameter(normal((12, 20), 0, torch.float64))
        param.grad = normal((12, 20), 1, torch.float64)
        HyperSphereOptimizer([{"params": [param], "kind": kind}], lr=lr, weight_decay=decay).step()
        return param.detach()

    whole, half = ((moved(lr, 0.1) - moved(lr, 0.0)).norm().item() for lr in (0.02, 0.01))
    assert whole > 0
    assert 3.8 < whole / half < 4.2  # second order: half the step, a quarter of the difference


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_is_an_exact_no_op(kind, lr, dtype):
    params = parameters(dtype)
    optimizer = HyperSphereOptimizer([{"params": list(params.values()), "kind": kind}], lr=lr, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in params.items()}
    for seed in (None, 0, None):  # before any gradient, and with momentum or moments left from one
        for param in params.values():
            param.grad = torch.zeros_like(param)
        if seed is not None:
            set_grads(params, seed)
        optimizer.step()
        if seed is not None and lr:
            assert not any(torch.equal(p, before[name]) for name, p in params.items())
            before = {name: p.detach().clone() for name, p in params.items()}
        assert all(torch.equal(p, before[name]) for name, p in params.items())


def test_momentum_decays_under_zero_gradient_and_at_zero_lr_it_grows():
    param = nn.Parameter(normal((6, 8), 0))
    optimizer = HyperSphereOptimizer([("w", param)], lr=0.0, momentum=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum"], torch.ones_like(param))
    param.grad.zero_()
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum"], torch.full_like(param, 0.5))


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
def test_expert_without_gradient_stays_while_the_others_move_as_if_alone(kind):
    stack = nn.Parameter(normal((4, 12, 20), 0))
    alone = [nn.Parameter(w.clone()) for w in stack.detach()]
    before = stack.detach().clone()
    joint = HyperSphereOptimizer([{"params": [stack], "kind": kind}], lr=0.05)
    apart = HyperSphereOptimizer([{"params": alone, "kind": kind}], lr=0.05)
    for step in range(3):
        stack.grad = normal((4, 12, 20), step + 1)
        stack.grad[2] = 0
        for param, g in zip(alone, stack.grad, strict=True):
            param.grad = g.clone()
        joint.step()
        apart.step()
    assert torch.equal(stack[2], before[2])
    for i in (0, 1, 3):
        assert not torch.equal(stack[i], before[i])
        assert torch.allclose(stack[i], alone[i], rtol=0, atol=1e-5)


def test_tiny_gradients_are_not_taken_for_zero():
    param = nn.Parameter(normal((6, 8), 0))
    scaled = nn.Parameter(param.detach().clone())
    param.grad = normal((6, 8), 1)
    scaled.grad = param.grad * 1e-30
    HyperSphereOptimizer([("w", param)], lr=0.1).step()
    HyperSphereOptimizer([("w", scaled)], lr=0.1).step()
    assert torch.allclose(param, scaled, rtol=0, atol=1e-6)


def test_nan_gradient_is_shown_and_stays_in_its_expert():
    stack = nn.Parameter(normal((3, 4, 5), 0))
    stack.grad = normal((3, 4, 5), 1)
    stack.grad[1, 0, 0] = torch.nan
    HyperSphereOptimizer([("w", stack)], lr=0.1).step()
    assert stack[1].isnan().all()
    assert stack[[0, 2]].isfinite().all()


def test_large_stacks_and_many_matrices_are_cut_without_changing_the_step(monkeypatch):
    def train(cut: int | None) -> list[torch.Tensor]:
        if cut:
            monkeypatch.setattr(matrices_module, "chunk_bytes", lambda device: cut * 12 * 20 * 4)
        params = [
            nn.Parameter(normal(shape, i)) for i, shape in enumerate([(12, 20), (7, 12, 20), (12, 20), (2, 12, 20)])
        ]
        optimizer = HyperSphereOptimizer([{"params": params, "kind": "sphere"}], lr=0.05)
        for step in range(2):
            for i, param in enumerate(params):
                param.grad = normal(tuple(param.shape), 100 * (step + 1) + i)
            optimizer.step()
        return [p.detach() for p in params]

    whole = train(None)
    for cut in (1, 3, 5):
        for a, b in zip(whole, train(cut), strict=True):
            assert (a - b).abs().max() < 1e-5


def test_chunks_hold_every_matrix_once_within_the_limit(monkeypatch):
    monkeypatch.setattr(matrices_module, "chunk_bytes", lambda device: 3 * 4 * 4 * 4)
    shapes = [(4, 4), (7, 4, 4), (4, 4), (1, 4, 4), (2, 4, 4)]
    items = [
        matrices_module.Matrix(*[torch.ones(s)] * 3, torch.ones(s[0]) if len(s) == 3 else torch.ones(()))
        for s in shapes
    ]
    sizes = [
        [len(matrices_module.as_matrices(piece.weight)) for piece in chunk] for chunk in matrices_module.chunks(items)
    ]
    assert sum(map(sum, sizes)) == 12
    assert all(0 < sum(chunk) <= 3 for chunk in sizes)


def test_rounds_of_communication_are_of_one_dtype_and_bounded_in_the_math_type(monkeypatch):
    """A round is orthogonalized in one type: in float32, a float64 matrix beside it was off by 7e-4 after three steps."""
    monkeypatch.setattr(update, "_ROUND_BYTES", 400)
    one, two, other = torch.bfloat16, torch.float32, torch.float64
    params = [torch.empty(5, 8, dtype=dtype) for dtype in (one, one, one, two, two, other, other, two)]
    params += [torch.empty(20, 8), torch.empty(5, 8)]
    rounds = list(update.rounds(params))
    assert [param.data_ptr() for members in rounds for param in members] == [param.data_ptr() for param in params]
    dtypes = [[param.dtype for param in members] for members in rounds]
    assert dtypes == [[one, one], [one], [two, two], [other], [other], [two], [two], [two]]


def test_strides_do_not_matter():
    plain = parameters()
    odd = {
        name: nn.Parameter(
            p.detach().to(memory_format=torch.channels_last) if p.ndim == 4 else p.detach().mT.contiguous().mT
        )
        for name, p in plain.items()
    }
    for params in (plain, odd):
        optimizer = HyperSphereOptimizer([{"params": params.values(), "kind": "sphere"}], lr=0.05)
        set_grads(params, 0)
        optimizer.step()
    for name in plain:
        assert not odd[name].is_contiguous()
        assert torch.allclose(plain[name], odd[name], rtol=0, atol=1e-5), name


def test_bfloat16_weights_train_on_the_sphere_in_float32_math():
    params = parameters(torch.bfloat16)
    exact = {name: nn.Parameter(p.detach().float()) for name, p in params.items()}
    low, high = (HyperSphereOptimizer([{"params": p.values(), "kind": "sphere"}], lr=0.05) for p in (params, exact))
    for step in range(20):
        set_grads(params, step)
        for name in params:
            exact[name].grad = params[name].grad.float()
        low.step()
        high.step()
    for name, param in params.items():
        norms = np.linalg.norm(matrices(param), axis=(1, 2))
        # Stored in 8 bits: entries are 2^-9 off at most, at random, and that does not add up over steps.
        assert np.abs(norms / low.state[param]["radius"].double().reshape(-1).numpy() - 1).max() < 2**-9
        assert torch.cosine_similarity(param.float().flatten(), exact[name].flatten(), dim=0) > 0.999
        assert low.state[param]["momentum"].dtype == torch.bfloat16
        assert low.state[param]["radius"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_group_is_torch_adamw(dtype):
    options = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.1}
    mine = parameters(dtype)
    theirs = copy.deepcopy(mine)
    a = HyperSphereOptimizer([{"params": mine.values(), "kind": "adamw"}], **options)
    b = torch.optim.AdamW(theirs.values(), foreach=True, **options)
    for step in range(20):
        set_grads(mine, step)
        set_grads(theirs, step)
        a.step()
        b.step()
    for name in mine:
        assert (mine[name] - theirs[name]).abs().max() <= 1e-6
        assert not torch.equal(mine[name], parameters(dtype)[name])


def test_adam_sphere_equals_the_literal_reference():
    param = nn.Parameter(normal((30, 12), 0))
    optimizer = HyperSphereOptimizer([("lm_head.weight", param)], lr=0.02, betas=(0.8, 0.9), eps=1e-3)
    assert optimizer.param_groups[0]["kind"] == "adam_sphere"
    w = param.detach().double().numpy().copy()
    m, v, radius = np.zeros_like(w), np.zeros_like(w), np.linalg.norm(w)
    for t in range(1, 11):
        param.grad = normal((30, 12), t)
        optimizer.step()
        g = param.grad.double().numpy()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        o = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        w = w - 0.02 * radius * o / np.linalg.norm(o)
        w = radius * w / np.linalg.norm(w)
    # Ten steps of lr 0.02 with float32's 6e-8 a value: 4e-8 of the radius is seen.
    assert np.abs(param.detach().double().numpy() - w).max() / radius < 1e-6


class TwoLayers(nn.Module):
    """y = m2 W2 tanh(m1 W1 x), float64."""

    def __init__(self, m1: float, m2: float) -> None:
        super().__init__()
        self.m1, self.m2 = m1, m2
        self.up = nn.Parameter(normal((16, 6), 0, torch.float64))
        self.down = nn.Parameter(normal((4, 16), 1, torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.m2 * torch.tanh(self.m1 * x @ self.up.T) @ self.down.T


@pytest.mark.parametrize(("lr_factor", "same"), [(1.0, True), (3.0, False)])
def test_folding_a_multiplier_into_the_radius_leaves_the_training_unchanged(lr_factor, same):
    """docs/theory.md section 2: on the sphere, m -> 1 means init std x m, and the learning rate stays (3.0: the control)."""
    with_multipliers, folded = TwoLayers(3.0, 0.2), TwoLayers(1.0, 1.0)
    with torch.no_grad():
        folded.up *= 3.0
        folded.down *= 0.2
    losses: list[list[float]] = []
    for model, factor in ((with_multipliers, 1.0), (folded, lr_factor)):
        optimizer = HyperSphereOptimizer([{"params": model.parameters(), "kind": "sphere"}], lr=0.02 * factor)
        losses.append([])
        for step in range(50):
            x = normal((32, 6), 100 + step, torch.float64)
            loss = (model(x) - torch.sin(x[:, :4])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    a, b = np.array(losses)
    assert a[-10:].mean() < 0.5 * a[:10].mean(), "it should learn"
    assert (np.abs(a / b - 1).max() < 1e-9) == same


def test_only_copies_are_written_back(monkeypatch):
    """A view of a weight is the weight, with any stride of a side of length 1; a copy is not."""
    copied = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: (copied.extend(to), copy(to, source)))
    narrow, filters = torch.zeros(9, 9)[:1].as_strided((1, 9), (1, 1)), torch.zeros(6, 3, 4, 4).mT.transpose(1, 2)
    matrices = [matrices_module.as_matrices(narrow), matrices_module.as_matrices(filters)]
    assert matrices[0].data_ptr() == narrow.data_ptr()
    assert matrices[0].reshape(narrow.shape).stride() != narrow.stride()
    for matrix in matrices:
        matrix += 1
    matrices_module.write_back([narrow, filters], matrices)
    assert [w is filters for w in copied] == [True]
    assert narrow.eq(1).all()
    assert filters.eq(1).all()
