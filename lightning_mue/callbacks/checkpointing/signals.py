"""Requests to save that come as signals, and the ranks' agreement on them.

SIGTERM asks to save and end, SIGUSR1 to save and go on. A handler only counts; Lightning's own one for SIGTERM calls a collective
wherever the signal finds the program, which the other ranks may meet elsewhere, and ends with status 0.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_mue.namespaces import is_lightning

#: A count this high asks to end the run.
_END = 1 << 20


class Requests:
    """Counts signals, on all ranks together.

    The counts of a batch are reduced in the background, by CPU, while the next batch is computed: neither the GPU nor the program
    waits, and a request is known to all ranks one micro-batch after it came.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self._own = self._met = 0
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def listen_early(self, trainer: Trainer) -> None:
        """Takes SIGUSR1 before workers of data loaders are started, which would otherwise be killed by it.

        Not where Lightning will requeue the job at this signal: it would leave that out.
        """
        environment = trainer._accelerator_connector.cluster_environment
        requeues = is_lightning(environment, "SLURMEnvironment") and getattr(environment, "auto_requeue", False)
        if not requeues:
            self._take(signal.SIGUSR1, self._save)

    def listen(self, trainer: Trainer) -> None:
        """Takes both signals; what other handlers do at SIGUSR1 is done too, and at SIGTERM what those of the user do."""
        self._own, self._met, self._sent = 0, 0, None
        self._take(signal.SIGUSR1, self._save)
        self._take(signal.SIGTERM, self._end)
        # Lightning has put its own handler before the user's.
        self._before[signal.SIGTERM] = trainer._signal_connector._original_handlers.get(signal.SIGTERM)

    def stop(self) -> None:
        """Gives the signals back, and forgets what is under way."""
        for number, handler in self._before.items():
            if _can_listen() and handler is not None:
                signal.signal(number, handler)
        self._before, self._sent = {}, None

    def new(self) -> bool:
        """Whether a request came that was not met yet, on any rank. To be called once a batch, on all ranks."""
        self._agreed = self._own if self.group is None else self._reduced()
        return self._agreed > self._met

    def met(self) -> bool:
        """Notes that the requests were met; whether the run is to end."""
        self._met = self._agreed
        return self._agreed >= _END

    def _reduced(self) -> int:
        agreed = 0
        if self._sent is not None:
            self._sent[1].wait()
            agreed = int(self._sent[0])
        count = torch.tensor(self._own)
        self._sent = count, dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def _take(self, number: int, handler: Any) -> None:
        if _can_listen() and signal.getsignal(number) != handler:
            self._before[number] = signal.signal(number, handler)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._own += 1
        self._call_before(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._own = max(self._own, _END)
        self._call_before(number, frame)

    def _call_before(self, number: int, frame: FrameType | None) -> None:
        if callable(before := self._before.get(number)) and before is not signal.default_int_handler:
            before(number, frame)


def _can_listen() -> bool:
    return threading.current_thread() is threading.main_thread()
