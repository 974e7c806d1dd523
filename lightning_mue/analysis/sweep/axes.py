"""What a sweep varies, read from the command line: axes, lists of values, and ranges to search in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import yaml

from lightning_mue.analysis.trials import Value
from lightning_mue.checks import require_choice, value_error
from lightning_mue.parameterizations import RULES


@dataclass(frozen=True)
class Axis:
    """Sizes at which a sweep runs: one config key, or several that vary together.

    Attributes:
        names: The keys; the first one names the axis.
        points: For each size, the value of each key.
    """

    names: tuple[str, ...]
    points: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Range:
    """An interval in which a value is searched: uniform in its logarithm, uniform, or among integers."""

    scale: Literal["log", "lin", "int"]
    low: float
    high: float


def parse_axis(parts: Sequence[str]) -> Axis:
    """Reads one ``--axis``: ``["width=64,128", "n_heads=2,4"]``, whose parts vary together.

    Raises:
        ValueError: For another form, parts of unequal length, or a size given twice.
    """
    values = [_split("--axis", part) for part in parts]
    names = tuple(name for name, _ in values)
    if len(set(names)) < len(names):
        raise value_error("--axis", found=f"{' '.join(parts)}, a name twice", expected="each name once")
    lengths = {name: len(given) for name, given in values}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        do = "Give each axis an --axis of its own if they are to be crossed."
        raise value_error("--axis", found=found, expected="equally many values for parts that vary together", do=do)
    _refuse_repeats(f"--axis {names[0]}", values[0][1])
    return Axis(names, tuple(zip(*(given for _, given in values), strict=True)))


def parse_values(option: str, text: str) -> tuple[str, tuple[Value, ...]]:
    """Reads ``key=value,value,...``.

    Raises:
        ValueError: For another form, or a value given twice.

    Example:
        >>> parse_values("--set", "model.gate=sqrt,linear")
        ('model.gate', ('sqrt', 'linear'))
    """
    name, values = _split(option, text)
    _refuse_repeats(f"{option} {name}", values)
    return name, values


def parse_rules(text: str) -> tuple[str, ...]:
    """Reads ``--rules sp,mup,none``; none stands for no MuECallback.

    Raises:
        ValueError: For an unknown rule, or one given twice.
    """
    rules = tuple(rule.strip() for rule in text.split(","))
    for rule in rules:
        require_choice("--rules", rule, (*RULES, "none"))
    _refuse_repeats("--rules", rules)
    return rules


def parse_range(option: str, text: str) -> tuple[str, Range]:
    """Reads ``key=log:1e-3:1e-1`` (or ``lin:``, ``int:``).

    Raises:
        ValueError: For another form or an empty interval.
    """
    name, _, given = text.partition("=")
    return name, _range(f"{option} {name}", given)


def parse_rates(text: str) -> tuple[float, ...] | Range:
    """Reads ``--lr``: rates, in ascending order, or a range to search in.

    Raises:
        ValueError: For rates that are not positive and finite, one given twice, or an empty interval.
    """
    if ":" in text:
        return _range("--lr", text)
    rates = _values("--lr", text)
    for rate in rates:
        require_rate("--lr", rate)
    _refuse_repeats("--lr", rates)
    return tuple(sorted(float(rate) for rate in rates))  # type: ignore[arg-type]


def require_rate(key: str, rate: object) -> None:
    """Raises unless a learning rate is a positive, finite number.

    Raises:
        ValueError: It is not.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise value_error(key, found=repr(rate), expected="a positive, finite learning rate")


def _range(key: str, text: str) -> Range:
    scale, *ends = text.split(":")
    form = "log:LOW:HIGH, lin:LOW:HIGH or int:LOW:HIGH"
    require_choice(key, scale, ("log", "lin", "int"), do=f"Give {form}, e.g. log:1e-3:1e-1.")
    kind = int if scale == "int" else float
    try:
        low, high = (kind(end) for end in ends)
    except ValueError:
        raise value_error(key, found=repr(text), expected=f"{form}, with two numbers") from None
    if not -math.inf < low < high < math.inf or (scale == "log" and low <= 0):
        expected = "LOW below HIGH, both finite" + (", LOW above 0" if scale == "log" else "")
        raise value_error(key, found=repr(text), expected=expected)
    return Range(scale, low, high)  # type: ignore[arg-type]


def _split(option: str, text: str) -> tuple[str, tuple[Value, ...]]:
    """Reads ``key=value,value,...``, in which a value may be repeated."""
    name, equals, given = text.partition("=")
    if not (name and equals and given):
        raise value_error(
            option, found=repr(text), expected="key=value,value,...", do=f"For example {option} width=64,128."
        )
    return name, _values(f"{option} {name}", given)


def _values(key: str, text: str) -> tuple[Value, ...]:
    return tuple(_value(key, part) for part in text.split(","))


def _refuse_repeats(key: str, values: Sequence[Value]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise value_error(key, found=f"{value!r} twice", expected="each value once")


def _value(key: str, text: str) -> Value:
    """One value, as YAML has it; also numbers that YAML takes for text, such as 1e-3."""
    try:
        value = yaml.safe_load(text)
        value = float(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        value = {}  # refused below
    except ValueError:
        pass  # a text
    if not text or not (value is None or isinstance(value, (str, bool, int, float))):
        raise value_error(key, found=repr(text), expected="a number, a text, true, false or null")
    return value
