"""The reading of a model that all monitors share: its modules by name, its parameters by role, its layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lightning_mue.callbacks.monitors.probes import find_modules
from lightning_mue.checks import listed, value_error
from lightning_mue.parameterizations.planning.model_roles import read_alone
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.stacks import Stacks
from lightning_mue.parameterizations.rules.roles import Role


@dataclass(frozen=True)
class Found:
    """A module that a monitor watches.

    Attributes:
        name: Its qualified name, without the traces of wrappers.
        module: It.
        kind: What it is: of a branch "attention", "ffn" or another name; else "head", "attention", "router".
        how: How it was found, for the table.
        info: The parameter by whose role it was found, if it was.
    """

    name: str
    module: nn.Module
    kind: str
    how: str
    info: ParameterInfo | None = None


@dataclass
class SearchResult:
    """What was found of one thing that a monitor looks for, and what was not, in words."""

    found: list[Found] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """Names of the modules."""
        return [each.name for each in self.found]


#: Model -> (its modules, its parameters, trouble): plain data, which keeps no model alive.
_known: WeakKeyDictionary[nn.Module, tuple[Any, list[ParameterInfo], str]] = WeakKeyDictionary()


class Reading:
    """A model as its monitors read it.

    Attributes:
        modules: Qualified name -> module.
        infos: The parameters with their roles; empty if the model could not be read.
        trouble: Why it could not; empty if it could.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = find_modules(model, lambda _: True)
        shape = tuple((name, id(module)) for name, module in model.named_modules())
        known = _known.get(model)
        if known is None or known[0] != shape:
            known = _known[model] = (shape, *_infos_of(model))
        _, self.infos, self.trouble = known
        self._stacks = Stacks(self.infos)

    def of_role(self, *roles: Role) -> list[ParameterInfo]:
        """The parameters with one of these roles, in the model's order."""
        return [info for info in self.infos if info.role in roles]

    def layer(self, name: str) -> str:
        """The innermost layer that a name lies in; empty outside layers."""
        return self._stacks.layer(name)

    def owner(self, path: str) -> str:
        """The name of the innermost module at or around a path that is called as a module.

        ``out_proj`` of an ``nn.MultiheadAttention`` is not: its parent takes only the weights. Nor are the parts of an adapter
        (LoRA), of whose output each makes a part.
        """
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        path = next((name for name in accumulate(path.split("."), "{}.{}".format) if self.is_adapted(name)), path)
        parent = path.rpartition(".")[0]
        return parent if path and isinstance(self.modules.get(parent), nn.MultiheadAttention) else path

    def is_adapted(self, name: str) -> bool:
        """Whether a module is an adapter round a layer, as PEFT's are."""
        return f"{name}.base_layer" in self.modules


def read(model: nn.Module) -> Reading:
    """The reading of a model; its roles are read once while its modules stay the same ones."""
    return Reading(model)


def _infos_of(model: nn.Module) -> tuple[list[ParameterInfo], str]:
    try:
        return read_alone(model), ""
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return [], f"the roles of parameters could not be read ({error})"


def inside(name: str, others: Iterable[str]) -> bool:
    """Whether a module lies in one of others, or is one of them; the root ("") holds all."""
    return any(not other or name == other or name.startswith(f"{other}.") for other in others)


def by_pattern(reading: Reading, argument: str, pattern: str, fits: Callable[[nn.Module], bool] = bool) -> list[str]:
    """Names of the modules whose whole name matches a regular expression (or is equal to it), and that fit.

    Raises:
        ValueError: If the expression cannot be read, or matches nothing; with the nearest names.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        found = f"{pattern!r}, which is no regular expression ({error})"
        raise value_error(argument, found=found, expected="one that matches names of modules") from error
    names = [
        n for n, m in reading.modules.items() if (n == pattern or compiled.fullmatch(n)) and (n == pattern or fits(m))
    ]
    if not names:
        raise _unmatched(reading, argument, pattern, compiled)
    return names


def _unmatched(reading: Reading, argument: str, pattern: str, compiled: re.Pattern[str]) -> ValueError:
    known = [name for name in reading.modules if name]
    literal = re.sub(r"\\d[+*]?|\.[+*]|\[[^\]]*\][+*]?|[\\^$(){}|?*+]", "", pattern)
    near = difflib.get_close_matches(literal, known, n=4, cutoff=0.3)
    parts = [name for name in known if compiled.search(name)][:4]
    expected = "a regular expression that matches the whole name of a module"
    do = f"The nearest names are {listed([repr(name) for name in (parts or near or known[-8:])])}."
    return value_error(argument, found=repr(pattern), expected=expected, do=do)
