"""How probes see logits, attention and routing inside modules of any project."""
