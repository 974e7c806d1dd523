"""What a guard looks for, and what it does about each kind of finding: the checked arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from lightning_mue.checks import require_choice, require_integer, require_number, require_type, type_error, value_error

#: From the mildest to the strongest. All but "warn" keep a step from being taken that a finding came before.
ACTIONS = ("warn", "skip", "lower_lr", "rollback", "stop")
#: What is found after a step, so that there is nothing to skip.
_LATE = tuple(action for action in ACTIONS if action != "skip")
#: The series that every guard follows, as they are called in `drifts`, in the log and in `thresholds`' messages.
LOSS, GRADIENT = "loss", "gradient_norm"


class Bound(NamedTuple):
    """Range in which an indicator should stay.

    Attributes:
        pattern: Regular expression on whole tags of ``trainer.callback_metrics``.
        low, high: Ends of the range; infinite where open.
    """

    pattern: re.Pattern[str]
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


def check_action(kind: str, action: str | None, *, late: bool = False) -> None:
    """Raises for an action that there is not, or that nothing is left to do for.

    Raises:
        ValueError: Naming the actions that there are.
    """
    do = "What is found after a step cannot skip it: warn, lower_lr, rollback or stop." if late else ""
    require_choice(kind, action, (None, *(_LATE if late else ACTIONS)), do)


def bounds_of(thresholds: Mapping[str, Any] | None) -> list[Bound]:
    """The bounds of the argument `thresholds`.

    Raises:
        TypeError: It is no mapping, or a bound is neither a number nor a pair.
        ValueError: A pattern is no regular expression, or a range is empty or without end on both sides.
    """
    require_type("thresholds", thresholds, (Mapping, type(None)), "a mapping of tags to bounds, {tag: highest}")
    return [
        Bound(_pattern("thresholds", tag), *_range(f"thresholds[{tag!r}]", bound))
        for tag, bound in (thresholds or {}).items()
    ]


def _range(key: str, bound: Any) -> tuple[float, float]:
    do = "Give the highest good value, or a pair [lowest, highest] with null (None) for an open end."
    if isinstance(bound, Real) and not isinstance(bound, bool):
        bound = (None, bound)
    if not isinstance(bound, (list, tuple)) or len(bound) != 2:
        raise type_error(key, found=repr(bound), expected="a number or a pair of numbers", do=do)
    for end in bound:
        if end is not None:
            require_number(key, end, do=do)
    low, high = (
        (-math.inf if bound[0] is None else float(bound[0])),
        (math.inf if bound[1] is None else float(bound[1])),
    )
    if low >= high or (math.isinf(low) and math.isinf(high)):
        raise value_error(key, found=repr(bound), expected="a range with at least one end, the lower one first", do=do)
    return low, high


def patterns_of(drifts: Sequence[str]) -> list[re.Pattern[str]]:
    """The patterns of the argument `drifts`.

    Raises:
        TypeError: It is not a list of strings.
        ValueError: One is no regular expression.
    """
    require_type("drifts", drifts, (list, tuple), 'a list of tags, such as ["loss"]')
    return [_pattern("drifts", tag) for tag in drifts]


def _pattern(key: str, tag: Any) -> re.Pattern[str]:
    require_type(key, tag, str, "a tag or a regular expression on whole tags")
    try:
        return re.compile(tag)
    except re.error as error:
        raise value_error(key, found=f"{tag!r} ({error})", expected="a regular expression on whole tags") from None


class GuardSettings(NamedTuple):
    """The checked arguments of `StabilityGuard`, which documents them."""

    nonfinite: str
    spike: str | None
    threshold: str
    drift: str | None
    bounds: list[Bound]
    drifts: list[re.Pattern[str]]
    spike_score: float
    drift_sum: float
    window: int
    min_history: int
    max_skips_in_row: int
    lr_factor: float
    cool_down: int | None
    every_n_steps: int
    max_rollbacks: int

    @property
    def rolls_back(self) -> bool:
        """Whether anything leads to a rollback, so that snapshots are needed."""
        return "rollback" in (self.nonfinite, self.spike, self.drift) or (
            bool(self.bounds) and self.threshold == "rollback"
        )

    def check(self) -> None:
        """Raises for what is out of range.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range; the message names it.
        """
        require_choice("nonfinite", self.nonfinite, ACTIONS)
        check_action("spike", self.spike)
        require_choice(
            "threshold", self.threshold, _LATE, "An indicator is known after a step, which cannot be skipped."
        )
        check_action("drift", self.drift, late=True)
        require_number("spike_score", self.spike_score, above=1)
        require_number("drift_sum", self.drift_sum, above=1)
        require_integer("window", self.window, 8)
        require_integer("min_history", self.min_history, 4)
        if self.min_history > self.window:
            expected, do = f"at most window={self.window}", "A window that can never be full enough finds nothing."
            raise value_error("min_history", found=self.min_history, expected=expected, do=do)
        require_integer("max_skips_in_row", self.max_skips_in_row, 1)
        require_integer("every_n_steps", self.every_n_steps, 1, "It counts optimizer steps between two snapshots.")
        require_integer("max_rollbacks", self.max_rollbacks, 1, "To never roll back, choose another action.")
        require_number("lr_factor", self.lr_factor, above=0)
        if self.lr_factor >= 1:
            raise value_error("lr_factor", found=self.lr_factor, expected="a number above 0 and below 1")
        if self.cool_down is not None:
            require_integer(
                "cool_down", self.cool_down, 1, "It counts optimizer steps; None lowers for the rest of the run."
            )
