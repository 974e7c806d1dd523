"""Makes the base model: the small, tuned reference from which a plan scales."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Keyword overrides of the module's own hyperparameters, a module, a factory of one, or the file of a saved base.
Base = Mapping[str, Any] | nn.Module | Callable[[], nn.Module] | str | Path

#: Overrides that describe the base's run, not its module.
RUN_KEYS = ("tokens", "batch_tokens")


@contextmanager
def _fixed_rng(seed: int = 0) -> Any:
    """Runs on a fixed CPU seed and gives the global generators back as they were: making a base changes no run."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would reseed the GPUs too, which are not given back.
        torch.default_generator.manual_seed(seed)
        yield


def build_base(model: nn.Module, base: Base, *, device: str | None = None) -> nn.Module:
    """Makes the base instance.

    Args:
        model: The target module; overrides are applied to its ``hparams``.
        base: Keyword overrides, a module (used as it is, so it must be freshly initialized) or a factory; not a file, which
            holds no module.
        device: ``"meta"`` for shapes only; ``None`` for real values on the CPU.

    Returns:
        The base module; its random values depend on nothing outside it.

    Raises:
        ValueError: For an override that the module's constructor does not take, or a module that cannot be rebuilt.
    """
    if isinstance(base, nn.Module):
        return base
    if isinstance(base, (str, Path)):
        raise ValueError(f"base: {str(base)!r} is the file of a saved base, which holds no module to run.")
    with _fixed_rng(), torch.device(device or "cpu"):
        if isinstance(base, Mapping):
            made = _rebuild(model, {key: value for key, value in base.items() if key not in RUN_KEYS})
        elif callable(base):
            made = base()
        else:
            raise ValueError(
                f"base: found {base!r}, expected overrides such as {{width: 64}}, a module, a function that makes one, or the path "
                "of a saved base."
            )
        if (mesh := getattr(model, "_device_mesh", None)) is not None:
            made._device_mesh = mesh  # where configure_model shards, it asks the module for the mesh
        configure_model: Any = getattr(made, "configure_model", None)
        if callable(configure_model):
            configure_model()  # a LightningModule may build its layers here
    if not isinstance(made, nn.Module):
        raise ValueError(f"base: the factory returned {type(made).__name__}, expected a torch.nn.Module.")
    return made


def _rebuild(model: nn.Module, overrides: Mapping[str, Any]) -> nn.Module:
    cls = type(model)
    hparams = copy.copy(dict(getattr(model, "hparams", {})))
    instantiator = hparams.pop("_instantiator", None)
    signature = inspect.signature(cls).parameters
    accepted = list(signature)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    for key in overrides:
        close = difflib.get_close_matches(key, [*accepted, *hparams], n=1, cutoff=0.75)
        # **kwargs take any key: only one that looks like a known one is a slip.
        if key not in accepted and key not in hparams and (close or not open_ended):
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"base.{key}: {cls.__name__} takes no argument {key!r}.{hint} It takes: {', '.join(accepted)}."
            )
    missing = [
        name
        for name, p in signature.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and name not in hparams
        and name not in overrides
    ]
    if missing:
        raise ValueError(
            f"base: cannot rebuild {cls.__name__} with other sizes, because its argument(s) {', '.join(missing)} are not "
            "known. Call self.save_hyperparameters() in its __init__, or give `base` as a module or a factory."
        )
    arguments = {**hparams, **overrides}
    try:
        if instantiator is not None:
            # LightningCLI stores the parsed configuration (nested classes as dicts) and the function that reads it.
            path, name = str(instantiator).rsplit(".", 1)
            return getattr(importlib.import_module(path), name)(cls, arguments)
        if not open_ended:
            arguments = {key: value for key, value in arguments.items() if key in accepted}
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"base: {cls.__name__} could not be built with {dict(overrides)}: {error}") from error
