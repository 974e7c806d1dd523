"""Overrides of hyperparameters at any depth: dotted keys and partial mappings, in all the forms in which configurations come."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import inspect
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from lightning_mue.checks import listed, value_error


def override(
    values: Mapping[str, Any], overrides: Mapping[str, Any], owner: str, *, path: str = "base"
) -> dict[str, Any]:
    """Copies of values with others in their place; what the overrides do not name stays.

    Args:
        values: Name of an argument -> value.
        overrides: Name, or dotted path (``config.n_embd``, ``net.init_args.width``) -> value. A mapping overrides in what it
            names; between a class and its ``init_args`` the latter may be left out.
        owner: What has the values, for messages.
        path: Where the overrides stand, for messages.

    Returns:
        New values. None of the old ones is changed.

    Raises:
        ValueError: For a path at which there is nothing, with near names.
    """
    result = dict(values)
    for key, new in overrides.items():
        name, dot, rest = (key, "", "") if key in values else key.partition(".")
        where = f"{path}.{name}"
        if dot and name not in values:
            raise unknown_override(f"{path}.{key}", owner, dotted(values))
        if dot or (isinstance(new, Mapping) and _names(result.get(name))):
            inner = {rest: new} if dot else new
            result[name] = _within(result[name], inner, where)
        else:
            result[name] = new
    return result


def unknown_override(path: str, owner: str, accepted: Iterable[str]) -> ValueError:
    """The error for an override at a path, relative to `base`, at which ``owner`` takes none."""
    key, accepted = path.removeprefix("base."), list(dict.fromkeys(accepted))
    last = {name.rpartition(".")[2]: name for name in reversed(accepted)}
    close = difflib.get_close_matches(key, accepted, n=1, cutoff=0.75) or [
        last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.75)
    ]
    hint = f"Did you mean {close[0]!r}?" if close else ""
    expected = f"one of its arguments {listed(accepted, limit=40)}"
    return value_error(path, found=f"{key!r}, which {owner} does not take", expected=expected, do=hint)


def dotted(values: Mapping[str, Any], prefix: str = "", depth: int = 4) -> list[str]:
    """The paths at which there is something to override, from the outside in."""
    here = [f"{prefix}{name}" for name in values]
    inside = [
        found
        for name, value in values.items()
        if depth > 1 and (known := _names(value))
        for found in dotted({key: _get(value, key) for key in known}, f"{prefix}{name}.", depth - 1)
    ]
    return [*here, *inside]


def is_configuration(value: object) -> bool:
    """Whether a value holds named values that can be overridden one by one."""
    return bool(_names(value))


def leaves(values: Any, overrides: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What overrides change, leaf by leaf: (dotted path, value now, value in its place).

    ``values`` is a mapping or a configuration, ``overrides`` as for `override` or a configuration of the same class. Paths at which
    there is nothing now are left out.
    """
    given = overrides if isinstance(overrides, Mapping) else {name: _get(overrides, name) for name in _names(overrides)}
    for key, new in given.items():
        name, dot, rest = (key, "", "") if _at(values, key) is not None else key.partition(".")
        own = _at(values, name)
        nested = is_configuration(own) and (
            isinstance(new, Mapping) or (is_configuration(new) and type(new) is type(own))
        )
        if dot or nested:
            yield from leaves(own, {rest: new} if dot else new, f"{prefix}{name}.")
        elif own is not None:
            yield f"{prefix}{name}", own, new


def _at(values: Any, name: str) -> Any:
    """The value of a name, or None; in a class as LightningCLI writes it, also that of an argument."""
    if not isinstance(values, Mapping):
        return getattr(values, name, None)
    arguments = values.get("init_args") if "class_path" in values else None
    return values.get(name, arguments.get(name) if isinstance(arguments, Mapping) else None)


def own_copy(value: Any) -> Any:
    """A copy of a configuration, so that a constructor that changes it does not change the target's."""
    if not is_configuration(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # it holds something that has no copy, a lock say
        return copy.copy(value)


def _within(value: Any, inner: Mapping[str, Any], path: str) -> Any:
    """A copy of a configuration with overrides inside it."""
    known = _names(value)
    if isinstance(value, Mapping) and not known:
        return {**value, **inner}  # an empty one takes anything
    if not known:
        held = "a module, which has been built" if isinstance(value, nn.Module) else f"{value!r}"
        raise value_error(
            path,
            found=f"an override inside it, while the target has {held}",
            expected="a dict, Namespace, dataclass or configuration object, of which a part can be replaced",
            do=f"Give {path.removeprefix('base.')} as a whole, or give `base` as a module or a factory.",
        )
    if isinstance(value, Mapping) and "class_path" in value:
        return _within_class(value, inner, path)
    if aliases := getattr(type(value), "attribute_map", None):
        inner = {aliases.get(key, key): new for key, new in inner.items()}
    here = {name: _get(value, name) for name in known}
    for key in inner:
        if key not in here and key.partition(".")[0] not in here:
            known_here = dotted(here, f"{path}.".removeprefix("base."))
            raise unknown_override(f"{path}.{key}", type(value).__name__, known_here)
    changed = override(here, inner, type(value).__name__, path=path)
    changes = {name: new for name, new in changed.items() if name not in here or new is not here[name]}
    try:
        return _replaced(value, changes)
    except Exception as error:  # a configuration may check its values, and raise what it likes
        found = f"{dict(inner)}, which {type(value).__name__} refuses ({type(error).__name__}: {error})"
        raise value_error(path, found=found, expected=f"values that {type(value).__name__} takes") from error


def _within_class(value: Mapping[str, Any], inner: Mapping[str, Any], path: str) -> Any:
    """Overrides in a class as LightningCLI writes it: ``class_path`` and ``init_args``; another class replaces it."""
    if inner.get("class_path", value["class_path"]) != value["class_path"]:
        return dict(inner)
    arguments = dict(value.get("init_args") or {})
    own = {*value, "init_args", "dict_kwargs", "class_path"}
    given = {key: new for key, new in inner.items() if key.partition(".")[0] not in own}  # init_args left out
    for key, new in inner.items():
        if key == "init_args" and isinstance(new, Mapping):
            given.update(new)
        elif key.startswith("init_args."):
            given[key.removeprefix("init_args.")] = new
    taken = dict.fromkeys([*arguments, *_parameters(value["class_path"])])
    where = f"{path}.init_args"
    for key in given:
        if key not in taken and key.partition(".")[0] not in taken:
            names = [*taken, *dotted(arguments)]
            prefix = where.removeprefix("base.")
            raise unknown_override(f"{where}.{key}", str(value["class_path"]), [f"{prefix}.{name}" for name in names])
    return {**value, "init_args": override(arguments, given, str(value["class_path"]), path=where)}


def _parameters(class_path: str) -> list[str]:
    try:
        module, _, name = class_path.rpartition(".")
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _names(value: object) -> list[str]:
    """The names that a configuration holds; none if a value is no configuration."""
    if isinstance(value, Mapping):
        return [key for key in value if isinstance(key, str)]
    if isinstance(value, (type, nn.Module)):
        return []
    if dataclasses.is_dataclass(value):
        return [one.name for one in dataclasses.fields(value) if one.init]
    if isinstance(value, tuple):
        return list(getattr(value, "_fields", ()))
    # transformers' configurations have to_dict; pydantic's model_dump.
    plain = isinstance(value, (Namespace, SimpleNamespace)) or type(value).__module__.startswith("jsonargparse")
    if plain or any(callable(getattr(value, name, None)) for name in ("to_dict", "model_dump")):
        return [key for key in vars(value) if not key.startswith("_")]
    return []


def _get(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, Mapping) else getattr(value, name)


def _replaced(value: Any, changes: dict[str, Any]) -> Any:
    """A copy with other values; what the class derives from those (a head's width) is derived again."""
    if isinstance(value, MutableMapping):
        copied = own_copy(value)
        for key, new in changes.items():
            copied[key] = new
        return copied
    if isinstance(value, Mapping):
        return {**value, **changes}
    if isinstance(value, tuple):
        return value._replace(**changes)  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(value) or callable(getattr(value, "to_diff_dict", None)):
        made = _made_again(value, changes)
        if made is not None:
            return made
    copied = own_copy(value)
    for key, new in changes.items():
        object.__setattr__(copied, key, new) if dataclasses.is_dataclass(value) else setattr(copied, key, new)
    return copied


def _made_again(value: Any, changes: Mapping[str, Any]) -> Any:
    """The class called with what it was given before, as far as that can be told, and with the changes; None if it cannot.

    An argument without which the same would come out has its default, or is derived from others.
    """
    cls = type(value)
    is_data = not callable(getattr(value, "to_diff_dict", None))
    given = {name: getattr(value, name) for name in _names(value)} if is_data else dict(value.to_diff_dict())

    def plain(one: Any) -> Any:
        return vars(one) if is_data else one.to_dict()

    try:
        if plain(cls(**given)) != plain(value):
            return None
        for name in [name for name in given if name not in changes]:
            fewer = {key: one for key, one in given.items() if key != name}
            try:
                if plain(cls(**fewer)) == plain(value):
                    given = fewer
            except Exception:  # an argument that the class needs
                continue
        return cls(**{**given, **changes})
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
