"""Which processes of a sweep are alive: each one counts up in the storage, and is dead when its count has stood still."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Seconds after which a process that gave no sign of life is dead, and seconds between two signs.
LEASE, BEAT = 90.0, 10.0


class Workers:
    """This process and the others of a sweep.

    A process of the same machine is dead as soon as it does not exist any more. Of others only their count is seen: no clock of
    another machine is trusted, so a new process has to watch for ``lease`` seconds first.

    Args:
        lease: Seconds without a sign of life after which a process of another machine is dead.
    """

    def __init__(self, lease: float = LEASE) -> None:
        self.id, self.lease = uuid.uuid4().hex[:12], lease
        self._count, self._due = 0, 0.0
        #: Worker -> (its last count, when it was first seen).
        self._seen: dict[str, tuple[Any, float]] = {}

    def sign(self) -> dict[str, Any] | None:
        """What this process must write now as its sign of life; None if the last one is recent."""
        if time.monotonic() < self._due:
            return None
        self._due, self._count = time.monotonic() + min(BEAT, self.lease / 5), self._count + 1
        return {"count": self._count, "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}

    def is_dead(self, worker: str, sign: Mapping[str, Any] | None) -> bool:
        """Whether another process is dead, by the last sign that it wrote."""
        if worker == self.id:
            return False
        if sign is not None and sign["machine"] is not None and sign["machine"] == _machine():
            return _started(sign["pid"]) != sign["started"]
        count, since = self._seen.get(worker, (object(), 0.0))
        if count != (now_counts := sign and sign["count"]):
            self._seen[worker] = (now_counts, time.monotonic())
            return False
        return time.monotonic() - since > self.lease


def _machine() -> str | None:
    """Names the set of processes in which an id means the same process, for this user; None where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it does not run (any more)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # After the name, which may hold spaces: state, parent, ...; the start is the 22nd field of all.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None
