"""Checks of constructor arguments whose messages name the argument, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


def require_positive(**sizes: int) -> None:
    """Raise unless every value is an integer of at least 1.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is below 1.
    """
    _require_integers(1, sizes)


def require_size(**sizes: int) -> None:
    """As `require_positive`, but 0 (for none) is allowed."""
    _require_integers(0, sizes)


def require_non_negative(**values: float) -> None:
    """Raise unless every value is a finite number of at least 0.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is negative, infinite or NaN.
    """
    for name, value in values.items():
        _require_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be a finite number of at least 0. Give such a number.")


def require_finite(**values: float) -> None:
    """Raise unless every value is a finite number, of any sign.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is infinite or NaN.
    """
    for name, value in values.items():
        _require_number(name, value)
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but it must be a finite number. Give such a number.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}, which is not known. Choose one of {listed}.")


def _require_integers(least: int, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(
                f"{name} must be an integer of at least {least}, got {size!r} of type {type(size).__name__}."
            )
        if size < least:
            raise ValueError(f"{name} is {size}, but it must be at least {least}. Give such an integer.")


def _require_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
