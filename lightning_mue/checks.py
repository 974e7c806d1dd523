"""Checks of arguments. Every message has the form ``<key>: found X, expected Y. Do Z``, made by `mismatch`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def mismatch(key: str, *, found: object, expected: str, do: str = "") -> str:
    """The message of an error: what was found, what was expected instead, and what to do about it.

    Args:
        key: The argument, option or file, as the user wrote it.
        found: What was found there, as the user should read it.
        expected: What was expected instead, without a full stop.
        do: One or more sentences that say what to do.

    Example:
        >>> mismatch("top_k", found=4, expected="at most n_experts=2", do="Use fewer.")
        'top_k: found 4, expected at most n_experts=2. Use fewer.'
    """
    return f"{key}: found {found}, expected {expected}.{f' {do}' if do else ''}"


def value_error(key: str, *, found: object, expected: str, do: str = "") -> ValueError:
    """A ValueError with the message of `mismatch`."""
    return ValueError(mismatch(key, found=found, expected=expected, do=do))


def type_error(key: str, *, found: object, expected: str, do: str = "") -> TypeError:
    """A TypeError with the message of `mismatch`."""
    return TypeError(mismatch(key, found=found, expected=expected, do=do))


def listed(values: Collection[object], nothing: str = "none", limit: int = 12) -> str:
    """Values for a message, separated by commas, the first `limit` of them.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(str(value) for value in list(values)[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown or nothing


def brief(error: BaseException, limit: int = 200) -> str:
    """An error of another library for a message: its type and the beginning of its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"


def require_choice(key: str, value: object, choices: Collection[Any], do: str = "") -> None:
    """Raises unless a value is one of some choices.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise value_error(key, found=repr(value), expected=f"one of {names}", do=do)


def require_type(key: str, value: object, types: type | tuple[type, ...], expected: str, do: str = "") -> None:
    """Raises unless a value is of a type, `expected` in words ("a string"); a bool counts as bool only, not as a number.

    Raises:
        TypeError: It is of another type.
    """
    allowed = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise type_error(key, found=f"{value!r} of type {type(value).__name__}", expected=expected, do=do)


def require_integer(key: str, value: object, at_least: int, do: str = "") -> None:
    """Raises unless a value is an integer, NumPy's included, of at least `at_least`.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is smaller.
    """
    expected = f"an integer of at least {at_least}"
    require_type(key, value, Integral, expected, do)  # type: ignore[type-abstract]
    if value < at_least:  # type: ignore[operator]
        raise value_error(key, found=value, expected=expected, do=do)


def require_number(
    key: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    do: str = "",
) -> None:
    """Raises unless a value is a finite number in [`at_least`, `below`), and greater than `above`.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range, infinite or NaN.
    """
    if below < math.inf:
        expected = f"a number in [{at_least:g}, {below:g})"
    else:
        expected = "a finite number" + (f" of at least {at_least:g}" if at_least > -math.inf else "")
        expected += f" above {above:g}" if above > -math.inf else ""
    require_type(key, value, Real, expected, do)  # type: ignore[type-abstract]
    if not (math.isfinite(value) and at_least <= value < below and value > above):  # type: ignore[arg-type,operator]
        raise value_error(key, found=value, expected=expected, do=do)


def require_positive(**sizes: int) -> None:
    """`require_integer` of at least 1, for each keyword."""
    for key, size in sizes.items():
        require_integer(key, size, 1)


def require_size(**sizes: int) -> None:
    """`require_integer` of at least 0 (for none), for each keyword."""
    for key, size in sizes.items():
        require_integer(key, size, 0)


def require_non_negative(**values: float) -> None:
    """`require_number` of at least 0, for each keyword."""
    for key, value in values.items():
        require_number(key, value, at_least=0)


def require_finite(**values: float) -> None:
    """`require_number` of any sign, for each keyword."""
    for key, value in values.items():
        require_number(key, value)


def require_fraction(**values: float) -> None:
    """Raises unless every keyword is a number strictly between 0 and 1.

    Raises:
        TypeError: One is not a number.
        ValueError: One is 0 or less, 1 or more, or NaN.
    """
    for key, value in values.items():
        expected = "a number above 0 and below 1"
        require_type(key, value, Real, expected)  # type: ignore[type-abstract]
        if not 0 < value < 1:
            raise value_error(key, found=value, expected=expected)


def require_pattern(key: str, pattern: str) -> None:
    """Raises unless a text is a regular expression.

    Raises:
        ValueError: It is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise value_error(
            key, found=f"{pattern!r} ({error})", expected="a regular expression", do="Correct it."
        ) from error


def require_types(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises unless the arguments of a function, such as its ``locals()``, are of the types of its annotations.

    A bool is no number, and a list may stand for a tuple, as in YAML. What an iterable or a function gives is not looked at.

    Raises:
        TypeError: One is not.
    """
    for name, hint in _hints(function).items():
        if name in given and not _fits(given[name], hint):
            require_type(name, given[name], (), _in_words(hint))


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(function).items() if name != "return"}


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) for each in inner)  # which of them, other checks tell
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if hint is Any or not isinstance(origin, type):  # a type variable, say
        return True
    if issubclass(origin, Mapping):
        of = inner or (Any, Any)
        return isinstance(value, Mapping) and all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    if issubclass(origin, Sequence) and not issubclass(origin, str):
        kinds = {each for each in inner if each is not Ellipsis}
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(any(_fits(each, kind) for kind in kinds or {Any}) for each in value)
        )
    if origin in (Iterable, Collection):
        return isinstance(value, origin) and not isinstance(value, str)
    return callable(value) if origin is Callable else isinstance(value, origin)  # type: ignore[comparison-overlap]


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "None"}


def _in_words(hint: Any) -> str:
    """A type as a user knows it: ``dict[str, str] | None`` is "a mapping of strings to strings or None"."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(each) for each in inner))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is Callable or hint in _WORDS:
        return "a function" if origin is Callable else _WORDS[hint]
    plural = {int: "integers", float: "numbers", str: "strings"}
    of = [plural.get(each, "values") for each in inner]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {of[0]} to {of[1]}" if of else "a mapping"
    if isinstance(origin, type) and issubclass(origin, (Sequence, Collection)):
        return f"a list of {of[0]}" if of else "a list"
    return f"a {getattr(origin, '__name__', origin)}"
