"""Diffusion: a transformer that turns noise into images by a learned flow."""
