"""The Triton kernel of symmetric products against float64: on a device where there is one, else in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "columns", "cut out", "every other"]


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    batch, rows, cols = t.shape
    if layout == "rows":
        return t.clone()
    if layout == "columns":
        return t.mT.contiguous().mT
    if layout == "cut out":
        wide = t.new_full((batch, rows + 3, cols + 5), torch.nan)
        wide[:, 1 : rows + 1, 2 : cols + 2] = t
        return wide[:, 1 : rows + 1, 2 : cols + 2]
    wide = t.new_full((2 * batch, 2 * rows, cols), torch.nan)
    wide[::2, ::2] = t
    return wide[::2, ::2]


def problem(shape, dtype, device, seed, gram=False, with_c=True, layouts=("rows", "rows", "rows")):
    """Random a, b, c. `a @ b` is symmetric only if `gram`: the kernel's answer is defined all the same."""
    batch, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, n, k, generator=generator)
    b = torch.randn(batch, k, n, generator=generator)
    c = torch.randn(batch, n, n, generator=generator)
    a = laid_out(a.to(device, dtype), layouts[0])
    b = a.mT if gram else laid_out(b.to(device, dtype), layouts[1])
    return a, b, laid_out((c + c.mT).to(device, dtype), layouts[2]) if with_c else None


def mirrored(lower: torch.Tensor) -> torch.Tensor:
    return lower.tril() + lower.tril(-1).mT


def check(out, a, b, c, alpha, beta):
    """Every element written, symmetric bit by bit, and as near to float64 as its type and float32 sums allow."""
    a, b, c = (None if t is None else t.double() for t in (a, b, c))
    exact = alpha * a @ b
    size = abs(alpha) * (a.abs() @ b.abs())
    if c is not None and beta:
        exact += beta * c
        size += abs(beta) * c.abs()
    assert not out.isnan().any(), "not every element was written"
    assert torch.equal(out, out.mT), "not symmetric"
    # Rounding to the type, and one float32 rounding for each of k additions and the epilogue; subnormals in float16.
    # The interpreter cuts bfloat16 off instead of rounding it: a whole unit in the last place, where a device gives half.
    info = torch.finfo(out.dtype)
    unit = info.eps if out.dtype == torch.bfloat16 and not out.is_cuda else info.eps / 2
    bound = mirrored(exact.abs() * unit + size * (a.shape[2] + 4) * 2**-23 + info.smallest_normal * info.eps)
    assert ((out.double() - mirrored(exact)).abs() <= bound).all(), "wrong values"


def run(module, a, b, c, alpha, beta, tiling=None, layout="rows"):
    """Launch on an output full of NaN; what lies around it must stay NaN."""
    batch, n, _ = a.shape
    out = laid_out(a.new_full((batch, n, n), torch.nan), layout)
    module.launch(a, b, c, alpha, beta, out, "ieee", tiling)
    around = out if out._base is None else out._base.clone()
    if out._base is not None:
        around.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(torch.nan)
        assert layout == "columns" or around.isnan().all(), "wrote beside the output"
    return out


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.explain},  # it takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_any_strides(triton_symmetric, device, data):
    draw = data.draw
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 40)), "shape")
    a, b, c = problem(
        shape,
        draw(st.sampled_from(DTYPES), "dtype"),
        device,
        draw(st.integers(0, 2**31), "seed"),
        draw(st.booleans(), "gram"),
        draw(st.booleans(), "with c"),
        draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3), "layouts"),
    )
    alpha, beta = draw(st.sampled_from([(1.0, 0.0), (2.5, -0.75), (0.0, 1.0), (-1, 1)]), "factors")
    tiling = triton_symmetric.SymmetricTiling(*draw(st.sampled_from([(16, 16, 16), (32, 16, 16), (64, 32, 32)])), 2, 4)
    out = run(triton_symmetric, a, b, c, alpha, beta, tiling, draw(st.sampled_from(LAYOUTS), "out"))
    check(out, a, b, c, alpha, beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 257])
def test_every_tiling_that_is_offered(triton_symmetric, device, dtype, n):
    m = triton_symmetric
    for tiling in m.HALF if dtype != torch.float32 else m.TF32 + m.IEEE:
        a, b, c = problem((1, n, 37), dtype, device, n)
        check(run(m, a, b, c, 0.5, 2.0, tiling), a, b, c, 0.5, 2.0)


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 0, 0)])
def test_nothing_to_do(triton_symmetric, device, shape):
    a, b, c = problem(shape, torch.float32, device, 0)
    assert run(triton_symmetric, a, b, c, 1.0, 1.0).shape == (shape[0], shape[1], shape[1])


def test_an_upper_half_of_c_is_not_read(triton_symmetric, device):
    a, b, c = problem((2, 40, 8), torch.float32, device, 1)
    upper = torch.ones(40, 40, dtype=torch.bool, device=device).triu(1)
    out = run(triton_symmetric, a, b, c.masked_fill(upper, torch.nan), 1.0, -1.0)
    check(out, a, b, c, 1.0, -1.0)


def far_apart(values, strides):
    """`values` at these strides, in memory that is reserved but, between them, never touched."""
    far = values.new_empty(sum((size - 1) * s for size, s in zip(values.shape, strides, strict=True)) + 1)
    view = far.as_strided(values.shape, strides)
    view.copy_(values)
    return view


@pytest.mark.parametrize("layout", ["matrices", "rows", "columns"])
def test_offsets_beyond_32_bits(triton_symmetric, device, layout):
    step = 2**31 // 20 + 16  # times 20 it leaves int32, while the stride itself is in it
    shape = (22, 4, 16) if layout == "matrices" else (1, 22, 16)
    strides = {"matrices": (step, 16, 1), "rows": (1, step, 1), "columns": (1, 1, step)}[layout]
    out_strides = {"matrices": (step, 4, 1), "rows": (1, step, 1), "columns": (1, 1, step)}[layout]
    a, b, c = problem(shape, torch.bfloat16, device, 2)
    if layout != "columns":  # 16 columns stay within 32 bits
        a = far_apart(a, strides)
    b = far_apart(b, {"matrices": (step, 4, 1), "rows": (1, 1, step), "columns": (1, 1, step)}[layout])
    c = far_apart(c, out_strides)
    out = far_apart(torch.full_like(c, torch.nan, memory_format=torch.contiguous_format), out_strides)
    triton_symmetric.launch(a, b, c, 1.0, 1.0, out, "ieee", triton_symmetric.SymmetricTiling(32, 16, 16, 2, 4))
    check(*(t.contiguous() for t in (out, a, b, c)), 1.0, 1.0)


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces parts of the kernel in the interpreter"
)


@needs_interpreter
@pytest.mark.parametrize(
    ("part", "said"),
    [("no mirror", "written"), ("upper squares", "wrong values"), ("last row", "written"), ("full tiles", "symmetric")],
)
def test_negative_controls_a_broken_kernel_is_caught(triton_symmetric, monkeypatch, device, part, said):
    m = triton_symmetric
    whole, square_of = m.store_twice, m.square_of

    def no_mirror(*args):
        *rest, box, stored, mirrored, has_c = args
        whole(*rest, box, stored, box & (mirrored < 0), has_c)

    def full_tiles(*args):
        *rest, box, _stored, mirrored, has_c = args
        whole(*rest, box, box, box & (mirrored < 0), has_c)

    def upper_squares(p, side, group):
        row, col = square_of(p, side, group)
        return col, row

    def last_row(p, side, group):
        row, col = square_of(p, side, group)
        return m.tl.minimum(row, side - 2), col

    name = "square_of" if part in ("upper squares", "last row") else "store_twice"
    broken = {"no mirror": no_mirror, "full tiles": full_tiles, "upper squares": upper_squares, "last row": last_row}
    n = 16 if part == "full tiles" else 40  # in a single square the mirror writes nothing that is not written anyway
    a, b, c = problem((1, n, 8), torch.float32, device, 3)
    tiling = m.SymmetricTiling(16, 16, 16, 2, 4)
    check(run(m, a, b, c, 1.0, 1.0, tiling), a, b, c, 1.0, 1.0)
    monkeypatch.setattr(m, name, broken[part])
    with pytest.raises(AssertionError, match=said):
        check(run(m, a, b, c, 1.0, 1.0, tiling), a, b, c, 1.0, 1.0)


def squares(walk, device, sides, group):
    """Side, row and column of every square of triangles of these sides, as the kernel has them."""
    p = np.concatenate([np.arange(side * (side + 1) // 2) for side in sides])
    side = np.concatenate([np.full(side * (side + 1) // 2, side) for side in sides])
    out = torch.full((2, len(p)), -1, dtype=torch.int32, device=device)
    given = (torch.tensor(x, dtype=torch.int32, device=device) for x in (p, side))
    walk.walk_kernel[(-(-len(p) // 65536),)](*given, *out, len(p), GROUP=group, WIDTH=65536)
    return side, *out.cpu().numpy()


def test_tile_map_visits_every_square_once(walk, device):
    side, row, col = squares(walk, device, range(1, 201), 8)
    assert ((col >= 0) & (col <= row) & (row < side)).all()
    # As many different squares on and below the diagonal as there are of them: all.
    assert len(np.unique((side * 256 + row) * 256 + col)) == sum(n * (n + 1) // 2 for n in range(1, 201))


def test_tile_map_stays_within_a_group_of_rows(walk, device):
    _, row, col = squares(walk, device, [50], 8)
    assert (np.diff(row // 8) >= 0).all()
    # Within a group, columns come in order as long as they are full, so that what is loaded for one serves all its rows.
    full = col <= row // 8 * 8
    for group in range(7):
        assert (np.diff(col[full & (row // 8 == group)]) >= 0).all()


def test_row_is_exact_where_the_root_is_rounded(walk, device):
    rows = np.arange(1, 46000)
    first = rows * (rows + 1) // 2
    for p, expected in ((first, rows), (first - 1, rows - 1)):
        found = torch.full((len(p),), -1, dtype=torch.int32, device=device)
        walk.row_kernel[(1,)](torch.tensor(p, dtype=torch.int32, device=device), found, len(p), WIDTH=1 << 16)
        assert (found.cpu().numpy() == expected).all()
    # It takes the correction: the formula alone is wrong for some of them.
    root = np.floor((np.sqrt(np.float32(8) * (first - 1).astype(np.float32) + 1) - 1) * np.float32(0.5))
    assert (root != rows - 1).any()
