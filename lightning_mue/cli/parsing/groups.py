"""Callbacks by name: ``--mue.rule mup`` sets an argument of the config's MuECallback, or adds one if there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from lightning_mue import callbacks
from lightning_mue.checks import value_error
from lightning_mue.class_paths import imported
from lightning_mue.cli.parsing.options import arguments_of, nearest

#: Name on the command line, and in a config -> callback.
GROUPS = {
    "mue": callbacks.MuECallback,
    "health": callbacks.HealthMonitor,
    "guard": callbacks.StabilityGuard,
    "transfer": callbacks.TransferMonitor,
    "logits": callbacks.LogitsZMonitor,
    "outliers": callbacks.ActivationOutlierMonitor,
    "router": callbacks.RouterMonitor,
    "updates": callbacks.UpdateMonitor,
    "spectral": callbacks.SpectralMonitor,
    "qk_clip": callbacks.QKClip,
    "throughput": callbacks.ThroughputMonitor,
}


def add_groups(parser: Any) -> None:
    """Adds the groups to a parser. None of them is there unless something is given."""
    for name, cls in GROUPS.items():
        path = f"lightning_mue.callbacks.{cls.__name__}"
        does = (
            f"Arguments of {cls.__name__}, as --{name}.KEY VALUE: overrides the one of trainer.callbacks, or adds one. "
        )
        parser.add_argument(f"--{name}", type=dict[str, Any] | None, help=f"{does}See --trainer.callbacks.help {path}.")


def with_groups(config: Any) -> list[Any] | None:
    """The callbacks of a parsed configuration with those of the groups in their place; None if no group is given.

    The groups are taken out of the configuration, so that a saved one holds each callback once.

    Raises:
        ValueError: For an argument that the callback does not have, or where the list has several of its type.
    """
    given = {name: dict(config[name]) for name in GROUPS if config.get(name) is not None}
    if not given:
        return None
    for name in given:
        config[name] = None
    return _merged(given, config.get("trainer.callbacks"))


def fold_groups(config: dict[str, Any]) -> dict[str, Any]:
    """`with_groups` in a resolved configuration of plain types, as ``--print_config`` shows it."""
    given = {name: config.pop(name) for name in GROUPS if config.get(name) is not None}
    if given:
        config["trainer"]["callbacks"] = _merged(given, config["trainer"].get("callbacks"))
    return config


def _merged(given: Mapping[str, Mapping[str, Any]], callbacks: Any) -> list[Any]:
    listed = list(callbacks) if isinstance(callbacks, list) else [callbacks] if callbacks else []
    for name, arguments in given.items():
        _merge(name, arguments, listed)
    return listed


def _merge(name: str, arguments: Mapping[str, Any], listed: list[Any]) -> None:
    cls = GROUPS[name]
    known = arguments_of(f"lightning_mue.callbacks.{cls.__name__}")
    for key in arguments:
        if key not in known:
            expected = f"an argument of {cls.__name__}: {', '.join(known)}"
            raise value_error(f"{name}.{key}", found=f"{key!r}", expected=expected, do=nearest(key, known))
    own = [i for i, spec in enumerate(listed) if _is(spec, cls)]
    if len(own) > 1:
        do = "Edit the one that you mean in the config."
        raise value_error(
            name, found=f"{len(own)} callbacks {cls.__name__} in trainer.callbacks", expected="one", do=do
        )
    if not own:
        listed.append(Namespace(class_path=f"lightning_mue.callbacks.{cls.__name__}", init_args=Namespace()))
        own = [len(listed) - 1]
    spec = listed[own[0]]
    spec = dict(spec.items(branches=True, nested=False)) if isinstance(spec, Namespace) else dict(spec)
    before = spec.get("init_args") or {}
    before = dict(before.items(branches=True, nested=False)) if isinstance(before, Namespace) else dict(before)
    listed[own[0]] = {**spec, "init_args": {**before, **arguments}}


def _is(spec: Any, cls: type) -> bool:
    found = imported(spec["class_path"]) if isinstance(spec, (Namespace, Mapping)) and "class_path" in spec else None
    return isinstance(found, type) and issubclass(found, cls)
