"""Stability monitors: logits, activations, routing."""
