"""Hands the metrics of a run from the callbacks that measure them to those that judge and show them.

Monitors write straight to the loggers, at steps of their own, so nobody could follow them through the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

#: Takes the step and the metrics, tag -> value.
Listener = Callable[[int, Mapping[str, float]], None]

_listeners: WeakKeyDictionary[Trainer, dict[int, Listener]] = WeakKeyDictionary()


def listen(trainer: Trainer, owner: object, listener: Listener) -> None:
    """From now on calls a listener with all metrics of a trainer's monitors; an owner has one listener."""
    _listeners.setdefault(trainer, {})[id(owner)] = listener


def forget(trainer: Trainer, owner: object) -> None:
    """Stops calling an owner's listener."""
    _listeners.get(trainer, {}).pop(id(owner), None)


def tell(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Gives metrics of an optimizer step (zero-based, as loggers show it) to all listeners."""
    for listener in list(_listeners.get(trainer, {}).values()):
        listener(step, metrics)
