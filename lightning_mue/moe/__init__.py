"""lightning_mue."""
