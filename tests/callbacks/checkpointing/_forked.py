"""Everything on several ranks, in one process whose imports they share: `_forked.py folder`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from callbacks.checkpointing import _buckets, _worlds
from helpers.processes import fork

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, world, act in [("buckets", 4, _buckets.act), *((f"world{n}", n, _worlds.act) for n in (4, 2, 3))]:
        fork(name, world, partial(act, folder), folder)
