"""What all Triton kernels share: products, loads, launches and timing."""
