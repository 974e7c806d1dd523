"""The resolved configuration of a run as nested mappings: where its learning rate, axes and rule stand, and how to change them."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from lightning_mue.analysis.sweep.axes import require_rate
from lightning_mue.checks import listed, value_error
from lightning_mue.names import BATCHES, LENGTHS

Config: TypeAlias = dict[str, Any]
#: Axes that are sizes of the run, not keys of the configuration.
RUN_AXES = ("tokens", "batch_tokens")
_RATES = ("lr", "learning_rate")
_CALLBACK = "MuECallback"


def get(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key.

    Raises:
        KeyError: If there is none.
    """
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values at dotted keys, whose parents exist."""
    new = copy.deepcopy(config)
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        (get(new, parent) if parent else new)[name] = value
    return new


def arguments(config: Mapping[str, Any], part: str) -> str:
    """Key of the arguments of ``model`` or ``data``: they stand in ``init_args`` where the config names the class."""
    return f"{part}.init_args" if "class_path" in (config.get(part) or {}) else part


def find_rate(config: Config, given: str | None) -> str:
    """The key of the learning rate: as given, or the only one called ``lr`` or ``learning_rate`` in optimizer and model.

    Raises:
        ValueError: If it is not found, several are, or its value is not a positive number.
    """
    if given is not None:
        key = resolve_key(config, "--lr-key", given)
    else:
        paths = [path for part in ("optimizer", "model") for path in leaves(config.get(part), f"{part}.")]
        found = [path for path in paths if path.rpartition(".")[2] in _RATES]
        of_optimizers = [path for path in found if "optimizer" in path]
        found = of_optimizers or found
        if len(found) != 1:
            do = "Give --lr-key KEY, e.g. --lr-key model.init_args.optimizer.init_args.lr."
            if not found:
                do = (
                    "Name the optimizer and its lr in the config (an optimizer made by a default has no key), or g"
                    + do[1:]
                )
            expected = "one key called lr or learning_rate in `optimizer` or `model` of the config"
            raise value_error("learning rate", found=listed(found), expected=expected, do=do)
        key = found[0]
    require_rate(key, get(config, key))
    return key


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys at which a configuration holds something other than a mapping."""
    for name, inner in (value or {}).items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Mapping) and inner:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def resolve_key(config: Config, option: str, name: str) -> str:
    """The full key of a name: a dotted key of the config as it is, else an argument of the module or of the data.

    Raises:
        ValueError: If there is no such key, with near ones.
    """
    places = [name, *(f"{arguments(config, part)}.{name}" for part in ("model", "data"))]
    for key in places:
        try:
            get(config, key)
        except KeyError:
            continue
        return key
    known = list(leaves(config))
    here = arguments(config, "model")
    own = [key.removeprefix(f"{here}.") for key in known if key.startswith(f"{here}.")]
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, [*own, *known], n=1, cutoff=0.6) or [
        last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
    ]
    expected = f"an argument of the module ({listed(own, limit=30)}), or a dotted key of the config"
    raise value_error(option, found=repr(name), expected=expected, do=f"Did you mean {near[0]!r}?" if near else "")


def rule_of(config: Config) -> str:
    """The rule of the config's MuECallback; "none" if it has no such callback."""
    callback = next((c for c in _callbacks(config) if _is_mue(c)), None)
    return "none" if callback is None else str(callback["init_args"]["rule"])


def with_rule(config: Config, rule: str) -> Config:
    """A copy under another rule; ``none`` removes the MuECallback.

    Raises:
        ValueError: If the rule needs a base and the config has none.
    """
    new = copy.deepcopy(config)
    callbacks = _callbacks(new)
    ours = [c for c in callbacks if _is_mue(c)]
    if rule == "none":
        new["trainer"]["callbacks"] = [c for c in callbacks if not _is_mue(c)]
        return new
    if rule != "sp" and not any(c["init_args"].get("base") for c in ours):
        raise value_error(
            "--rules",
            found=f"{rule!r}, and no base in " + ("MuECallback" if ours else "the config, which has no MuECallback"),
            expected="the base, from which the rule scales",
            do="Add `base`, e.g. base: {width: 64}, to the init_args of lightning_mue.callbacks.MuECallback in the config's "
            "trainer.callbacks, or leave the rule out (`sp` and `none` need no base).",
        )
    if not ours:
        ours = [{"class_path": "lightning_mue.callbacks.MuECallback", "init_args": {}}]
        callbacks = [*callbacks, *ours]
    for callback in ours:
        callback["init_args"]["rule"] = rule
    new["trainer"]["callbacks"] = callbacks
    return new


def with_seed(config: Config, seed: int) -> Config:
    """A copy with the seed of a trial: for all draws, the order of the data, and the initial weights of MuECallback."""
    of_data = f"{arguments(config, 'data')}.seed"
    keys = ["seed_everything", *([of_data] if of_data in leaves(config.get("data"), "data.") else [])]
    new = changed(config, dict.fromkeys(keys, seed))
    for callback in _callbacks(new):
        if _is_mue(callback):
            callback["init_args"]["seed"] = seed
    return new


def run_changes(config: Config, axes: Mapping[str, Any]) -> dict[str, Any]:
    """What the axes ``tokens`` and ``batch_tokens`` change in a config: steps and batch size.

    With ``batch_tokens`` the run keeps its tokens, so the number of steps changes too.

    Raises:
        ValueError: If sizes of batch and sequence are not in the config, or do not divide.
    """
    rows_key, per_row = batch_key(config), _row_tokens(config)
    tokens, batch = axes.get("tokens"), axes.get("batch_tokens")
    rows = get(config, rows_key) if batch is None else batch / per_row
    if rows != int(rows) or rows < 1:
        expected = f"a multiple of {per_row:g}, the tokens of a step with {rows_key}=1"
        raise value_error("--axis batch_tokens", found=f"{batch:g}", expected=expected)
    if tokens is None:
        steps = get(config, "trainer.max_steps")
        if not isinstance(steps, int) or steps < 1:
            do = "Set it (and max_epochs: -1), so that every batch size sees the same tokens."
            raise value_error("trainer.max_steps", found=repr(steps), expected="the length of the run in steps", do=do)
        tokens = steps * get(config, rows_key) * per_row
    steps = round(tokens / (rows * per_row))
    if not tokens > 0 or steps < 1 or not math.isclose(steps * rows * per_row, tokens, rel_tol=0.02):
        expected = f"a positive multiple of the {rows * per_row:g} tokens of a step (within 2 %)"
        raise value_error("--axis tokens", found=f"{tokens:g}", expected=expected)
    return {rows_key: int(rows), "trainer.max_steps": steps, "trainer.max_epochs": -1}


def batch_key(config: Config) -> str:
    """Key of the batch size, in data or model.

    Raises:
        ValueError: If there is none.
    """
    return _size_key(config, BATCHES, "batch size")


def _row_tokens(config: Config) -> float:
    """Tokens in a step for each unit of the batch size."""
    trainer = config["trainer"]
    devices, nodes = trainer.get("devices") or 1, trainer.get("num_nodes") or 1
    # "auto" is one device: a trial has one accelerator, or the CPU.
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    copies = count * nodes * (trainer.get("accumulate_grad_batches") or 1)
    return get(config, _size_key(config, LENGTHS, "length of a sequence")) * copies


def _size_key(config: Config, names: tuple[str, ...], what: str) -> str:
    paths = [path for part in ("data", "model") for path in leaves(config.get(part), f"{part}.")]
    for name in names:
        for path in paths:
            if path.rpartition(".")[2] == name and type(get(config, path)) is int:
                return path
    do = "Vary trainer.max_steps and the batch size by their keys: --axis trainer.max_steps=100,400."
    expected = f"the {what} ({listed(names)}) among the arguments of data or model"
    raise value_error("--axis tokens, batch_tokens", found="none in the config", expected=expected, do=do)


def _callbacks(config: Config) -> list[Config]:
    """The config's callbacks, each with `class_path` and `init_args`; writing a list back is up to the caller."""
    given = config["trainer"].get("callbacks") or []
    listed_ = given if isinstance(given, list) else [given]
    for callback in listed_:
        callback["init_args"] = callback.get("init_args") or {}
    return listed_


def _is_mue(callback: Config) -> bool:
    return str(callback["class_path"]).rpartition(".")[2] == _CALLBACK
