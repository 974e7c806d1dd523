"""Checks a plan by running it: base and target, one step each, near the base's size."""
