"""Batched matrix products with a symmetric result."""
