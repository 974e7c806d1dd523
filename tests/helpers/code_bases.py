"""A model of ours with the names and fused weights of another code base, and stand-ins for what an exported file imports there."""

from __future__ import annotations

import fnmatch
import re
import sys
import types
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_mue.parameterizations.exporting.layouts import LAYOUTS, place_of


class Rebuilt(nn.Module):
    """Holds parameters under dotted names; runs nothing."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))


def by_place(tensors):
    """(place, layer) -> tensor, of tensors by their names in our models."""
    found = {}
    for name, tensor in tensors.items():
        place = place_of(name)
        found[place.parts[0], place.layer] = tensor
    return found


def renamed(tensors, layout, alternative=0):
    """Tensors by the names of a layout, fused where it fuses; experts of a list apart. ``alternative`` picks among names."""
    ours, found = by_place(tensors), {}
    for places, names in LAYOUTS[layout].items():
        parts = places.split("+")
        name = names[min(alternative, len(names) - 1)]
        for layer in sorted({at for place, at in ours if place == parts[0]}, key=str):
            if set(parts) & set(_placed(found, layer)):
                continue  # a layout may have the same weights fused and apart
            whole = torch.cat([ours[part, layer] for part in parts], dim=-2 if ours[parts[0], layer].dim() > 1 else 0)
            target = name.replace("{l}", str(layer))
            experts = enumerate(whole) if "{e}" in name else [("", whole)]
            found |= {target.replace("{e}", str(e)): (parts, layer, tensor) for e, tensor in experts}
    return {name: tensor for name, (_, _, tensor) in found.items()}


def _placed(found, layer):
    return [part for parts, at, _ in found.values() if at == layer for part in parts]


@dataclass(frozen=True)
class ParamKey:
    """Megatron's: a parameter matches if one of the names does."""

    name: tuple = field(default_factory=tuple)

    def matches(self, param, name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.name)


@dataclass
class ParamGroupConfig:
    """torchtitan's."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict


class OptimizersContainer:
    """torchtitan's, of which only the configuration is used."""

    @dataclass
    class Config:
        param_groups: list
        implementation: str = "fused"


def load(source):
    """Runs an exported file, with stand-ins for what is not installed."""
    stands_in = {
        "megatron.core.optimizer": {"ParamKey": ParamKey},
        "torchtitan.components.optimizer": {
            "OptimizersContainer": OptimizersContainer,
            "ParamGroupConfig": ParamGroupConfig,
        },
    }
    added = []
    for name, members in stands_in.items():
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            if ".".join(parts[:n]) not in sys.modules:
                added.append(".".join(parts[:n]))
                sys.modules[added[-1]] = types.ModuleType(added[-1])
        vars(sys.modules[name]).update(members)
    scope = {}
    try:
        exec(compile(source, "exported.py", "exec"), scope)  # our own source, written a line before
    finally:
        for name in added:
            del sys.modules[name]
    return types.SimpleNamespace(**scope)


def megatron_groups(module, exported, **options):
    """Parameter groups as Megatron builds them: the overrides of all keys that match, which must not conflict."""
    groups = {}
    for name, parameter in module.named_parameters():
        merged = {}
        for key, override in exported.config_overrides(**options).items():
            if key.matches(parameter, f"module.{name}"):
                assert not merged, f"{name} matches two keys"
                merged |= override
        assert merged, name
        groups.setdefault(tuple(sorted(merged.items())), []).append(parameter)
    decay = exported.OPTIMIZER["weight_decay"]
    betas = (exported.OPTIMIZER["adam_beta1"], exported.OPTIMIZER["adam_beta2"])
    return [
        {
            "params": parameters,
            "lr": dict(key)["max_lr"],
            "weight_decay": decay * dict(key)["wd_mult"],
            "eps": dict(key)["eps"],
            "betas": betas,
        }
        for key, parameters in groups.items()
    ]


def torchtitan_groups(module, exported):
    """Parameter groups as torchtitan builds them: the first pattern that matches; a pattern without a match is an error."""
    claimed, groups = set(), []
    for config in exported.optimizer_config().param_groups:
        found = [(n, p) for n, p in module.named_parameters() if n not in claimed and re.search(config.pattern, n)]
        assert found, config.pattern
        claimed |= {n for n, _ in found}
        groups.append({"params": [p for _, p in found], **config.optimizer_kwargs})
    assert claimed == {n for n, _ in module.named_parameters()}
    return groups
