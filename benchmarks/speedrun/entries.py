"""Entries of the speedrun: a YAML file each, with an optimizer, initial draws, warm-up, and what of it is searched.

Keys of the file:

* ``optimizer``: ``class_path`` and ``init_args``. The class gets (name, parameter) pairs, or two param groups if
  ``embedding_rate`` is given: matrices at ``lr``, and embedding and gains at ``lr * embedding_rate``.
* ``model``: arguments of MoELanguageModel other than its sizes.
* ``warmup``: part of the run that warms up; then the rate decays to zero in a straight line.
* ``rules``: rules that the transfer columns apply to it; ``sp``: the same numbers at every size.
* ``space``: searched numbers by dotted key, as ``lightning-mue sweep --search`` writes them (``log:0.001:0.1``).
* ``moe``: what differs for the model with experts (dotted key: value), found by a search on that model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch.optim import Optimizer

from lightning_mue.class_paths import imported
from lightning_mue.optim.groups import classify

FOLDER = Path(__file__).parent / "entries"


@dataclass(frozen=True)
class Entry:
    """One entry; `settings` is what its file holds, without `space` and `moe`."""

    name: str
    settings: dict[str, Any]
    space: dict[str, str]
    moe: dict[str, float]

    def optimizer(self, named_parameters: Any) -> Optimizer:
        """Build the optimizer for (name, parameter) pairs."""
        made = self.settings["optimizer"]
        build = imported(made["class_path"])
        pairs, arguments = list(named_parameters), dict(made["init_args"])
        ratio = self.settings.get("embedding_rate")
        if ratio is None:
            return build(pairs, **arguments)
        slow = [parameter for name, parameter in pairs if classify(name, parameter)[0] != "adamw"]
        table = [parameter for name, parameter in pairs if classify(name, parameter)[0] == "adamw"]
        return build([{"params": slow}, {"params": table, "lr": arguments["lr"] * ratio}], **arguments)

    def changed(self, values: Mapping[str, float]) -> Entry:
        """The entry with other values at dotted keys; numbers in a key index lists."""
        settings = copy.deepcopy(self.settings)
        for key, value in values.items():
            *path, last = key.split(".")
            place: Any = settings
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(last) if isinstance(place, list) else last] = value
        return replace(self, settings=settings)

    def value(self, key: str) -> Any:
        """What is at a dotted key."""
        place: Any = self.settings
        for part in key.split("."):
            place = place[int(part) if isinstance(place, list) else part]
        return place


def load(name: str, folder: Path = FOLDER) -> Entry:
    """Read ``<name>.yaml``."""
    settings = yaml.safe_load((folder / f"{name}.yaml").read_text())
    space, moe = settings.pop("space"), settings.pop("moe", {})
    return Entry(name, settings, space, moe)


def names(folder: Path = FOLDER) -> list[str]:
    """Names of all entries, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))
