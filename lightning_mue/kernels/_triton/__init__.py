"""Triton sources. Importing a module of this package imports Triton, so only a launch does it."""
