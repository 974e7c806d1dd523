"""Implementations on torch's grouped GEMM (`torch.nn.functional.grouped_mm`)."""
