"""Checks of constructor arguments whose messages name the argument, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence


def require_positive(**sizes: int) -> None:
    """Raise unless every value is an integer of at least 1.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is below 1.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer of at least 1, got {size!r} of type {type(size).__name__}.")
        if size < 1:
            raise ValueError(f"{name} is {size}, but it must be at least 1. Give a positive integer.")


def require_non_negative(**values: float) -> None:
    """Raise unless every value is a finite number of at least 0.

    Raises:
        ValueError: A value is negative, infinite or not a number.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, but it must be a finite number of at least 0. Give such a number.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}, which is not known. Choose one of {listed}.")
