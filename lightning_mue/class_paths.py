"""What a configuration, or the hyperparameters in a checkpoint, may call: classes of the expected type, never a function.

They name what to call by ``class_path``. The configuration parser calls functions too, and where an argument has no type anything
at all. So whatever is named is looked at here before any of it is called.
"""

from __future__ import annotations

import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_type_hints

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_mue.checks import value_error

#: What a training is made of; without a type, an argument takes these only.
_PARTS = (nn.Module, Optimizer, LRScheduler, Dataset, Sampler, DataLoader)
#: Classes of Lightning that are such parts, too; by name, for its two namespaces.
_OF_LIGHTNING = {"Callback", "LightningDataModule", "Logger", "Profiler", "Strategy", "Accelerator", "Precision"}
#: Modules of Python whose functions may be passed on, for activations say.
_HARMLESS = {"math", "operator"}
#: Functions that make a module from what LightningCLI saved; any other may do anything.
INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def check_class_paths(value: Any, key: str, *, typed: bool) -> None:
    """Looks at every ``class_path`` in a value, at any depth; imports the modules that are named, and calls nothing.

    Args:
        value: Part of a parsed configuration, or of a module's hyperparameters.
        key: Where it stands, for messages.
        typed: Whether the parser itself checks that a class here is a subclass of a certain type.

    Raises:
        ValueError: For a function instead of a class; where nothing else checks the type, for a class that is no part of a
            training (module, optimizer, schedule, data, callback, logger, ...); for a function of Python itself.
    """
    if isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            check_class_paths(each, f"{key}[{i}]", typed=typed)
    elif (named := as_mapping(value)) is not None and "class_path" in named:
        cls = _check_class(named["class_path"], f"{key}.class_path", typed)
        check_arguments(cls, as_mapping(named.get("init_args")) or {}, f"{key}.init_args")
        check_class_paths(named.get("dict_kwargs"), f"{key}.dict_kwargs", typed=False)
    elif named is not None:
        for name, each in named.items():
            # The parser's own groups are Namespaces; of a dict's values it knows no type.
            check_class_paths(
                each, f"{key}.{name}" if key else str(name), typed=typed and not isinstance(value, Mapping)
            )
    elif callable(value) and not isinstance(value, type):
        _refuse_functions_of_python(value, key)


def check_arguments(cls: Any, arguments: Mapping[str, Any], key: str) -> None:
    """`check_class_paths` for the arguments of a class, whose annotations tell where the parser checks types."""
    for name, value in arguments.items():
        check_class_paths(value, f"{key}.{name}", typed=_has_type(cls, name))


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """What a value holds by name, if it is a mapping or one of the parser's namespaces."""
    if isinstance(value, Mapping):
        return value
    is_namespace = isinstance(value, Namespace) or type(value).__module__.startswith("jsonargparse")
    return vars(value) if is_namespace and hasattr(value, "__dict__") else None


def _check_class(path: Any, key: str, typed: bool) -> Any:
    """The class of a path; None if there is nothing of that name, so that nothing can be called either."""
    found = imported(path) if isinstance(path, str) else path
    if found is None:
        return None
    if not inspect.isclass(found):
        do = "A function or method is not called from a configuration: write a class, or call it in Python."
        raise value_error(
            key, found=f"{path!r}, which is no class", expected="a subclass of the argument's type", do=do
        )
    if not typed and not _is_part(found):
        raise value_error(
            key,
            found=f"{path!r} where any value may stand",
            expected="a module, an optimizer, a schedule, data, a callback or a logger",
            do="Annotate the argument of your class with the type that it expects; then every subclass of that is taken.",
        )
    return found


def _is_part(cls: type) -> bool:
    lightning = ("lightning", "pytorch_lightning")
    of_lightning = any(c.__name__ in _OF_LIGHTNING and c.__module__.split(".")[0] in lightning for c in cls.__mro__)
    return of_lightning or issubclass(cls, _PARTS)


def imported(path: str) -> Any:
    """What a dotted path names: something in a module, or in a class there."""
    module, _, name = path.rpartition(".")
    outer, _, middle = module.rpartition(".")
    for home, names in ((module, [name]), (outer, [middle, name])):
        try:
            found: Any = import_module(home)
            for each in names:
                found = getattr(found, each)
        except (ImportError, AttributeError, ValueError, TypeError):
            continue
        return found
    return None


def _has_type(cls: Any, name: str) -> bool:
    """Whether an argument of a class has an annotation that does not allow everything."""
    for each in getattr(cls, "__mro__", ()):
        init = each.__dict__.get("__init__")
        if name in getattr(getattr(init, "__code__", None), "co_varnames", ()):
            try:
                annotation = get_type_hints(init).get(name)
            except Exception:  # a name that cannot be resolved: the parser does not know its type either
                return False
            return annotation is not None and re.search(r"\b(Any|object)\b", repr(annotation)) is None
    return False


def _refuse_functions_of_python(value: Any, key: str) -> None:
    home = str(getattr(value, "__module__", "")).partition(".")[0]
    if home in sys.stdlib_module_names - _HARMLESS:
        found = f"{home}.{getattr(value, '__qualname__', value)}, a function of Python itself"
        raise value_error(key, found=found, expected="a function of a model or a library", do="Give another.")
