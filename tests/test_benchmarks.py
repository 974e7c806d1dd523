"""What the scripts under benchmarks/ share: the processor, result files, claims; and that the scripts run, at tiny sizes."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers.scripts import BENCHMARKS, imported

XEON = "vendor_id : GenuineIntel\ncpu family : 6\nmodel : {model}\nstepping : 8\nflags : {flags}\n"
XEON += "model name : Intel(R) Xeon(R) Processor\n"
ICE_LAKE = XEON.format(model=106, flags="fpu sse4_2 avx avx2 fma avx512f avx512_vnni")
SAPPHIRE_RAPIDS = XEON.format(model=143, flags="sse4_2 avx avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile")
GRANITE_RAPIDS = XEON.format(model=173, flags="sse4_2 avx avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile amx_fp16")
EPYC = "vendor_id : AuthenticAMD\nmodel name : AMD EPYC 7R13 48-Core Processor @ 2.6GHz\nflags : sse4_2 avx avx2 fma\n"
GRAVITON = "Features : fp asimd sve bf16 svebf16 i8mm\nCPU implementer : 0x41\nCPU part : 0xd40\nCPU revision : 1\n"
OTHER_ARM = "Features : fp asimd\nCPU implementer : 0xc0\nCPU part : 0xac3\n"
ROWS = [{"of": "a", "speed-up": 1.2}, {"of": "b", "speed-up": 0.9}]


@pytest.fixture
def bench(monkeypatch):
    """The scripts' modules, by name."""
    with imported(monkeypatch, ("common", "targets", "processor", "moe_peers", "moe", "callback")) as modules:
        yield modules


@pytest.fixture
def on(bench, monkeypatch, tmp_path):
    """Sets the processor: its /proc/cpuinfo (None: a system without one), and its switches."""

    def be(text, **switches):
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(bench.processor, "CPUINFO", path)
        for key in bench.processor.SWITCHES:
            monkeypatch.delenv(key, raising=False)
        for key, value in switches.items():
            monkeypatch.setenv(key, value)
        return bench.processor.detect()

    return be


def claims_of(bench):
    """Claims of ROWS: every speed-up at least 1."""
    return lambda rows: [bench.common.Claim(f"of {r['of']}", "at least", 1.0, r["speed-up"]) for r in rows]


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        (ICE_LAKE, "intel-xeon-avx512"),
        (SAPPHIRE_RAPIDS, "intel-xeon-amx"),
        (EPYC, "amd-epyc-7r13-avx2"),
        (GRAVITON, "arm-neoverse-v1-sve-bf16"),
        (OTHER_ARM, "arm-0xc0-0xac3-neon"),
    ],
)
def test_instructions_are_part_of_a_processors_name(on, text, slug):
    assert on(text).slug == slug


def test_flags_are_named_alike_on_all_systems(on, monkeypatch):
    assert on(GRAVITON).flags == ("neon", "neon_bf16", "i8mm", "sve", "sve_bf16")
    monkeypatch.setattr(
        torch.cpu,
        "get_capabilities",
        lambda: {"cpu_name": "Some Xeon CPU", "avx512_f": True, "fma3": True, "amx_bf16": False, "l2_cache_size": 4096},
        raising=False,
    )
    without_proc = on(None)
    assert (without_proc.name, without_proc.flags) == ("Some Xeon CPU", ("fma", "avx512f"))
    assert without_proc.slug == "some-xeon-avx512"


def test_a_processor_of_which_nothing_is_known_has_a_name(on, bench, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert on(None).slug == "riscv64-riscv64"
    assert on("processor : 0\nhart : 1\n").slug == "riscv64-riscv64"
    machine = bench.common.machine()
    assert (machine["cpu"], machine["flags"], machine["cpu identity"]) == ("riscv64", "none known", "not recorded")


@pytest.mark.parametrize(
    ("switches", "isa"),
    [
        ({}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX_FP16"}, "amx"),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "avx2-emulated"),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512bf16-emulated"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "onednn-avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}, "aten-default_onednn-avx2"),
    ],
)
def test_switches_make_another_processor(on, switches, isa):
    found = on(SAPPHIRE_RAPIDS, **switches)
    assert found.isa == isa
    assert found.slug == "intel-xeon-amx" + ("" if isa == "amx" else f"_{isa}")
    assert found.switches == switches


def test_results_of_another_model_are_not_overwritten(on, bench, tmp_path):
    on(SAPPHIRE_RAPIDS)
    first = bench.common.result_name("x", tmp_path)
    bench.common.save(first, ROWS, folder=tmp_path)
    assert bench.common.result_name("x", tmp_path) == first == "x_intel-xeon-amx"
    on(GRANITE_RAPIDS)
    assert bench.common.result_name("x", tmp_path) == "x_intel-xeon-amx_6-173-8"


def test_threads_are_rows_and_a_run_replaces_its_own(bench, tmp_path, capsys, monkeypatch):
    save = bench.common.save
    for threads, speed_up in ((2, 3.0), (1, 2.0), (2, 4.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        save("x", [{"of": "a", "speed-up": speed_up}], claims_of(bench), folder=tmp_path)
    result = json.loads((tmp_path / "x.json").read_text())
    assert [(row["threads"], row["speed-up"]) for row in result["rows"]] == [(1, 2.0), (2, 4.0)]
    assert [(claim["threads"], claim["measured"]) for claim in result["claims"]] == [(1, 2.0), (2, 4.0)]
    assert "dropped" not in capsys.readouterr().out
    save("x", [{"another": "column"}], folder=tmp_path)
    assert "x: 1 rows of other columns than these are dropped" in capsys.readouterr().out


def test_a_part_of_the_table_leaves_the_others(bench, tmp_path):
    bench.common.save("x", ROWS, claims_of(bench), part=["of"], folder=tmp_path)
    bench.common.save("x", [{"of": "b", "speed-up": 1.5}], claims_of(bench), part=["of"], folder=tmp_path)
    result = json.loads((tmp_path / "x.json").read_text())
    assert {row["of"]: row["speed-up"] for row in result["rows"]} == {"a": 1.2, "b": 1.5}
    assert [claim["holds"] for claim in result["claims"]] == [True, True]


def test_one_line_a_claim_and_strict_fails(bench, tmp_path, capsys):
    bench.common.save("x", ROWS, claims_of(bench), folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["holds: of a: 1.2, target >= 1", "does not hold: of b: 0.9, target >= 1"]
    with pytest.raises(SystemExit) as stop:
        bench.common.save("x", ROWS, claims_of(bench), strict=True, folder=tmp_path)
    assert stop.value.code == 1
    bench.common.save("x", ROWS[:1], claims_of(bench), strict=True, folder=tmp_path)


@pytest.mark.parametrize(
    ("direction", "measured", "holds"),
    [("at least", 1.0, True), ("at least", 0.999, False), ("at most", 1.0, True), ("at most", 1.001, False)]
    + [(direction, math.nan, False) for direction in ("at least", "at most")],
)
def test_a_claim_has_a_direction_and_survives_its_file(bench, direction, measured, holds):
    claim = bench.targets.Claim("a figure", direction, 1.0, measured, 2)
    stored = json.loads(json.dumps(claim.to_json(), allow_nan=False))
    assert claim.holds == stored["holds"] == holds
    assert str(bench.targets.Claim.from_json(stored)) == str(claim)
    with pytest.raises(ValueError, match="direction: found 'above'"):
        bench.targets.Claim("a figure", "above", 1.0, measured)


def test_summary_lists_every_claim_and_strict_fails(on, bench, tmp_path, capsys, monkeypatch):
    on(GRAVITON)
    bench.common.save("good", ROWS[:1], claims_of(bench), folder=tmp_path)
    bench.common.save("bad", ROWS[1:], claims_of(bench), folder=tmp_path)
    capsys.readouterr()

    def table(*arguments):
        monkeypatch.setattr(sys, "argv", ["targets.py", "--folder", str(tmp_path), *arguments])
        bench.targets.main()
        return capsys.readouterr().out

    assert "| ARM Neoverse-V1 (sve-bf16) |" in table()
    assert "| of b | 0.9 | >= 1 | does not hold |" in table()
    assert "of b" not in table("good", "--strict")
    with pytest.raises(SystemExit) as stop:
        table("--strict")
    assert stop.value.code == 1


def test_committed_results_are_named_by_their_processor_and_say_what_holds(bench):
    files = [path for path in (BENCHMARKS / "results").rglob("*.json") if not path.stem.startswith("gpu_")]
    assert files
    for path in files:
        result = json.loads(path.read_text())
        assert result["machine"]["isa"] in path.stem, path
        assert result["claims"], path
        for stored in result["claims"]:
            assert bench.targets.Claim.from_json(stored).holds == stored["holds"], (path, stored)
        assert all({"threads", "date", "commit", "torch"} <= set(row) for row in result["rows"]), path


def test_targets_follow_the_instructions(on, bench):
    rows = json.loads((BENCHMARKS / "results" / "moe_cpu_intel-xeon-amx.json").read_text())["rows"]
    on(SAPPHIRE_RAPIDS)
    assert not any("of the layer over dense" in claim.what for claim in bench.moe.claims(rows))
    on(EPYC.replace("fma", "fma avx512f avx512_bf16"))
    elsewhere = bench.moe.claims(rows)
    assert sum("of the layer over dense" in claim.what for claim in elsewhere) == 2
    assert sum("over the best peer" in claim.what for claim in elsewhere) == 4


@pytest.mark.slow
def test_gpu_optimizer_runs_all_its_sections(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_optimizer.py"), "--smoke", "--out", str(tmp_path)]
    # Without a device also where there is one; the tests that need it are others.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu_optimizer.json").read_text())
    assert {"date", "torch"} <= set(result["machine"])
    rows = {name: len(part) for name, part in result["sections"].items()}
    assert rows == {
        "Ceilings": 4,
        "Errors of symmetric_matmul": 9,
        "Orthogonality": 12,
        "Time of symmetric_matmul": 7,
        "Time of orthogonalize": 3,
        "Time of a step": 2,
        "CUDA graph": 1,
        "Targets": 6,
    }
    assert all(row["ms"] > 0 for row in result["sections"]["Time of a step"])
    assert "## Orthogonality" in (tmp_path / "gpu_optimizer.md").read_text()


def test_gpu_optimizer_refuses_to_time_a_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_optimizer.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_foreign_transfer_runs_all_figures_at_the_rates_that_the_base_chose():
    command = [sys.executable, str(BENCHMARKS / "foreign_transfer.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [line.removeprefix("row ") for line in done.stdout.splitlines() if line.startswith("row ")]
    found = [json.loads(row) for row in rows]
    labels = ["base", "target, callback", "target, no callback"]
    assert [(row["figure"], row["model"]) for row in found] == [
        (name, label) for name in ("mingpt", "experts", "tied") for label in labels
    ]
    for base, scaled, control in zip(*[iter(found)] * 3, strict=True):
        best = base["rates"][base["best index"]]
        assert scaled["rates"] == control["rates"] == pytest.approx([best, 2 * best], rel=1e-3)
        assert scaled["losses"] != control["losses"]
        assert scaled["rule"] != "sp" == control["rule"]
