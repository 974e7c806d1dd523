"""The base, the small, tuned reference from which a plan scales: builds, describes, saves and loads it.

A saved base needs no code: the class that it was made from need not exist any more.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_mue.checks import brief, listed, require_types, value_error
from lightning_mue.class_paths import INSTANTIATORS, check_arguments
from lightning_mue.files import whole_file
from lightning_mue.parameterizations.reading.initial.initializer import Init
from lightning_mue.parameterizations.reading.initial.measuring import measure_build, measure_ready
from lightning_mue.parameterizations.reading.overrides import (
    dotted,
    is_configuration,
    leaves,
    override,
    own_copy,
    unknown_override,
)
from lightning_mue.parameterizations.reading.parameters import role_patterns
from lightning_mue.parameterizations.reading.record import VERSION, ModelRecord, describe
from lightning_mue.parameterizations.reading.sites import float_attributes

#: Keyword overrides of the module's own hyperparameters, a module, a factory of one, or the file of a saved base.
Base = Mapping[str, Any] | nn.Module | Callable[[], nn.Module] | str | Path

_EXPECTED = "overrides such as {width: 64}, a module or a function that makes one"

#: Overrides that describe the base's run, not its module.
RUN_KEYS = ("tokens", "batch_tokens")


@contextmanager
def _fixed_rng(seed: int = 0) -> Any:
    """Seeds the CPU generator for the duration and restores the global generators: building a base changes no run."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would reseed the GPUs too, which are not restored.
        torch.default_generator.manual_seed(seed)
        yield


def build_base(model: nn.Module, base: Base, *, device: str | None = None, seed: int = 0) -> nn.Module:
    """Builds the base.

    Args:
        model: The target module; overrides are applied to its ``hparams``.
        base: Keyword overrides, a module (used as it is, so it must be freshly initialized) or a factory; not a file, which
            holds no module.
        device: ``"meta"`` for shapes only; ``None`` for real values on the CPU.
        seed: Seed of its random values.

    Returns:
        The base module; its random values depend on nothing outside it.

    Raises:
        ValueError: For an override that the module's constructor does not take, or a module that cannot be rebuilt.
    """
    if isinstance(base, nn.Module):
        return base
    if isinstance(base, (str, Path)):
        found = f"{str(base)!r}, the file of a saved base, which holds no module to run"
        raise value_error("base", found=found, expected=_EXPECTED)
    with _fixed_rng(seed), torch.device(device or "cpu"):
        if isinstance(base, Mapping):
            made = _rebuild(model, {key: value for key, value in base.items() if key not in RUN_KEYS})
        elif callable(base):
            made = base()
        else:
            raise value_error("base", found=repr(base), expected=f"{_EXPECTED}, or the path of a saved base")
        if (mesh := getattr(model, "_device_mesh", None)) is not None:
            made._device_mesh = mesh  # where configure_model shards, it asks the module for the mesh
        configure_model: Any = getattr(made, "configure_model", None)
        if callable(configure_model):
            configure_model()  # a LightningModule may build its layers here
    if not isinstance(made, nn.Module):
        found = f"a function that returned {type(made).__name__}"
        raise value_error("base", found=found, expected="a function that returns a torch.nn.Module")
    return made


def _rebuild(model: nn.Module, overrides: Mapping[str, Any]) -> nn.Module:
    """Makes another instance of a module's class, from its hyperparameters and overrides of them."""
    cls = _own_class(model)
    signature = inspect.signature(cls).parameters
    hparams, whole, instantiator = _hyperparameters(model, signature)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [*(name for name, p in signature.items() if p.kind not in variadic), *hparams]
    placed = {_placed(key, names, hparams, whole): value for key, value in overrides.items()}
    for key in placed:
        # Of a constructor with **kwargs, what looks like a slip.
        slip = not open_ended or difflib.get_close_matches(key, names, n=1, cutoff=0.75) or "." in key
        if key not in names and key.partition(".")[0] not in hparams and slip:
            raise unknown_override(f"base.{key}", cls.__name__, [*names, *dotted(hparams)])
    needed = [name for name, p in signature.items() if p.default is p.empty and p.kind not in variadic]
    if missing := [name for name in needed if name not in hparams and name not in overrides]:
        raise value_error(
            "base",
            found=f"overrides, but {cls.__name__} cannot be rebuilt: its argument(s) {', '.join(missing)} are not known",
            expected="a module that keeps its hyperparameters",
            do="Call self.save_hyperparameters() in its __init__, or give `base` as a module or a factory.",
        )
    arguments = override({key: own_copy(value) for key, value in hparams.items()}, placed, cls.__name__)
    arguments.pop("_class_path", None)
    if not open_ended and instantiator is None:
        arguments = {key: value for key, value in arguments.items() if key in signature}
    return _construct(cls, arguments, instantiator, overrides, names)


def _own_class(model: nn.Module) -> type[nn.Module]:
    """A module's class; of one that fully_shard was called on, which gave it a subclass, the class before."""
    return next(cls for cls in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in cls.__mro__))


def changes(model: nn.Module, overrides: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What overrides of a module's hyperparameters change, leaf by leaf: (dotted path, the module's value, the other one)."""
    signature = inspect.signature(_own_class(model)).parameters
    hparams, whole, _ = _hyperparameters(model, signature)
    own = {**{name: p.default for name, p in signature.items() if p.default is not p.empty}, **hparams}
    names = list(own)
    return list(leaves(own, {_placed(key, names, hparams, whole): value for key, value in overrides.items()}))


def _hyperparameters(model: nn.Module, signature: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, str | None]:
    """(hyperparameters, the one argument that holds them all if there is one, what makes the module from them)."""
    hparams = dict(getattr(model, "hparams", {}))
    instantiator = hparams.pop("_instantiator", None)
    whole = getattr(model, "_hparams_name", None)
    if whole in signature and whole not in hparams and hparams:  # save_hyperparameters(config)
        hparams = {whole: model.hparams}
    for name in signature:  # a module that keeps its configuration: self.config = config
        if name not in hparams and is_configuration(kept := getattr(model, name, None)):
            hparams[name] = kept
    configurations = [name for name, value in hparams.items() if is_configuration(value)]
    return hparams, configurations[0] if len(configurations) == 1 else None, instantiator


def _placed(key: str, names: list[str], hparams: Mapping[str, Any], whole: str | None) -> str:
    """A key as a path; one that only the module's single configuration has, in that."""
    if key in names or key.partition(".")[0] in names or whole is None:
        return key
    inside = f"{whole}.{key}"
    aliases = getattr(type(hparams[whole]), "attribute_map", {})
    return inside if inside in dotted(hparams) or key in aliases else key


def _construct(
    cls: type[nn.Module],
    arguments: dict[str, Any],
    instantiator: str | None,
    overrides: Mapping[str, Any],
    names: list[str],
) -> nn.Module:
    """The module; what goes wrong is told as a fault of the overrides."""
    if instantiator is not None:  # it calls what the arguments name
        make = _instantiator(instantiator)
        check_arguments(cls, arguments, "base")
    try:
        if instantiator is not None:
            # LightningCLI stores the parsed configuration (nested classes as dicts) and the function that reads it.
            made = make(cls, own_copy(arguments))
            if callable(keep := getattr(made, "_set_hparams", None)):  # so that it can be rebuilt in its turn
                keep({**arguments, "_instantiator": instantiator})
            return made
        return cls(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError, ArgumentError, SystemExit) as error:
        # A constructor that forwards **kwargs says only now what it does not take.
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected and unexpected[1] in overrides:
            raise unknown_override(f"base.{unexpected[1]}", cls.__name__, names) from error
        reason: BaseException = error
        while instantiator is not None and (deeper := reason.__cause__ or reason.__context__) is not None:
            reason = deeper  # the configuration parser wraps the module's message in a long text of its own
        found = f"{dict(overrides)}, with which {cls.__name__} cannot be built: {type(reason).__name__}: {reason}"
        raise value_error("base", found=found, expected=f"overrides that {cls.__name__} takes") from error


def _instantiator(path: str) -> Any:
    """The function that makes a module from saved hyperparameters; which comes from a file, so only known ones are called."""
    if path not in INSTANTIATORS:
        do = "Give `base` as a module or a factory."
        raise value_error("_instantiator", found=repr(path), expected=f"one of {listed(INSTANTIATORS)}", do=do)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def describe_base(
    model: nn.Module,
    base: Base,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    *,
    measure: bool,
) -> ModelRecord:
    """Makes the base of a target, or reads its file, and describes it; for the arguments see :func:`lightning_mue.plan`.

    With ``measure`` real weights are made and how they were drawn is found; otherwise there are shapes only, on ``meta``.
    Patterns that name nothing in the base are left out.
    """
    if isinstance(base, (str, Path)):
        record, patterns = load_base(base), role_patterns(roles)
        named = [
            replace(info, role=next((role for pattern, role in patterns if pattern.search(info.name)), info.role))
            for info in record.parameters
        ]
        return replace(record, parameters=tuple(named))
    run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}
    inits: Mapping[str, Init] = {}
    if isinstance(base, nn.Module):
        made = base
        # A second one of its class, for what one draw does not show.
        twin = (lambda seed: build_base(base, {}, seed=seed)) if getattr(base, "hparams", None) else None
        inits = measure_ready(base, twin) if measure else inits
    elif measure:
        made, inits = measure_build(lambda seed: build_base(model, base, seed=seed))
    else:
        made = _shapes(model, base)
    paths = float_attributes(made)
    some_multipliers = {k: p for k, p in (multipliers or {}).items() if any(re.search(p, path) for path in paths)}
    return replace(describe(made, roles, some_multipliers), run=run, inits=inits)


def _shapes(model: nn.Module, base: Base) -> nn.Module:
    """The base on ``meta``; with real values where its constructor reads values, e.g. of a checkpoint."""
    try:
        return build_base(model, base, device="meta")
    except RuntimeError:  # NotImplementedError is one; if the fault is another, the second try tells it
        return build_base(model, base)


def save_base(
    model: nn.Module,
    path: str | Path,
    *,
    base: Base | None = None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
) -> None:
    """Writes what plans need of a base to a YAML file, which can be used in its place: ``base="base.yaml"``.

    Args:
        model: The base itself, freshly initialized; or a target whose hyperparameters ``base`` overrides.
        path: The file.
        base: As for :func:`lightning_mue.plan`; None: ``model`` is the base.
        roles: Regular expression on names -> role, for modules that declare none.
        multipliers: Kind -> regular expression on dotted attribute paths.
    """
    require_types(save_base, locals())
    if Path(path).is_dir():
        raise value_error("path", found=f"the folder {str(path)!r}", expected="a file", do=f"Give {path}/base.yaml.")
    if base is None:
        base = {} if any(p.is_meta for p in model.parameters()) else model
    record = describe_base(model, base, roles, multipliers, measure=True)
    with whole_file(path) as part:
        part.write_text(yaml.safe_dump(record.to_dict(), sort_keys=False), encoding="utf-8")


def load_base(path: str | Path) -> ModelRecord:
    """Reads a file that :func:`save_base` wrote.

    Raises:
        ValueError: If there is no such file, or it is something else.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, no date, no number
        raise _not_a_base(path, f"cannot be read ({brief(error)})") from error
    if not isinstance(plain, dict) or plain.get("lightning_mue_base") != VERSION:
        raise _not_a_base(path, "is something else")
    try:
        return ModelRecord.from_dict(plain)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _not_a_base(path, f"is damaged ({brief(error)})") from error


def _not_a_base(path: str | Path, why: str) -> ValueError:
    return value_error(
        "base",
        found=f"the file {str(path)!r}, which {why}",
        expected=f"a base of version {VERSION}",
        do="Write it with `lightning-mue explain --save-base FILE`, or give the base as overrides, e.g. base: {width: 64}.",
    )
