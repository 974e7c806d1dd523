"""A sweep in Optuna's storage: which runs are finished, which process runs which, and how one takes a run for itself alone."""

from __future__ import annotations

import contextlib
import math
import random
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lightning_mue.analysis.sweep.plan import Cell, Job, Point, SweepPlan
from lightning_mue.analysis.sweep.search import distribution
from lightning_mue.analysis.sweep.workers import LEASE, Workers
from lightning_mue.analysis.trials import Trial, Value
from lightning_mue.checks import listed, value_error

_NAN = float("nan")
#: Times that a database is tried.
_ATTEMPTS = 4


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        loss: The metric; inf where it diverged, NaN where it crashed.
        error: Why it crashed.
        tokens, compute: See `Trial`.
        seconds: How long it took.
    """

    loss: float
    error: str = ""
    tokens: float = _NAN
    compute: float = _NAN
    seconds: float = _NAN


@dataclass(frozen=True)
class Entry:
    """A run in the storage.

    Attributes:
        number: Of the trial in Optuna's study, ascending in time.
        worker: The process that ran or runs it.
        early: Twentieths of the run -> training loss until then.
    """

    number: int
    id: int
    job: Job
    worker: str
    state: Literal["running", "finished", "crashed"]
    outcome: Outcome
    early: Mapping[int, float] = field(default_factory=dict)


class SweepStorage:
    """The trials of one sweep, which any number of processes share.

    Args:
        place: A URL of a database, or the path of a journal file.
        name: Name of the sweep in it.
        plan: What is swept.
        lease: See `Workers`.

    Raises:
        ValueError: If the storage cannot be opened, or holds another sweep of this name.
    """

    def __init__(self, place: str, name: str, plan: SweepPlan, lease: float = LEASE) -> None:
        self.plan, self.workers, self._cells = plan, Workers(lease), {cell_key(cell): cell for cell in plan.cells()}
        self._storage = _open(place)
        self._study = optuna.create_study(study_name=name, storage=self._storage, load_if_exists=True)
        self._study_id: int = self._storage.get_study_id_from_name(name)
        theirs, ours = self._study.user_attrs.get("sweep"), plan.to_dict()
        if theirs is None:
            self._study.set_user_attr("sweep", ours)
            theirs = self._study.user_attrs["sweep"]  # of the other one, if two began at once
        refuse_other(place, theirs, ours, do="Give another --name, or the options of that sweep to continue it.")

    def beat(self) -> None:
        """Writes this process's sign of life, if it is due."""
        if (sign := self.workers.sign()) is not None:
            self._study.set_user_attr(f"worker {self.workers.id}", sign)

    def entries(self) -> list[Entry]:
        """All runs of the plan's seeds, in the order in which they were taken; those of dead processes are given up first."""
        trials = self._trials()
        signs = self._study.user_attrs if any(t.state is TrialState.RUNNING for t in trials) else {}
        living = []
        for trial in trials:
            worker = trial.user_attrs["worker"]
            if trial.state is TrialState.RUNNING and self.workers.is_dead(worker, signs.get(f"worker {worker}")):
                self._end(trial._trial_id, TrialState.FAIL)
            elif trial.state is not TrialState.FAIL or "error" in trial.user_attrs:
                living.append(self._entry(trial))
        return living

    def take(self, job: Job) -> int | None:
        """Takes a run for this process: the id of its trial, or None if another process has it or has finished it."""
        taken = uuid.uuid4().hex
        attributes = {
            "key": job.key(),
            "cell": cell_key(job.cell),
            "worker": self.workers.id,
            "taken": taken,
            "seed": job.seed,
            "lr": job.point.lr,
            "searched": dict(job.point.searched),
        }
        params, distributions = self._parameters(job)
        # Written in one piece, in an order that is the same for all; of two that take the same run the first has it.
        trial_id = self._storage.create_new_trial(
            self._study_id,
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attributes
            ),
        )
        for trial in self._trials():
            if trial.user_attrs["taken"] == taken:
                return trial_id
            if trial.user_attrs["key"] == job.key() and trial.state is not TrialState.FAIL:
                self._end(trial_id, TrialState.FAIL)
                return None
        raise AssertionError("a trial that was written is not there")

    def note(self, trial_id: int, twentieth: int, loss: float) -> None:
        """Notes the training loss of a run that goes on."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process gave it up
            self._storage.set_trial_intermediate_value(trial_id, twentieth, loss)

    def finish(self, trial_id: int, outcome: Outcome) -> bool:
        """Writes how a run ended; False, and nothing is written, if another process gave it up meanwhile."""
        try:
            for name in ("tokens", "compute", "seconds"):
                if not math.isnan(value := getattr(outcome, name)):
                    self._storage.set_trial_user_attr(trial_id, name, value)
            if outcome.error:
                self._storage.set_trial_user_attr(trial_id, "error", outcome.error)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return (
            self._end(trial_id, TrialState.FAIL)
            if outcome.error
            else self._end(trial_id, TrialState.COMPLETE, outcome.loss)
        )

    def give_up(self, trial_id: int) -> None:
        """Gives back a run that this process does not finish; another one may take it at once."""
        self._end(trial_id, TrialState.FAIL)

    def _end(self, trial_id: int, state: TrialState, loss: float | None = None) -> bool:
        try:
            return self._storage.set_trial_state_values(trial_id, state, None if loss is None else [loss])
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _trials(self) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return sorted((t for t in trials if t.user_attrs["seed"] < self.plan.seeds), key=lambda t: t.number)

    def _entry(self, trial: FrozenTrial) -> Entry:
        attributes = trial.user_attrs
        point = Point(attributes["lr"], tuple(attributes["searched"].items()))
        states: Any = {TrialState.RUNNING: "running", TrialState.COMPLETE: "finished"}
        numbers = {name: attributes.get(name, _NAN) for name in ("tokens", "compute", "seconds")}
        return Entry(
            trial.number,
            trial._trial_id,
            Job(self._cells[attributes["cell"]], point, attributes["seed"]),
            attributes["worker"],
            states.get(trial.state, "crashed"),
            Outcome(_NAN if trial.value is None else trial.value, attributes.get("error", ""), **numbers),
            trial.intermediate_values,
        )

    def _parameters(self, job: Job) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """A run's values as Optuna's parameters, for its dashboards."""
        plan = self.plan
        choices: dict[str, list[Value]] = {"rule": list(dict.fromkeys(cell.rule for cell in self._cells.values()))}
        choices |= {axis.names[0]: [point[0] for point in axis.points] for axis in plan.axes}
        choices |= {key: list(values) for key, values in plan.settings.items()}
        distributions: dict[str, BaseDistribution] = {k: CategoricalDistribution(v) for k, v in choices.items()}
        distributions |= {"lr": FloatDistribution(1e-12, 1e12, log=True), "seed": IntDistribution(0, 1_000_000)}
        distributions |= {name: distribution(span) for name, span in plan.search.items() if name != "lr"}
        params = {"rule": job.cell.rule, "lr": job.point.lr, "seed": job.seed}
        return {**params, **job.cell.size, **job.cell.settings, **dict(job.point.searched)}, distributions


def cell_key(cell: Cell) -> str:
    """A text that is the same for the same cell in every process."""
    return str(cell)


def to_trials(entries: Iterable[Entry]) -> list[Trial]:
    """The finished runs, as `write_trials` takes them."""
    return [
        Trial(
            rule=e.job.cell.rule,
            size=e.job.cell.size,
            seed=e.job.seed,
            lr=e.job.point.lr,
            loss=e.outcome.loss,
            tokens=e.outcome.tokens,
            compute=e.outcome.compute,
            settings={**e.job.cell.settings, **dict(e.job.point.searched)},
        )
        for e in entries
        if e.state == "finished"
    ]


def _open(place: str) -> optuna.storages.BaseStorage:
    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(place))
    for attempt in range(_ATTEMPTS):
        try:
            return optuna.storages.get_storage(place)
        except Exception as error:  # of the database's driver, which may be any
            if not isinstance(error, ImportError) and attempt + 1 < _ATTEMPTS:
                time.sleep(
                    random.uniform(0.5, 1.5)
                )  # processes that begin at once all make the tables, and one succeeds
                continue
            reason: BaseException = error
            while (deeper := reason.__cause__ or reason.__context__) is not None:
                reason = deeper
            found = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
            do = "Check the URL and the server. For PostgreSQL, pip install 'psycopg[binary]' and begin the URL with "
            do += "postgresql+psycopg://"
            raise value_error("--storage", found=found, expected="a database that Optuna can open", do=do) from error
    raise AssertionError


def refuse_other(place: str, theirs: Any, ours: Any, do: str) -> None:
    """Refuses to mix two sweeps in one place, which are given as `SweepPlan.to_dict` has them.

    Raises:
        ValueError: If they differ; the message says where.
    """
    if unlike := list(_differences(theirs, ours)):
        found = f"another sweep, with {listed(unlike, limit=6)}"
        raise value_error(place, found=found, expected="no sweep, or this one", do=do)


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterable[str]:
    """Where two plans differ, each with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys([*theirs, *ours]):
            yield from _differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
    elif theirs != ours:
        yield f"{path}: {theirs} there, {ours} here"
