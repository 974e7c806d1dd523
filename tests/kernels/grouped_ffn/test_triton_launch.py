"""How the experts' kernels are launched: tables of tiles, nothing on the host, tilings that are remembered, compilation."""

from __future__ import annotations

import heapq
import json

import pytest
import torch
from helpers import experts
from helpers.triton_kernels import part_of_experts
from torch.utils._python_dispatch import TorchDispatchMode

Case = experts.Case

COUNTS = [[5], [0], [0, 0, 7, 0], [16, 17, 1, 0, 33], [64, 0, 0], [1] * 6, [3, 40, 2, 41, 0, 15]]


def module(name):
    return part_of_experts(name)


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def table(tile_map):
    return tile_map.tiles[: int(tile_map.live)].tolist()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_tiles_cover_every_row_once(triton_experts, device, counts):
    offsets, rows = offsets_of(counts, device), sum(counts) + 3  # three rows of no expert
    found = module("tile_map").tile_rows(offsets, rows, 16)
    ends = offsets.tolist()
    expected = [
        [e, row, min(row + 16, ends[e + 1]), 1] for e in range(len(counts)) for row in range(ends[e], ends[e + 1], 16)
    ]
    assert table(found) == expected
    assert len(expected) <= found.bound


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_chunks_cover_every_row_once_and_those_of_cut_experts_come_first(triton_experts, device, counts):
    offsets = offsets_of(counts, device)
    found = module("tile_map").chunk_rows(offsets, sum(counts), 16)
    rows = table(found)
    assert len(rows) <= found.bound
    cut = [n for _, _, _, n in rows if n != 1]
    assert len(cut) <= found.slots
    assert [n != 1 for _, _, _, n in rows] == [True] * len(cut) + [False] * (len(rows) - len(cut))
    for e, count in enumerate(counts):
        mine = [row for row in rows if row[0] == e]
        assert [row for chunk in mine for row in range(*chunk[1:3])] == list(range(offsets[e], offsets[e + 1]))
        assert [chunk[3] for chunk in mine] == ([len(mine)] + [0] * (len(mine) - 1) if count > 16 else [1])
        sizes = [end - start for _, start, end, _ in mine]
        assert max(sizes) <= 16
        assert max(sizes) - min(sizes) < len(mine)  # equal, but for what does not divide


def test_there_are_never_more_tiles_than_the_bound(triton_experts):
    """The worst routing for a number of rows and experts: each expert has one row beyond a whole tile."""
    tile_map = module("tile_map")
    for rows in range(1, 80):
        for n in range(1, 9):
            worst = 0
            for ragged in range(1, n + 1):
                whole = (rows - ragged) // 16 if rows >= ragged else -1
                worst = max(worst, ragged + whole if whole >= 0 else 0)
            bound = min(-(-rows // 16) + n - 1, rows)
            assert worst <= bound
    assert tile_map.tile_rows(offsets_of([1, 1, 1], "cpu"), 3, 16).bound == 3


def makespan(chunks, tiles, processors=132):
    """Time until all is done, a row of a tile taking one unit: each processor takes the next tile when it is free."""
    free = [0] * processors
    for _, start, end, _ in chunks:
        for _ in range(tiles):
            heapq.heapreplace(free, free[0] + end - start)
    return max(free)


@pytest.mark.parametrize(("experts_", "tiles"), [(16, 96), (16, 2), (8, 12)])
def test_one_expert_with_a_quarter_of_the_rows_costs_little(triton_experts, monkeypatch, experts_, tiles):
    """At most 1.25 times the balanced time. Of the schedule alone; a device has its say, too."""
    weights, tile_map, rows = module("weights"), module("tile_map"), 2**18
    monkeypatch.setattr(weights, "multiprocessors", lambda device: 132)
    size = weights.chunk_size(rows, tiles, torch.device("cpu"))

    def time(counts, size):
        return makespan(table(tile_map.chunk_rows(offsets_of(counts, "cpu"), rows, size)), tiles)

    balanced = [rows // experts_] * experts_
    share = (rows - rows // 4) // (experts_ - 1)
    for hot in (0, experts_ - 1):
        counts = [share] * experts_
        counts[hot] = rows - share * (experts_ - 1)
        assert time(counts, size) <= 1.25 * time(balanced, size)
    if tiles < 96:  # what it buys: the hot expert last, in one piece
        assert time(counts, rows) > 1.5 * time(balanced, size)
    # The slots of the chunks' sums stay small: at most 8 tiles per multiprocessor.
    assert 2 * rows // size * tiles <= 8 * 132 or size == weights._SHORTEST


class NoHost(TorchDispatchMode):
    """Refuses whatever brings values of a tensor to the host; `tolist` on a CPU tensor it does not see, the next test does."""

    REFUSED = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.REFUSED or name.startswith("unique"):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def tiny(monkeypatch, kernels):
    tiling = module("tuning").ExpertTiling(16, 32, 32, 2, 4)
    monkeypatch.setattr(kernels, "launch_chosen", lambda key, run: run(tiling))


def test_nothing_is_asked_of_the_device(triton_experts, monkeypatch, device):
    tiny(monkeypatch, triton_experts)
    made = experts.make(Case(5, 16, 16, 2, 1, bias=True), 0, device=device)
    with NoHost():
        y, z = triton_experts.forward(made.problem, True)
        triton_experts.backward(made.problem, made.dy, z, True)
        with pytest.raises(RuntimeError, match="waits for the device"):  # it would notice
            made.problem.offsets[0].item()
    assert experts.error(y, experts.reference(made)[0]) < 1e-5


class Recorder:
    """Stands for a kernel and notes grids."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_grids_depend_on_shapes_alone(triton_experts, monkeypatch):
    """Everything but the kernels runs on the meta device, where tensors have no values."""
    kernels = {
        "tile_map": ["tile_map_kernel"],
        "up": ["up_kernel"],
        "rows": ["rows_kernel"],
        "hidden": ["hidden_kernel"],
        "weights": ["weights_kernel", "add_chunks_kernel", "bias_kernel"],
        "combine": ["combine_kernel", "gather_kernel"],
    }
    recorders = {kernel: Recorder() for names in kernels.values() for kernel in names}
    for name, names in kernels.items():
        for kernel in names:
            monkeypatch.setattr(module(name), kernel, recorders[kernel])
    p = experts.make(Case(1000, 64, 48, 4, 2, bias=True), 0).problem
    p = p._replace(**{n: t.to("meta") for n, t in p._asdict().items() if isinstance(t, torch.Tensor)})
    y, z = triton_experts.forward(p, True)
    grads = triton_experts.backward(p, torch.empty_like(p.x), z, True)
    assert [t.shape for t in (y, *grads)] == [t.shape for t in (p.x, *p.trained)]
    assert all(recorder.grids for recorder in recorders.values())
    default = module("tuning").candidates(
        module("tuning").TilingKey("up", "swiglu", 512, 4, 64, 48, torch.float32, "ieee", y.device)
    )[0]
    assert recorders["up_kernel"].grids == [((-(-2000 // default.rows) + 3) * -(-48 // default.cols),)]
    from lightning_mue.kernels.grouped_ffn.pytorch import experts as plain

    with pytest.raises((RuntimeError, NotImplementedError)):  # it would notice: this one reads offsets on the host
        plain.forward(p, True)


@pytest.fixture
def tuning(triton_experts, monkeypatch, tmp_path):
    """The module, as if there were a device to time on; `tuning.timed` lists what was timed. The last one offered wins."""
    tuning = module("tuning")
    timed = []

    def milliseconds(run, tiling):
        timed.append(tiling)
        run(tiling)
        return -float(len(timed))

    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files", {})
    monkeypatch.setattr(tuning, "may_time", lambda device: True)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "timed", timed, raising=False)
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    return tuning


def key_of(tuning, kernel="down", rows=2048):
    return tuning.TilingKey(kernel, "swiglu", rows, 128, 2048, 768, torch.bfloat16, "ieee", torch.device("cpu"))


def nothing(tiling):
    return None


def test_the_fastest_is_timed_once_and_kept_in_a_file(tuning):
    offered = tuning.candidates(key_of(tuning))
    assert tuning.choose(key_of(tuning), nothing) == offered[-1]
    assert tuning.timed == list(offered)
    assert tuning.choose(key_of(tuning), nothing) == offered[-1]
    tuning.choose(key_of(tuning, "up"), nothing)
    tuning.timed.clear()
    tuning._chosen.clear()  # another process
    tuning._files.clear()
    assert tuning.choose(key_of(tuning), nothing) == offered[-1]
    assert tuning.timed == []
    assert len(json.loads(tuning.cache_file().read_text())) == 2
    assert [file.name for file in tuning.cache_file().parent.iterdir()] == ["tilings.json"]


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe\x00", b""])
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(tuning, content):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"tilings.json: found no choices of tilings .*, expected a JSON object. It is ignored"
    ):
        tuning.choose(key_of(tuning), nothing)
    assert key_of(tuning).name in json.loads(tuning.cache_file().read_text())


def test_a_tiling_that_is_not_offered_any_more_is_timed_again(tuning):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(json.dumps({key_of(tuning).name: [1, 2, 3], "another": [4]}))
    tuning.choose(key_of(tuning), nothing)
    assert tuning.timed
    assert json.loads(tuning.cache_file().read_text())["another"] == [4]


def test_a_folder_that_cannot_be_written_is_only_a_warning(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="timed again in every process, expected a file that can be written"):
        assert tuning.choose(key_of(tuning), nothing) == tuning.candidates(key_of(tuning))[-1]


def test_without_timing_the_first_is_taken_and_nothing_written(triton_experts, monkeypatch, tmp_path):
    tuning = module("tuning")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files", {})
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIGHTNING_MUE_AUTOTUNE", "0")
    assert tuning.choose(key_of(tuning), nothing) == tuning.candidates(key_of(tuning))[0]
    assert not tuning.cache_file().exists()


def test_few_rows_an_expert_get_small_tiles(triton_experts):
    tuning = module("tuning")
    assert tuning.candidates(key_of(tuning, rows=32))[0].rows == 64
    assert tuning.candidates(key_of(tuning, rows=2048))[0].rows == 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_of_forward_and_backward_serves_another_routing(triton_experts):
    case = Case(512, 256, 192, 8, 2, bias=True)
    made = experts.make(case, 0, torch.bfloat16, "cuda")
    p = made.problem

    def run():
        y, z = triton_experts.forward(p, True)
        return [y, *triton_experts.backward(p, made.dy, z, True)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    other = experts.make(case, 1, torch.bfloat16, "cuda").problem
    for name in ("x", "gates", "order", "inverse", "tokens", "offsets"):
        getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
