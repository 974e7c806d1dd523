"""The benchmark of the experts on a GPU: its parts, and a whole smoke run on the CPU in Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import lightning_mue
import lightning_mue.kernels.routing.op as kernel_routing

BENCHMARKS = Path(lightning_mue.__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """The scripts' modules, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = (
        "gpu_common",
        "gpu_sections",
        "moe_peers_gpu",
        "moe_peers_fused",
        "gpu_moe_checks",
        "gpu_moe_times",
        "gpu_moe",
    )
    return SimpleNamespace(**{name: import_module(name) for name in names})


@pytest.mark.slow
def test_smoke_run_has_every_section(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "BUDGET": "900"}
    environment |= {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--smoke", "moe"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu_moe.json").read_text())["sections"]
    assert {name: len(rows) for name, rows in report.items()} == {
        "Ceilings": 4,
        "Errors against float64": 9,
        "Routing against plain PyTorch": 6,
        "Repeated and captured": 3,
        "Compilation": 1,
        "First calls": 1,
        "Times": 8,
        "Skewed": 10,
        "Memory": 10,
        "Kernels": 20,
        "Whole layer": 3,
        "Routing times": 12,
        "Other shapes": 16,
        "float32": 16,
        "Tilings": 0,
        "Targets": 8,
    }
    rows = [row for part in report.values() for row in part]
    assert not [row for row in rows if {"error", "stopped"} & set(row)]
    # Other people's kernels need a GPU; the table says it.
    assert {
        (row["of"], "not installed" in row["missing"] or "CUDA" in row["missing"]) for row in rows if "missing" in row
    } == {
        ("liger", True),
        ("sonicmoe", True),
    }
    assert sum(row.get("ok") is True for row in rows) == 9 + 6 + 3
    assert all(0 <= row["differs"] <= 2e-2 for row in rows if "differs" in row)
    timed = [row for row in report["Times"] if "missing" not in row]
    assert len(timed) == 6
    assert all(row["both ms"] > 0 for row in timed)
    stated = [row for row in report["Memory"] if "activation_memory() says" in row]
    # Per expert, not per token, are the offsets and counts, which weigh in at 16 tokens an expert.
    assert [abs(row["saved bytes a token"] / row["activation_memory() says"] - 1) < 0.06 for row in stated] == [
        True
    ] * 4
    assert "## Targets" in (tmp_path / "gpu_moe.md").read_text()


def test_refuses_to_time_a_cpu(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_moe.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        bench.gpu_moe.main()
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_shell_script_names_its_parts(tmp_path):
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--smoke", "everything"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OUT": str(tmp_path)})
    assert done.returncode == 2
    assert "choose from tests, moe, kernels, optimizer" in done.stderr


def sections_of(bench, **parts):
    return [bench.gpu_sections.Section(name, 5.0, part) for name, part in parts.items()]


def run(bench, folder, sections, seconds=60.0):
    bench.gpu_sections.run_sections(sections, "r", "Title", CPU, folder, time.time() + seconds)
    return bench.gpu_sections.load(folder / "r.json")


def test_a_section_that_fails_or_takes_too_long_leaves_its_rows_and_the_others(bench, tmp_path):
    def fails(report):
        yield {"a": 1}
        raise ValueError("no such thing")

    def hangs(report):
        yield {"a": 2}
        while True:
            try:
                time.sleep(60)
            except Exception:  # what a contender's error handling would do
                continue

    def lacks(report):
        return import_module("no_such_module_here")

    sections = sections_of(bench, fails=fails, hangs=hangs, lacks=lacks, last=lambda report: [{"seen": len(report)}])
    sections[1] = sections[1]._replace(seconds=0.1)
    report = run(bench, tmp_path, sections)
    assert report["fails"] == [{"a": 1}, {"error": "ValueError: no such thing"}]
    assert report["hangs"][0] == {"a": 2}
    assert "stopped" in report["hangs"][1]
    assert list(report["lacks"][0]) == ["missing"]
    assert report["last"] == [{"seen": 4}]
    assert bench.gpu_sections.failures(report) == ["fails: {'error': 'ValueError: no such thing'}"]


def test_nothing_is_started_when_the_time_is_over(bench, tmp_path):
    report = run(bench, tmp_path, sections_of(bench, late=lambda report: [{"a": 1}]), seconds=-1.0)
    assert list(report["late"][0]) == ["stopped"]


def test_after_a_process_died_the_next_one_goes_on_behind_the_section(bench, tmp_path, monkeypatch):
    def dies(report):
        raise SystemExit(9)

    calls = []
    sections = sections_of(
        bench, first=lambda report: calls.append(1) or [{"a": 1}], dies=dies, last=lambda r: [{"a": 3}]
    )
    with pytest.raises(SystemExit):
        run(bench, tmp_path, sections)
    report = run(bench, tmp_path, sections)
    assert report == {"first": [{"a": 1}], "dies": [{"error": "the process ended here"}], "last": [{"a": 3}]}
    assert calls == [1]


def test_a_device_that_does_not_answer_any_more_ends_the_process(bench, tmp_path, monkeypatch):
    def fails(report):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(bench.gpu_sections, "_works", lambda device: False)
    with pytest.raises(SystemExit) as stop:
        run(bench, tmp_path, sections_of(bench, fails=fails, last=lambda report: [{"a": 1}]))
    assert stop.value.code == bench.gpu_sections.DEVICE_LOST
    assert "illegal" in bench.gpu_sections.load(tmp_path / "r.json")["fails"][0]["error"]


def test_supervisor_starts_the_work_again_until_it_ends_well(bench, tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import json, sys; from pathlib import Path; path = Path(sys.argv[1])\n"
        "done = json.loads(path.read_text())['sections'] if path.exists() else {}\n"
        "done[f'section {len(done)}'] = []; path.write_text(json.dumps({'sections': done}))\n"
        "sys.exit(75 if len(done) < 3 else 0)\n"
    )
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"sections": {"of an earlier run": []}}))
    report = bench.gpu_sections.supervise([str(script), str(path)], path, 9, time.time() + 60)
    assert list(report) == ["section 0", "section 1", "section 2"]


def test_supervisor_ends_work_that_outlasts_its_time(bench, tmp_path):
    path = tmp_path / "r.json"
    code = f"open({str(path)!r}, 'w').write('{{\"sections\": {{\"a\": []}}}}'); import time; time.sleep(60)"
    start = time.time()
    assert bench.gpu_sections.supervise(["-c", code], path, 9, start + 2.0) == {"a": []}
    assert time.time() < start + 30


@pytest.mark.parametrize("top_k", [2, 8])
def test_routings_are_as_skewed_as_they_say(bench, top_k):
    shape = bench.moe_peers_gpu.Shape(64, 4, 4, 16, top_k)
    counts = {}
    for kind in ("balanced", "hot", "everybody"):
        routed = bench.moe_peers_gpu.random_routing(shape, torch.float32, CPU, kind)
        counts[kind] = routed.counts
        assert routed.expert_ids.shape == routed.gates.shape == (64, top_k)
        assert routed.counts.tolist() == torch.bincount(routed.expert_ids.flatten(), minlength=16).tolist()
        different = [len(set(ids)) == top_k for ids in routed.expert_ids.tolist()]
        # A quarter of the rows is more than one a token from 5 experts a token on.
        assert all(different) == (kind != "hot" or top_k <= 4)
    assert counts["hot"][0] == 64 * top_k // 4
    assert counts["everybody"][0] == 64
    assert counts["balanced"].max() < 64 * top_k // 4


def test_contenders_compute_the_same(bench):
    peers = bench.moe_peers_gpu
    shape = peers.Shape(40, 32, 16, 4, 2)
    torch.manual_seed(0)
    weights, routed = peers.Weights.random(shape, torch.float32, CPU), peers.random_routing(shape, torch.float32, CPU)
    makers = peers.contenders(shape, weights)
    expected = makers["loop"]().train(routed)
    for name in ("grouped_mm", "torch", "composition", "transformers"):
        if name == "transformers":
            pytest.importorskip("transformers", reason="transformers needs Python 3.11")
        with mock.patch.object(torch.nn.functional, "grouped_mm", wraps=torch.nn.functional.grouped_mm) as product:
            found = makers[name]().train(routed)
        assert name in ("torch", "grouped_mm") or product.called
        for value, right in zip(found[:3], expected[:3], strict=True):  # gates and ups may be stacked after that
            assert bench.gpu_common.relative_error(value, right.double()) < 1e-6
        assert bench.gpu_common.relative_error(found[-1], expected[-1].double()) < 1e-6
    dense = []
    for name in ("dense", "dense fused"):
        torch.manual_seed(1)
        with mock.patch.object(torch, "compile", wraps=lambda function, **kwargs: function) as compiled:
            dense.append(makers[name]().train(routed)[0])
        assert compiled.called is (name == "dense fused")
    assert dense[0].shape == expected[0].shape
    assert torch.equal(*dense)


def fused_modules(monkeypatch, spoil=lambda y: y, capability=(9, 0)):
    """Modules with the signatures of liger-kernel and sonic-moe, computed by a loop; on a CPU that says it is a GPU."""

    def experts(x, gates_S, tokens_S, ids_S, w_gate, w_up, w_down):
        y = torch.zeros_like(x)
        for e in range(len(w_up)):
            mine = (ids_S == e).nonzero()[:, 0]
            rows = x[tokens_S[mine]]
            out = (torch.nn.functional.silu(rows @ w_gate[e].T) * (rows @ w_up[e].T)) @ w_down[e].T
            y = y.index_add(0, tokens_S[mine].long(), out * gates_S[mine, None].to(x.dtype))
        return spoil(y)

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32
            tokens = torch.arange(len(x)).repeat_interleave(top_k_index.shape[1])
            gate, up = gate_up_proj.chunk(2, 1)
            return experts(x, top_k_weights.flatten(), tokens, top_k_index.flatten(), gate, up, down_proj)

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type, inference=False
    ):
        assert (b1, b2, E, activation_type, inference) == (None, None, w2.shape[2], "swiglu", False)
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert (token_indices.diff() >= 0).all()
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        y = experts(x, router_scores, token_indices, expert_indices, w1[:, ::2], w1[:, 1::2], w2)
        return y, torch.bincount(expert_indices, minlength=E)

    modules = {
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerFusedMoEFunction": LigerFusedMoEFunction},
        "sonicmoe": {},
        "sonicmoe.enums": {"ActivationType": SimpleNamespace(SWIGLU="swiglu")},
        "sonicmoe.functional": {"moe_general_routing_inputs": moe_general_routing_inputs},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def require(name, least, device):
        if capability < least:
            raise import_module("moe_peers_fused").UnavailableError(f"{name} needs sm{least[0]}{least[1]}")

    monkeypatch.setattr(import_module("moe_peers_fused"), "require_capability", require)


def fused_rows(bench, dtype=torch.float32):
    """What `usable` says of the loop and other people's fused kernels."""
    peers, shape = bench.moe_peers_gpu, bench.moe_peers_gpu.Shape(40, 32, 16, 4, 2)
    torch.manual_seed(0)
    weights, routed = peers.Weights.random(shape, dtype, CPU), peers.random_routing(shape, dtype, CPU)
    makers = {
        "loop": peers.contenders(shape, weights)["loop"],
        **bench.moe_peers_fused.fused_contenders(shape, weights),
    }
    made, rows = bench.gpu_moe_times.Bench(bench.gpu_moe_times.Sizes(True), CPU).usable(makers, routed)
    return set(made), rows


def test_other_peoples_kernels_are_called_as_they_want_it_and_compared_first(bench, monkeypatch):
    fused_modules(monkeypatch)
    made, rows = fused_rows(bench)
    assert made == {"loop", "liger", "sonicmoe"}
    assert all(rows[name]["differs"] < 1e-6 for name in ("liger", "sonicmoe")), rows
    assert fused_rows(bench, torch.bfloat16)[0] == made


@pytest.mark.parametrize("spoil", [lambda y: y * 1.1, lambda y: y.detach() + 0 * y, lambda y: y * torch.nan])
def test_other_peoples_kernels_that_compute_something_else_are_not_timed(bench, monkeypatch, spoil):
    fused_modules(monkeypatch, spoil)
    made, rows = fused_rows(bench)
    assert made == {"loop"}
    assert all("something else" in rows[name]["missing"] for name in ("liger", "sonicmoe"))


def test_other_peoples_kernels_that_cannot_run_give_a_reason_and_no_failure(bench, monkeypatch):
    def needs_another(y):
        raise TypeError("apply() takes 7 arguments")

    fused_modules(monkeypatch, needs_another, capability=(8, 0))
    made, rows = fused_rows(bench)
    assert made == {"loop"}
    assert "does not run here: TypeError: apply() takes 7 arguments" in rows["liger"]["missing"]
    assert "SonicMoE needs sm90" in rows["sonicmoe"]["missing"]
    assert bench.gpu_sections.failures({"Times": list(rows.values())}) == []
    monkeypatch.undo()
    for name in ("liger_kernel", "liger_kernel.ops", "sonicmoe", "sonicmoe.enums"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made, rows = fused_rows(bench)
    assert made == {"loop"}
    assert all("not installed" in rows[name]["missing"] for name in ("liger", "sonicmoe"))
    device = bench.moe_peers_fused.require_capability
    with pytest.raises(bench.moe_peers_fused.UnavailableError, match="needs a CUDA device, weights are on cpu"):
        device("It", (9, 0), CPU)


def test_checks_of_errors_pass_what_is_right_and_catch_what_is_not(bench, monkeypatch):
    torch.manual_seed(0)
    checks = bench.gpu_moe_checks
    right = checks.grouped_ffn
    monkeypatch.setattr(checks, "BACKENDS", ("torch",))
    rows = list(checks.correctness(CPU, smoke=True, workers=0))
    assert [row["ok"] for row in rows if "of" in row["case"]] == [True] * 3, rows

    def leaves_tokens_out(x, *args, **options):
        return right(x, *args, **options) * (torch.arange(len(x)) % 2)[:, None]

    def raises(x, *args, **options):
        raise RuntimeError("no such kernel")

    def lacks(x, *args, **options):
        raise ImportError("no such module")

    monkeypatch.setattr(checks, "grouped_ffn", leaves_tokens_out)
    rows = list(checks.correctness(CPU, smoke=True, workers=0))
    assert len(rows) == 3 + 5  # of 7 cases, the two of no tokens are right
    assert all(row["ok"] is False and row["y"] > 0.05 for row in rows if "of" not in row["case"])
    assert [row["case"] for row in rows if "of" in row["case"]] == ["1 of 3 cases", "1 of 3 cases", "0 of 1 cases"]
    monkeypatch.setattr(checks, "grouped_ffn", raises)
    rows = list(checks.correctness(CPU, smoke=True, workers=0))
    assert len(rows) == 3 + 7
    assert all(row["ok"] is False for row in rows)
    monkeypatch.setattr(checks, "grouped_ffn", lacks)
    rows = list(checks.correctness(CPU, smoke=True, workers=0))
    assert [set(row) for row in rows] == [{"backend", "type", "missing"}] * 3


def test_memory_is_poisoned(bench):
    with bench.gpu_common.poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2, dtype=torch.bfloat16).new_empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("spoil", "ok"),
    [
        (lambda routed: routed, True),
        (lambda routed: routed._replace(gates=routed.gates * 1.001), False),
        (lambda routed: routed._replace(expert_ids=routed.expert_ids.flip(0)), False),
        (lambda routed: routed._replace(counts=routed.counts.roll(1, -1)), False),
    ],
)
def test_checks_of_routing_catch_a_difference(bench, monkeypatch, spoil, ok):
    route, plan = kernel_routing.route, bench.gpu_moe_checks.plan_dispatch
    backends = []

    def stand_in(*args, backend, **options):
        backends.append(backend)
        routed = route(*args, backend="torch", **options)
        return spoil(routed) if backend == "triton" else routed

    monkeypatch.setattr(kernel_routing, "route", stand_in)
    monkeypatch.setattr(bench.gpu_moe_checks, "plan_dispatch", lambda *args, backend: plan(*args, backend="torch"))
    rows = list(bench.gpu_moe_checks.routing(CPU, smoke=True))
    assert len(rows) == 6, rows
    assert backends == ["triton", "torch"] * 6, rows
    assert [row["ok"] for row in rows if "bias" not in row["case"]] == [ok] * 4


def test_saved_bytes_are_what_autograd_holds(bench):
    peers = bench.moe_peers_gpu
    shape = peers.Shape(512, 256, 128, 4, 2)
    weights, routed = peers.Weights.random(shape, torch.bfloat16, CPU), peers.random_routing(shape, torch.bfloat16, CPU)
    makers = peers.contenders(shape, weights)
    least = shape.tokens * (2 * shape.width + 4 * shape.top_k * shape.hidden)
    saved = {name: bench.gpu_moe_times.saved_bytes(makers[name](), routed) / least for name in ("torch", "composition")}
    assert 1 <= saved["torch"] <= 1.15
    assert saved["composition"] > 2
    square = peers.Contender(lambda r: (r.x.view(-1) * r.x.flatten()).view_as(r.x), [])
    assert bench.gpu_moe_times.saved_bytes(square, routed) == routed.x.nbytes


def test_roofline_counts_flops_and_bytes_of_the_notes(bench):
    shape = bench.moe_peers_gpu.Shape(32768, 2048, 768, 128, 8)
    assert 3 * shape.flops == 18 * 32768 * 8 * 2048 * 768
    assert shape.row_bytes(True) == 16 * 2048 + 28 * 768
    report = {"Ceilings": [{"of": "bfloat16", "TFLOP/s": 790.0}, {"of": "copy", "TB/s": 4.3}]}
    compute = bench.gpu_moe_times.roofline_ms(report, 3 * shape.flops, shape.rows * shape.row_bytes(True), "bfloat16")
    assert math.isclose(compute, 3 * shape.flops / 790e12 * 1e3)
    narrow = bench.moe_peers_gpu.Shape(32768, 512, 128, 64, 8)
    moving = bench.gpu_moe_times.roofline_ms(report, 3 * narrow.flops, narrow.rows * narrow.row_bytes(True), "bfloat16")
    assert math.isclose(moving, narrow.rows * (16 * 512 + 28 * 128) / 4.3e12 * 1e3)


def test_targets_are_read_from_their_sections(bench):
    shape = bench.moe_peers_gpu.Shape(8, 8, 8, 4, 2)
    own, other = {"shape": str(shape)}, {"shape": "another"}
    report = {
        "Times": [
            {**other, "of": "triton", "both TFLOP/s": 1.0},
            {**own, "of": "triton", "both TFLOP/s": 445.0},
            {**own, "of": "liger", "time / triton": 1.02},
            {**own, "of": "transformers", "time / triton": 1.6},
            {**own, "of": "dense", "time / triton": 0.7},
            {**own, "of": "dense fused", "time / triton": 0.6},
        ],
        "Skewed": [{**own, "of": "triton", "hot / balanced": 1.3}],
        "Memory": [{"of": "triton", "over the least": 1.01}],
        "Repeated and captured": [{"backend": "triton", "graph same as a call": True}],
    }
    assert [(row["measured"], row["met"]) for row in bench.gpu_moe.targets(report, shape)] == [
        (445.0, True),
        (1.02, False),
        (1.6, False),
        (0.7, True),
        (0.6, False),
        (1.3, False),
        (1.01, True),
        (1.0, True),
    ]
    assert {row["measured"] for row in bench.gpu_moe.targets({}, shape)} == {"not measured"}


def test_tilings_come_from_the_kernels_file(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path))
    assert bench.gpu_moe.tilings() == []
    (tmp_path / "tilings.json").write_text(json.dumps({"up/True/256": [128, 128, 64, 3, 8]}))
    assert bench.gpu_moe.tilings() == [{"file": "tilings.json", "for": "up/True/256", "tiling": "[128, 128, 64, 3, 8]"}]
