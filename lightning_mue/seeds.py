"""One seed for a run: `seed_everything` of Lightning, unless a part has its own."""

from __future__ import annotations

import os


def run_seed(own: int | None) -> int:
    """A part's own seed; None: the one that Lightning's `seed_everything` was given, the same on all ranks, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if own is None else own
