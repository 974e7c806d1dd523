"""MoE layers from dense networks, and from and to transformers' MoE blocks."""
