"""What a sweep runs: its cells (rule, size, settings), the points in each, and the seeds of each point."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_mue.analysis.sweep.axes import Axis, Range, require_rate
from lightning_mue.analysis.sweep.config import (
    RUN_AXES,
    Config,
    batch_key,
    changed,
    find_rate,
    get,
    resolve_key,
    rule_of,
    run_changes,
    with_rule,
    with_seed,
)
from lightning_mue.analysis.trials import Value
from lightning_mue.checks import value_error

#: The default grid: the config's own rate times these.
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Cell:
    """One curve of loss against learning rate: what stays the same along it."""

    rule: str
    size: Mapping[str, Value]
    settings: Mapping[str, Value]

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{key}={value}" for key, value in {**self.size, **self.settings}.items())])


@dataclass(frozen=True)
class Point:
    """One place on a cell's curve; its seeds are trained on the same batches from the same weights as other points'."""

    lr: float
    searched: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True)
class Job:
    """One training run."""

    cell: Cell
    point: Point
    seed: int

    def __str__(self) -> str:
        searched = "".join(f" {key}={value:.4g}" for key, value in self.point.searched)
        return f"{self.cell} lr={self.point.lr:.4g}{searched} seed={self.seed}"

    def key(self) -> str:
        """A short text that is the same for the same run in every process."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SweepPlan:
    """All that decides what a sweep runs; processes that share a storage have equal plans.

    Attributes:
        config: Resolved configuration of a run, defaults included.
        command: What trains, without a config; empty for lightning-mue itself.
        lr_key: Key of the learning rate in the config.
        metric: Logged quantity to minimize.
        rates: Rates of the grid, ascending; empty if ``search`` has the rate.
        axes: Sizes, crossed with each other.
        rules: Rules, "none" for no MuECallback; empty for the config's own.
        settings: Key -> values, crossed with the sizes.
        search: Key -> range, searched by TPE in each cell; key ``lr`` is the learning rate.
        seeds: Number of seeds of each point: 0, 1, ...
        extend: Points added to a grid at most, for each cell.
        samples: Points of each cell where something is searched.
    """

    config: Config
    command: tuple[str, ...]
    lr_key: str
    metric: str
    rates: tuple[float, ...]
    axes: tuple[Axis, ...] = ()
    rules: tuple[str, ...] = ()
    settings: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    search: Mapping[str, Range] = field(default_factory=dict)
    seeds: int = 1
    extend: int = 4
    samples: int = 20

    def cells(self) -> list[Cell]:
        """Rules x sizes x settings, in the order given."""
        rules = self.rules or (rule_of(self.config),)
        sizes = [dict(zip((a.names[0] for a in self.axes), values, strict=True)) for values in self._heads()]
        grids = [dict(zip(self.settings, values, strict=True)) for values in itertools.product(*self.settings.values())]
        return [Cell(*parts) for parts in itertools.product(rules, sizes, grids)]

    def config_of(self, job: Job) -> Config:
        """The configuration of a run, before what makes it a trial.

        Raises:
            ValueError: For a rule without a base, or sizes of the run that cannot be set.
        """
        config = with_rule(self.config, job.cell.rule)
        sizes = self._all_sizes(job.cell.size)
        changes = {resolve_key(config, "--axis", name): v for name, v in sizes.items() if name not in RUN_AXES}
        changes |= {resolve_key(config, "--set", name): value for name, value in job.cell.settings.items()}
        changes |= {resolve_key(config, "--search", name): value for name, value in job.point.searched}
        config = changed(config, {**changes, self.lr_key: job.point.lr})
        if run := {name: sizes[name] for name in RUN_AXES if name in sizes}:
            config = changed(config, run_changes(config, run))
        return with_seed(config, job.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, by which two plans are compared: without seeds, extend and samples, which may grow later."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("seeds", "extend", "samples")}
        return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]

    def _heads(self) -> Iterator[tuple[Value, ...]]:
        return itertools.product(*([point[0] for point in axis.points] for axis in self.axes))

    def _all_sizes(self, size: Mapping[str, Value]) -> dict[str, Value]:
        """The values of all keys of the axes; a size holds that of each axis's first one."""
        found: dict[str, Value] = {}
        for axis in self.axes:
            point = next(p for p in axis.points if p[0] == size[axis.names[0]])
            found |= dict(zip(axis.names, point, strict=True))
        return found


def make_plan(
    config: Config, *, rates: tuple[float, ...] | Range | None, lr_key: str | None, **options: Any
) -> SweepPlan:
    """A plan whose keys were looked up in the config; ``options`` are those of `SweepPlan`.

    Without rates there are five around the config's own, a factor of two apart; where something else is searched, the config's.

    Raises:
        ValueError: For a key that the config does not have, one that is varied twice, a rule without a base, or sizes of the
            run that cannot be set.
    """
    key, search = find_rate(config, lr_key), dict(options.pop("search", {}))
    if "lr" in search:
        raise value_error(
            "--search", found="lr", expected="other keys", do="Search the learning rate by --lr log:LOW:HIGH."
        )
    if isinstance(rates, Range):
        search, rates = {"lr": rates, **search}, ()
    elif rates is None:
        rates = tuple(get(config, key) * factor for factor in ((1.0,) if search else _FACTORS))
    elif search and len(rates) > 1:
        raise value_error(
            "--lr", found=f"{len(rates)} rates beside --search", expected="one rate, or a range to search in"
        )
    plan = SweepPlan(config, lr_key=key, rates=rates, search=search, **options)
    _refuse_twice(plan)
    _refuse_unfit(plan)
    return plan


def _refuse_unfit(plan: SweepPlan) -> None:
    """Refuses what cannot be run, by making the configuration of one run of each cell."""
    for name in ("barebones", "fast_dev_run"):
        if plan.config["trainer"].get(name):
            found, do = plan.config["trainer"][name], "Remove it for a sweep."
            raise value_error(f"trainer.{name}", found=found, expected="a run that logs its metrics", do=do)
    if plan.search.get("lr") and plan.search["lr"].scale == "int":
        raise value_error("--lr", found="int:", expected="log: or lin:")
    searched = tuple((name, span.low) for name, span in plan.search.items() if name != "lr")
    rate = plan.rates[0] if plan.rates else plan.search["lr"].low
    require_rate("--lr", rate)
    for cell in plan.cells():
        plan.config_of(Job(cell, Point(rate, searched), 0))


def _refuse_twice(plan: SweepPlan) -> None:
    """Refuses a key that two options vary."""
    given = [("--axis", name) for axis in plan.axes for name in axis.names if name not in RUN_AXES]
    given += [("--set", name) for name in plan.settings]
    given += [("--search", name) for name in plan.search if name != "lr"]
    owner = {plan.lr_key: "the learning rate (--lr)"}
    names = {name for axis in plan.axes for name in axis.names}
    if names & set(RUN_AXES):
        owner["trainer.max_steps"] = "set by the axis tokens or batch_tokens"
    if "batch_tokens" in names:
        owner[batch_key(plan.config)] = "set by the axis batch_tokens"
    for axis in plan.axes:
        for name in axis.names:
            if sum(name in other.names for other in plan.axes) > 1:
                raise value_error("--axis", found=f"{name} in two axes", expected="each axis once")
    for option, name in given:
        key = resolve_key(plan.config, option, name)
        if key in owner:
            raise value_error(option, found=f"{name}, which is {owner[key]}", expected="each key varied by one option")
        owner[key] = f"varied by {option} {name}"
