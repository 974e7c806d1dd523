"""The Triton kernels of a test: compiled where there is a CUDA device, else run by Triton's interpreter on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from helpers.triton_kernels import DEVICE, KERNELS, load_experts, load_kernels


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def triton_symmetric() -> ModuleType:
    return load_kernels(KERNELS + "symmetric.triton")


@pytest.fixture(scope="session")
def walk(triton_symmetric: ModuleType) -> ModuleType:
    """Kernels that write down what the tile map of `triton_symmetric` gives."""
    return load_kernels("tests_kernels_walk", Path(__file__).parent / "symmetric" / "_walk.py")


@pytest.fixture(scope="session")
def triton_experts() -> ModuleType:
    return load_experts()


@pytest.fixture(scope="session")
def triton_routing() -> ModuleType:
    return load_kernels(KERNELS + "routing.triton")


@pytest.fixture(scope="session")
def triton_dispatch() -> ModuleType:
    return load_kernels(KERNELS + "dispatch.triton")
