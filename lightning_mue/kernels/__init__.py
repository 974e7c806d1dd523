"""Operators with Triton kernels and an implementation in plain PyTorch each; importing them needs neither Triton nor a GPU."""

from lightning_mue.kernels.symmetric.op import symmetric_matmul, symmetric_matmul_torch

__all__ = ["symmetric_matmul", "symmetric_matmul_torch"]
