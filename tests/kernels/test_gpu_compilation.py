"""Every kernel's default on every architecture: it is chosen by the device's shared memory, and a compiler agrees (no device)."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.triton_kernels import part_of_experts
from triton.runtime.errors import OutOfResources

import lightning_mue

SCRIPT = Path(lightning_mue.__file__).parents[1] / "benchmarks" / "gpu_compile.py"
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block
KERNELS = ("up", "down", "hidden", "dx", "dw", "dw_down")
TYPES = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


def keys():
    """Every kernel, activation, type, and few or many rows an expert."""
    Key = part_of_experts("tilings").TilingKey
    for kernel, activation, (dtype, precision), rows in product(KERNELS, ("swiglu", "gelu"), TYPES, (32, 2048)):
        yield Key(kernel, activation, rows, 128, 2048, 768, dtype, precision, torch.device("cpu"))


@pytest.mark.parametrize("kib", [*sorted(set(SHARED.values())), 48])
def test_what_is_offered_fits(triton_experts, triton_symmetric, monkeypatch, kib):
    tilings, symmetric, size = part_of_experts("tilings"), triton_symmetric, kib * 1024
    for module in (tilings, symmetric):
        monkeypatch.setattr(module, "shared_memory", lambda device: size)
    wide = kib >= 227
    for key in keys():
        offered = tilings.candidates(key)
        assert offered
        assert all(tilings.shared_bytes(key, t, size) <= size for t in offered), key
        assert wide or not any(t.described for t in offered)  # no bulk copies before 9.0
    for dtype, precision in TYPES:
        offered = symmetric.tilings_for(dtype, precision, torch.device("cpu"))
        assert offered
        assert all(symmetric.shared_bytes(t, dtype, wide) <= size for t in offered)
    if kib == 99:  # negative control: what a wide device takes would not fit
        assert any(tilings.shared_bytes(key, tilings._offered(key, True)[0], size) > size for key in keys())


def no_room(limit, ran):
    """A launch on a device with less memory than was estimated."""

    def run(tiling):
        if tiling[0] * tiling[1] > limit:
            raise OutOfResources(tiling[0] * tiling[1], limit, "shared memory")
        ran.append(tiling)
        return tiling

    return run


def test_a_launch_without_room_goes_on_with_what_fits(triton_experts, monkeypatch):
    tuning = part_of_experts("tuning")
    monkeypatch.setattr(tuning, "_chosen", {})
    for key in keys():
        for limit in (128 * 128, 64 * 64):
            tuning._chosen.clear()
            ran = []
            run = no_room(limit, ran)
            found = tuning.launch_chosen(key, run)
            assert found[0] * found[1] <= limit
            assert tuning.launch_chosen(key, run) == found  # remembered, if another was taken than the default
            assert ran == [found] * 2
    with pytest.raises(RuntimeError, match=r"found no tiling that fits this device.*expected one that fits"):
        tuning.launch_chosen(key, no_room(1, []))


def test_a_symmetric_product_without_room_goes_on_with_what_fits(triton_symmetric, monkeypatch):
    whole, symmetric, ran = triton_symmetric._geometry, triton_symmetric, []

    def geometry(case, tiling):
        no_room(64 * 64, ran)(tiling)
        return whole(case, tiling)

    monkeypatch.setattr(symmetric, "_geometry", geometry)
    monkeypatch.setattr(symmetric, "_known", {})
    a = torch.randn(1, 40, 24).bfloat16().float()
    for dtype in (torch.float16, torch.float32):
        out = torch.empty(1, 40, 40, dtype=dtype)
        symmetric.launch(a.to(dtype), a.mT.to(dtype), None, 1.0, 0.0, out)
        assert ran[-1][:2] == (64, 64)
        assert (out.float() - a @ a.mT).norm() < 1e-2 * out.float().norm()
    with pytest.raises(OutOfResources):  # what a caller asks for by name is not replaced
        symmetric.launch(a, a.mT, None, 1.0, 0.0, out, tiling=symmetric.HALF[0])


def _can_compile():
    """Whether Triton can compile for NVIDIA devices here."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return Path(get_ptxas(90).path).exists()
    except (ImportError, RuntimeError):
        return False


def compiled(arch, *arguments):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--arch", str(arch), "--activations", "swiglu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


PRODUCTS = ("up_kernel", "rows_kernel", "hidden_kernel", "weights_kernel", "symmetric_kernel")


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile(), reason="Triton has no compiler for NVIDIA devices here")
@pytest.mark.parametrize(
    ("arch", "name"), [*((arch, "bfloat16") for arch in (80, 86, 89, 90, 100)), (86, "float32"), (86, "tf32")]
)
def test_every_default_compiles_within_shared_memory_and_without_spills(arch, name):
    """For the sizes of the targets in docs/gpu.md."""
    rows = compiled(arch, "--types", name)
    assert not [row for row in rows if row["faults"]]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == (16 if name == "bfloat16" else 11), kernels
    assert all(row["shared"] <= SHARED[arch] * 1024 and row["registers"] <= 255 for row in rows)
    if name != "float32":  # matrix instructions of that architecture in every product
        expected = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma")
        assert {expected in row["matrix"] for row in rows if row["kernel"] in PRODUCTS} == {True}


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile(), reason="Triton has no compiler for NVIDIA devices here")
def test_negative_control_tilings_of_another_architecture_are_caught():
    rows = compiled(86, "--types", "bfloat16", "--oversized", "--experts-only")
    found = " ".join(fault for row in rows for fault in row["faults"])
    assert "of 101376 bytes of shared memory on this architecture" in found
    assert "bytes of spilled registers" in found
