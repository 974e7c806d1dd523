"""All experts' networks in plain PyTorch, on the CPU parallel over experts."""
