"""UpdateMonitor: what each optimizer step does to the weights, by role and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_mue.callbacks.monitors.probes import Layers, Probe, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.updates.noise import NoiseProbe, why_no_noise
from lightning_mue.callbacks.monitors.updates.recording import StepRecorder
from lightning_mue.callbacks.monitors.updates.weights import OTHER, SETTINGS, RoleProbe, role_probes
from lightning_mue.callbacks.mue.callback import MuECallback
from lightning_mue.checks import require_integer, require_types
from lightning_mue.parameterizations.planning.model_roles import read_parameters
from lightning_mue.parameterizations.reading.parameters import role_patterns

#: Metrics of a role in a layer, each with ``_mean`` and ``_max`` over the role's layers.
METRICS = ("update_ratio", "angular_step", "weight_rms", "gradient_rms", "gradient_norm", "eps_share", *SETTINGS)


class UpdateMonitor(SampledMonitor):
    """Logs how far each optimizer step moves the weights, and with which settings, by role and layer (docs/theory.md section 6).

    Works for any module: roles are read as for a plan (those of MuECallback's plan, where it stands before this callback), and
    parameters without one are called ``other``. Metrics for each role and layer (``updates/<metric>/<role>/<layer>``; outside of
    the numbered layers the module's name):

    - ``update_ratio``: ``rms(W_{t+1} - W_t) / rms(W_t)``. ``angular_step``: angle between the two, in radians.
    - ``weight_rms``: before the step. ``gradient_rms``, ``gradient_norm``: unscaled and before Lightning's clipping, of the whole
      batch. ``updates/gradient_norm/all`` is the norm over all roles.
    - ``lr``, ``weight_decay``, ``eps``: with which the weights were updated: after schedulers, and with MuECallback's factors.
    - ``eps_share``: share of entries whose Adam eps is above the root of their second moment, so that it halves their step.

    Over the layers of a role: ``updates/<metric>/<role>_mean`` and ``_max``. And ``updates/gradient_noise_scale/<role>`` and
    ``/all``: the batch size, in samples, up to which more samples pay off (simple noise scale, arXiv:1812.06162), averaged over
    about the last 20 samples. It compares a micro-batch with the whole batch, so it needs accumulation (automatic optimization) or
    several ranks under DDP; else a note says that it is left out. Weights shared out over ranks (FSDP2) need accumulation.

    Several optimizers, wrappers, manual optimization (through ``self.optimizers()``) and FSDP2 are followed; of an optimizer that
    steps several times a batch the first step counts. A step that a GradScaler skips has gradients, but no update. In a sampled
    step up to ``max_elements`` of each role's weights in a layer are copied, evenly spread; otherwise nothing runs.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        max_elements: Elements of a role's weights in one layer, on one rank, that are measured, evenly spread; 32768 give their
            RMS to 0.4 %.
        roles: Regular expression on parameter names -> role, before what is read.
        detail: "full" logs every layer, "brief" what is over layers and the worst layer; None: brief above 16 layers.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, or ``detail`` is something else; when fitting begins, for a pattern or role that
            is unknown.
    """

    looks_for = "parameters"
    category = "Updates"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Update / weight RMS (mean over layers)": [r"updates/update_ratio/[^/]+_mean"],
        "Update / weight RMS (largest layer)": [r"updates/update_ratio/[^/]+_max"],
        "Angular step (mean over layers, rad)": [r"updates/angular_step/[^/]+_mean"],
        "Gradient norm": [r"updates/gradient_norm/all"],
        "Gradient RMS (largest layer)": [r"updates/gradient_rms/[^/]+_max"],
        "Weight RMS (mean over layers)": [r"updates/weight_rms/[^/]+_mean"],
        "Learning rate in force": [r"updates/lr/[^/]+_mean"],
        "Share of entries that Adam's eps slows down": [r"updates/eps_share/[^/]+_max"],
        "Gradient noise scale (samples)": [r"updates/gradient_noise_scale/.*"],
    }

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        max_elements: int = 32768,
        roles: dict[str, str] | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        require_integer("max_elements", max_elements, 1)
        require_types(UpdateMonitor.__init__, locals())
        role_patterns(roles)
        self.max_elements, self.roles = max_elements, roles
        self._weights: list[RoleProbe] = []
        self._recorder: StepRecorder | None = None
        self._noise: NoiseProbe | None = None
        self._sums: dict[str, list[float]] = {}

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe the weights of every role in every layer."""
        trainer = pl_module.trainer
        self._weights = role_probes(pl_module, self._read_roles(pl_module), self.max_elements, trainer.world_size)
        self._recorder, self._noise = StepRecorder(self._weights), NoiseProbe(self._weights)
        self._noise.sums = self._sums
        return [*self._weights, self._noise, self._recorder] if self._weights else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why there is no gradient noise scale, and warn of optimizers that hold none of the module's parameters."""
        super().on_train_start(trainer, pl_module)
        if not self._weights or not trainer.loggers:
            return
        if note := why_no_noise(trainer, pl_module, self._weights):
            rank_zero_info(note)
        known = {weight for probe in self._weights for weight in probe.weights}
        if trainer.optimizers and not any(
            p in known for o in trainer.optimizers for g in o.param_groups for p in g["params"]
        ):
            message = (
                "will log no update: no optimizer holds a parameter of the module, which trains nothing. Make the optimizers after "
                "configure_model, in configure_optimizers."
            )
            self._warn("strange", message)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach the probes of a step that will be logged."""
        if self._noise is not None and self._probes and self._samples(trainer, batch_idx):
            self._noise.prepare(trainer, pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients of a sampled step and keep its weights; backward is over, so its activations are free by now."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._recorder is not None and self._recorder.active and self._noise is not None:
            self._noise.see(self._recorder.begin(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather and log; warn of optimizers that step behind Lightning's back."""
        if self._recorder is not None and self._recorder.active and not self._recorder.seen:
            message = (
                "saw no optimizer step in a batch that it samples. Under manual optimization it sees steps of the optimizers that "
                "self.optimizers() returns."
            )
            self._warn("unseen", message)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the weights."""
        super().teardown(trainer, pl_module, stage)
        self._weights, self._recorder, self._noise = [], None, None

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Mean and max over each role's layers, and the norm of all gradients."""
        found: dict[str, float] = {}
        roles = dict.fromkeys(probe.role for probe in self._weights)
        for role in roles:
            for name in METRICS:
                found |= over_layers(layers, f"updates/{name}/{role}", "mean", "max")
        norms = [norm for role in roles for norm in layers.get(f"updates/gradient_norm/{role}", {}).values()]
        return {**found, "updates/gradient_norm/all": math.hypot(*norms)} if norms else found

    def state_dict(self) -> dict[str, Any]:
        """The running sums of the gradient noise scale."""
        return {"noise": {role: list(sums) for role, sums in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._sums.update({role: list(sums) for role, sums in state_dict["noise"].items()})

    def _read_roles(self, pl_module: LightningModule) -> dict[str, str]:
        callbacks: list[Any] = pl_module.trainer.callbacks  # type: ignore[attr-defined]  # set through a connector
        mue = next((callback for callback in callbacks if isinstance(callback, MuECallback)), None)
        if mue is not None and mue.plan is not None and self.roles is None:
            return {entry.name: entry.role for entry in mue.plan.parameters}
        patterns = {**(self.roles or {}), **((mue.roles or {}) if mue is not None else {})}
        infos = read_parameters(pl_module, patterns)
        return {info.name: str(info.role) if info.role is not None else OTHER for info in infos}
