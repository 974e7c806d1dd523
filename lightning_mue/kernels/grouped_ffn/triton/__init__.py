"""All experts' networks as Triton kernels."""
