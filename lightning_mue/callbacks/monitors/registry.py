"""What all monitors of one Trainer share: one collective and one copy to the host a sampled step, and one table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from rich.table import Table
from torch import Tensor

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.monitors.finding.reading import SearchResult
from lightning_mue.callbacks.monitors.probes import Layers, Probe
from lightning_mue.checks import listed
from lightning_mue.console import wide_console
from lightning_mue.names import all_indices


class Member(Protocol):
    """What the registry needs of a monitor."""

    findings: dict[str, SearchResult]

    @property
    def probes(self) -> list[Probe]:
        """Its probes."""

    def finish(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Take the metrics of its probes over all ranks, log what comes of them and return that."""


class Registry:
    """The monitors of one Trainer, in its order."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._sampling: list[Member] = []
        self._ended: list[Member] = []
        self._shown = False

    def join(self, member: Member) -> None:
        """A monitor takes part in the fit that begins."""
        if member not in self._members:
            self._members.append(member)
        self._sampling, self._ended, self._shown = [], [], False

    def begin(self, member: Member) -> None:
        """A monitor samples the batch that begins."""
        self._sampling.append(member)

    def end(self, member: Member, trainer: Trainer) -> None:
        """A monitor has seen the end of the batch; the last one has the statistics of all gathered, logged and forgotten."""
        self._ended.append(member)
        if len(self._ended) < len(self._sampling):
            return
        members, self._sampling, self._ended = self._ended, [], []
        values: dict[str, float] = {}
        for each, metrics in zip(members, _gather(trainer, [each.probes for each in members]), strict=True):
            values |= each.finish(trainer, metrics)
        if values:
            tensor = torch.tensor(list(values.values()), device=trainer.strategy.root_device)
            trainer.callback_metrics.update(zip(values, tensor.unbind(), strict=True))
            tensorboard_page.write(trainer, values)

    def forget(self, member: Member) -> None:
        """The batch that a monitor samples did not end."""
        self._sampling = [each for each in self._sampling if each is not member]
        self._ended = [each for each in self._ended if each is not member]

    def show(self, trainer: Trainer) -> None:
        """Print the table of what is watched, once a fit, on rank zero."""
        rows = [member for member in self._members if member.findings]
        if self._shown or not rows:
            return
        self._shown = True
        if trainer.is_global_zero:
            wide_console().print(table_of(rows))

    def leave(self, member: Member) -> None:
        """A monitor's fit is over."""
        self.forget(member)
        self._members = [each for each in self._members if each is not member]


_registries: WeakKeyDictionary[Any, Registry] = WeakKeyDictionary()


def registry_of(trainer: Trainer) -> Registry:
    """The registry of a Trainer."""
    return _registries.setdefault(trainer, Registry())


def table_of(members: list[Member]) -> Table:
    """What each monitor watches, how that was found, and what was not found."""
    table = Table(title="What the monitors watch")
    for column in ("Monitor", "Looks for", "Watches", "Found by", "Not found"):
        table.add_column(column, overflow="fold")
    for member in members:
        for i, (what, finding) in enumerate(member.findings.items()):
            name = type(member).__name__ if i == 0 else ""
            how = ", ".join(dict.fromkeys(each.how for each in finding.found))
            missing = listed([*dict.fromkeys(all_indices(text) for text in finding.missing)], nothing="", limit=4)
            table.add_row(
                name, what, _counted(finding), how, missing or ("" if finding.found else "none in this model")
            )
    return table


def _counted(finding: SearchResult) -> str:
    counts: dict[tuple[str, str], int] = {}
    for each in finding.found:
        key = all_indices(each.name) or "the model itself", each.kind
        counts[key] = counts.get(key, 0) + 1
    kinds = {kind for _, kind in counts}
    return "\n".join(
        f"{n} x {name}{f' ({kind})' if len(kinds) > 1 else ''}" if n > 1 or len(kinds) > 1 else name
        for (name, kind), n in counts.items()
    )


def _gather(trainer: Trainer, groups: list[list[Probe]]) -> list[dict[str, float]]:
    """The metrics of each group of probes for the global batch, by one collective and one copy to the CPU."""
    device = trainer.strategy.root_device
    probes = [probe for group in groups for probe in group]
    totals = [torch.zeros(p.size, device=device) if p.total is None else p.total.to(device) for p in probes]
    local_N = torch.cat(totals) if totals else torch.zeros(0, device=device)
    ranks_RN = trainer.strategy.all_gather(local_N).reshape(-1, local_N.numel()).cpu().double()
    parts = iter(ranks_RN.split([p.size for p in probes], dim=1))
    return [_merged(group, parts) for group in groups]


def _merged(probes: list[Probe], parts: Any) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for probe in probes:
        part_Rn: Tensor = next(parts)
        metrics.update(probe.metrics(reduce(probe.merge, part_Rn)))
    return metrics


def worst_layers(layers: Layers, summary: Mapping[str, float]) -> dict[str, str]:
    """Tag of a largest or smallest value over layers -> the label of the layer that has it."""
    found = {}
    for tag, value in summary.items():
        group, _, reduction = tag.rpartition("_")
        if reduction not in ("max", "min"):
            continue
        label = next((name for name, v in layers.get(group, {}).items() if v == value or v != v), None)
        if label is not None:
            found[tag] = label
    return found
