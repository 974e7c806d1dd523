"""TransferMonitor: compares a larger run with its tuned base at the same point of training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.monitors.probes import Probe
from lightning_mue.callbacks.monitors.registry import registry_of
from lightning_mue.callbacks.monitors.sampling import SampledMonitor, will_step
from lightning_mue.callbacks.transfer.comparison import Comparison, octaves, warn_of_other_base
from lightning_mue.callbacks.transfer.expectation import Expectation, classes_of
from lightning_mue.callbacks.transfer.fingerprint import Fingerprint, sampled_steps
from lightning_mue.callbacks.transfer.layers import Layers
from lightning_mue.callbacks.transfer.probes import (
    LossProbe,
    UpdateProbe,
    activation_probes,
    measurements,
    update_probes,
)
from lightning_mue.callbacks.transfer.reach import forward_multipliers
from lightning_mue.callbacks.transfer.run import plan_in_force, total_steps
from lightning_mue.checks import require_integer, require_number, require_types, value_error
from lightning_mue.names import clean_name
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.reading.parameters import role_patterns


class TransferMonitor(SampledMonitor):
    """Records a fingerprint of the tuned base run; in the target run shows live whether the transfer holds.

    In the base run, ``TransferMonitor(record="base.json")`` takes a few dozen samples, dense at the start, and writes them
    (some kB) at the end of `fit`, or with what there is when it raises. In the target run,
    ``TransferMonitor(compare="base.json")`` logs, for every quantity, measured / expected, where expected is the base's value
    at the same training progress x a factor from the plan in force: 1 means that the transfer holds. `MuECallback` brings the
    plan; without one, or at base size, all factors are 1. Progress is the fraction of the run's optimizer steps, so an LR
    schedule that is the same function of it cancels. A ratio that stays outside the band is warned of, once until it comes
    back, with the cell of the rule's table to look at first.

    The metrics are ``transfer/<quantity>/<role>/<place>``; places are quartiles of the depth, ``q1`` to ``q4``, and
    ``outside``. They are defined in docs/theory.md sections 6 and 7:

    - ``update/<role>``: ``rms(W_{t+1} - W_t) / rms(W_t)``, RMS over the role's tensors. Tells whether the optimizer does what
      the plan says (eps, clipping, frozen weights, wrong groups), not whether the plan is right. Expected factor:

      - Adam and Muon: the LR cell / how much larger the weights are. At first that is the init cell; later the weights have
        grown, and what training added is taken to be orthogonal to the initial weights and to scale with the LR cell.
      - sphere: the LR cell, since the norms of the weights are constant.
      - SGD: what keeps ``reach``, since its steps scale with the gradient, for which the plan has no cell.
    - ``reach/<role>``: how far the step can change the residual stream (router and unembedding: the logits) for inputs of RMS
      1. It is the RMS of the change x fan-in for matrices (steps of Adam and SGD align with their inputs; sqrt(fan-in) for
      Muon) x the forward multipliers that follow x the number of layers; on the sphere the relative change x residual
      multiplier x layers. Expected factor: the rule's batch and duration factor. That every weight's reach is the same at
      every size is the condition from which width and depth rules are derived (arXiv:2203.03466, arXiv:2310.17813). The
      plan's cells do not enter, so it tells whether they are right.
    - ``rms/attention``, ``rms/ffn`` (branch outputs), ``rms/residual`` (the stream after the last block). Expected factor: 1.
    - ``z/lm_logits``, ``z/attention``, ``z/router``: mean of ``logsumexp(logits)^2``. Expected factor: 1, except that E times as
      many experts raise a router's logsumexp by ln E.
    - ``transfer/loss``: training loss / the base's. Never warned of: a larger model should have a lower loss.
    - ``transfer/worst``: largest ``|log2 ratio|`` of all but the loss.

    Experts are compared with the dense FFN where the base has no experts; what the base lacks altogether (a router) is left
    out, with one note. A step that moves no weight at all (skipped by a GradScaler, or of learning rate 0) gives no updates.
    Each sampled step copies up to ``max_elements`` of each weight; between samples nothing runs. The statistics of all ranks
    are gathered in one collective. Without a logger ratios are still watched.

    Args:
        record: File to write the fingerprint to.
        compare: File with the base's fingerprint.
        every_n_steps: Optimizer steps between two comparisons; None follows ``trainer.log_every_n_steps``.
        points: About how many steps `record` samples.
        band: A ratio outside ``[1 / band, band]`` is off.
        patience: Samples in a row that must be off before it is warned of.
        warmup: Fraction of the run in which nothing is warned of.
        attention: Whether to measure attention logits, at the price of one more attention forward in float32.
        max_elements: Elements of one weight (on one rank) that are measured, evenly spread; 32768 give its RMS to 0.4 %.
        roles: Regular expression on parameter names -> role, where there is no MuECallback and modules declare none.

    Raises:
        TypeError: For an argument that is not a number or an integer.
        ValueError: For a bad argument; before step 0, for a file that cannot be compared with, a parameter without a role,
            or a run of unknown length.
    """

    looks_for = "parameters that train"
    category = "Transfer"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Worst ratio to the base (octaves)": [r"transfer/worst"],
        "Update RMS: ratio to plan x base": [r"transfer/update/.*"],
        "Reach of the updates: ratio to base": [r"transfer/reach/.*"],
        "Activation RMS: ratio to base": [r"transfer/rms/.*"],
        "Z-value: ratio to base": [r"transfer/z/.*"],
        "Loss: ratio to base": [r"transfer/loss"],
    }

    def __init__(
        self,
        record: str | Path | None = None,
        compare: str | Path | None = None,
        every_n_steps: int | None = None,
        *,
        points: int = 32,
        band: float = 2.0,
        patience: int = 5,
        warmup: float = 0.05,
        attention: bool = True,
        max_elements: int = 32768,
        roles: dict[str, str] | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        _check(record, compare, points=points, band=band, patience=patience, warmup=warmup, max_elements=max_elements)
        require_types(TransferMonitor.__init__, locals())
        role_patterns(roles)
        self.record, self.compare, self.points = record, compare, points
        self.band, self.patience, self.warmup = band, patience, warmup
        self.attention, self.max_elements, self.roles = attention, max_elements, roles
        self._points: dict[int, dict[str, float]] = {}
        self._total, self._optimizers, self._grid = 1, 1, set[int]()
        self._base: Fingerprint | None = None
        self._comparison: Comparison | None = None
        self._plan: ScalingPlan | None = None
        self._updates: list[UpdateProbe] = []

    @property
    def state_key(self) -> str:
        """Distinguishes several monitors of one run."""
        return self._generate_state_key(record=str(self.record), compare=str(self.compare))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the base's fingerprint, and makes the folder to record in, before anything is trained."""
        if stage != "fit":
            return
        self._plan = None
        if trainer.global_step == 0:
            self._points = {}
        self._base = None if self.compare is None else Fingerprint.load(self.compare)
        if self.record is not None and trainer.is_global_zero:
            if Path(self.record).is_dir():
                found = f"{str(self.record)!r}, which is a folder"
                raise value_error("record", found=found, expected="a file's name", do="Give e.g. base.json.")
            try:
                Path(self.record).parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=Path(self.record).parent).close()
            except OSError as error:
                found, expected = f"{str(self.record)!r} ({error})", "a file in a folder that can be written to"
                raise value_error("record", found=found, expected=expected, do="Give another path.") from error

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe weights, branches, blocks and logits."""
        assert self._plan is not None
        self._layers, self._loss = Layers(clean_name(name) for name, _ in pl_module.named_parameters()), LossProbe()
        multipliers = forward_multipliers(pl_module, self._mue.multipliers if self._mue is not None else None)
        self._updates = update_probes(pl_module, self._plan, self._layers, multipliers, self.max_elements)
        activations, self._keys = activation_probes(pl_module, self._layers, attention=self.attention)
        return [*self._updates, *activations, self._loss]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the charts; MuECallback may not have made its plan yet."""
        self._probes, self._logged_step = [], None
        if self.compare is not None and trainer.loggers:
            tensorboard_page.register(trainer, self.category, self.charts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what to watch, under the plan that is now in force."""
        self._total, self._optimizers = total_steps(trainer), max(1, len(trainer.optimizers))
        self._grid = sampled_steps(self._total, self.points) if self.record is not None else set()
        self._mue, self._plan = plan_in_force(trainer, pl_module, self.roles)
        self._probes = self.find_probes(pl_module)
        registry_of(trainer).join(self)
        if self._base is not None:
            rule, drawn = (None, True) if self._mue is None else (self._mue.rule, bool(self._mue.initialize))
            expected = Expectation(self._base, self._plan, rule, self._updates, drawn)
            self._comparison = Comparison(self._base, expected, self._layers, self.band, self.patience)
            warn_of_other_base(self._base, self._plan)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the weights of a sampled step as they are; backward is over, so its activations are free by now."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._handles:
            for probe in self._updates:
                probe.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights of a sampled step, gather, record and log."""
        if self._handles:
            for probe in self._updates:
                probe.after_step()
            self._loss.see(outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the fingerprint."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of the fingerprint."""
        super().on_exception(trainer, pl_module, exception)
        self._write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the module."""
        super().teardown(trainer, pl_module, stage)
        self._updates, self._comparison, self._mue = [], None, None

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far, as plain types: a resumed base run goes on recording."""
        return {"points": {step: dict(point) for step, point in self._points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was recorded."""
        self._points = {int(step): dict(point) for step, point in state_dict["points"].items()}

    def _period(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]

    def _samples(self, trainer: Trainer, batch_idx: int) -> bool:
        step, period = trainer.global_step // self._optimizers, self._period(trainer)
        due = step in self._grid or (self._base is not None and period > 0 and (step + 1) % period == 0)
        return due and trainer.global_step != self._logged_step and will_step(trainer, batch_idx)

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Record a sample, or turn it into ratios to the base."""
        step = self._step // self._optimizers
        values = measurements(metrics, self._keys, self._updates)
        if self.record is not None:
            self._points[step] = values
        if self._comparison is None:
            return {}
        progress = min(1.0, (step + 1) / self._total)
        ratios = self._comparison.ratios(values, progress)
        if progress >= self.warmup:
            self._comparison.watch(ratios, at=progress, moved=any(key.startswith("update/") for key in values))
        worst = [octaves(ratio) for key, ratio in ratios.items() if not key.startswith("loss/")]
        tags = {f"transfer/{'loss' if key.startswith('loss/') else key}": ratio for key, ratio in ratios.items()}
        return {**tags, "transfer/worst": max(worst)} if worst else tags

    def _write(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run  # type: ignore[attr-defined]
        recorded = self._updates and self._points and fitting and trainer.is_global_zero
        if self.record is None or self._plan is None or not recorded:
            return
        about = {
            "depths": self._layers.depths,
            "classes": classes_of(self._plan.parameters),
            "rule": f"{self._plan.rule} ({self._plan.family})",
            "axes": self._plan.axes,
        }
        try:
            Fingerprint.of_points(self._total, self._points, **about).save(self.record)
        except OSError as error:  # neither hides the exception that ended the run, nor makes a finished run fail
            rank_zero_warn(f"TransferMonitor: the fingerprint could not be written to {str(self.record)!r}: {error}")
            return
        rank_zero_info(f"TransferMonitor: wrote {len(self._points)} points of {self._total} steps to {self.record}.")


def _check(record: object, compare: object, **numbers: float) -> None:
    if record is None and compare is None:
        do = "Give record='base.json' in the base run, or compare='base.json' in the target run."
        raise value_error("record", found="None, and compare is None too", expected="one of them", do=do)
    for name, minimum in (("points", 2), ("patience", 1), ("max_elements", 1)):
        require_integer(name, numbers[name], minimum)
    require_number("band", numbers["band"])
    if not numbers["band"] > 1:
        raise value_error("band", found=numbers["band"], expected="a ratio above 1", do="2 is usual.")
    require_number("warmup", numbers["warmup"], at_least=0, below=1, do="It is a fraction of the run.")
