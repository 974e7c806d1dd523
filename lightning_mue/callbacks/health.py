"""HealthMonitor: the verdict on a run while it goes on, as a card, on the terminal and as pictures."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.callbacks import metric_stream, tensorboard_page
from lightning_mue.callbacks.mue.callback import MuECallback
from lightning_mue.callbacks.showing import folder_of, show_image, show_text, shows_images
from lightning_mue.callbacks.steps import steps_done
from lightning_mue.checks import mismatch, require_types, type_error
from lightning_mue.files import whole_file
from lightning_mue.health.card import as_markdown, headline, look, sentence
from lightning_mue.health.departures import LEAST_HISTORY
from lightning_mue.health.indicators import indicator_of
from lightning_mue.health.judging import Health, RunJudge
from lightning_mue.health.losses import is_loss
from lightning_mue.health.pictures import as_pixels, heat_map, layered
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import series_of
from lightning_mue.namespaces import is_lightning

_log = logging.getLogger(__name__)
#: Samples of one layer that are kept for the pictures; older ones are thinned.
_KEPT = 512


class HealthMonitor(Callback):
    """Judges the metrics of the other monitors and the losses that the module logs, and answers "is this run healthy?".

    The verdicts: *not known yet* (fewer than 20 samples); *healthy*; *watch* (an indicator left its range: it is far from its own
    recent history or from healthy runs, or beyond a limit); *act* (a value that is not finite, or beyond a second limit). Each
    symptom names indicator, role, layer, step, what was expected and what to do. It judges the metrics of `LogitsZMonitor`,
    `ActivationOutlierMonitor`, `RouterMonitor`, `UpdateMonitor`, `TransferMonitor` and `StabilityGuard` where they are in the
    Trainer, and training losses.

    It writes

    - one warning for each indicator;
    - the card: in TensorBoard's TEXT tab and W&B as ``health``, and as a Markdown file of that name in the loggers' folders;
    - heat maps (layer x step) of every indicator by layer, in TensorBoard's IMAGES tab and W&B;
    - hyperparameters with the last losses, in TensorBoard's HPARAMS tab, in place of Lightning's ``hp_metric``.

    Args:
        losses: Tags of further training losses; those called ``loss``, ``train_loss``, ``train/loss`` and the like are known.
        heat_maps: Whether to draw heat maps.
        reference: Folders of healthy runs, such as that of the tuned base: what a logger wrote, or folders of such folders. The run
            is compared with them at the same part of its length.

    Raises:
        TypeError: If ``losses`` is not a list of strings, or ``reference`` not one of paths.
        ValueError: When fitting begins, if a folder of ``reference`` holds no run, or only this one.
    """

    def __init__(
        self, losses: Sequence[str] = (), *, heat_maps: bool = True, reference: Sequence[str | Path] = ()
    ) -> None:
        if (
            isinstance(losses, str)
            or not isinstance(losses, Sequence)
            or not all(isinstance(tag, str) for tag in losses)
        ):
            raise type_error("losses", found=losses, expected="a list of tags", do='For example ["my_objective"].')
        if isinstance(reference, (str, Path)) or not all(isinstance(path, (str, Path)) for path in reference):
            do = 'For example ["logs/base/version_0"].'
            raise type_error("reference", found=reference, expected="a list of folders", do=do)
        require_types(HealthMonitor.__init__, locals())
        self.losses, self.reference = tuple(losses), tuple(reference)
        self.heat_maps = heat_maps
        self._restored = False  # from a checkpoint, for the fit that begins
        self._healthy: Reference | None = None
        self._forget()

    def _forget(self) -> None:
        """Knows nothing yet of the run."""
        self._judge = RunJudge(self.losses, self._healthy)
        self._layers: dict[str, list[tuple[int, float]]] = {}
        self._show_at, self._told = 1, ""
        self._taken_at = 0  # optimizer steps at the last sample of the module's own metrics
        self._warned: set[str] = set()
        self._heard: set[str] = set()  # tags that monitors tell, which the Trainer knows too

    @property
    def verdict(self) -> Health:
        """The verdict so far; of rank zero, which alone sees the metrics."""
        return self._judge.verdict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps Lightning from writing ``hp_metric`` = -1 as the one column of the HPARAMS tab: the first columns stay."""
        for logger in trainer.loggers if stage == "fit" else ():
            if is_lightning(logger, "TensorBoardLogger"):
                logger._default_hp_metric = False  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to the monitors; leaves the pictures out, with a warning, where they could not be drawn."""
        if self.heat_maps and find_spec("matplotlib") is None:
            self.heat_maps = False
            found, do = "no matplotlib", "There are none now. pip install matplotlib, or set heat_maps=False."
            rank_zero_warn(mismatch("HealthMonitor.heat_maps", found=found, expected="it, to draw with", do=do))
        if not trainer.loggers:
            expected, do = (
                "one, without which monitors measure nothing",
                "Only losses are judged now. Use, say, CSVLogger.",
            )
            rank_zero_warn(mismatch("Trainer.logger", found="no logger", expected=expected, do=do))
        if trainer.is_global_zero:
            own = [folder for logger in trainer.loggers if isinstance(folder := getattr(logger, "log_dir", None), str)]
            self._healthy = Reference.read(self.reference, _steps_of(trainer), own) if self.reference else None
            self._judge.reference = self._healthy
            metric_stream.listen(trainer, self, lambda step, metrics: self._hear(trainer, step, metrics))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count where a resumed run does; a run from step 0 on is judged by nothing that an earlier one showed."""
        if not (self._restored or steps_done(trainer)):
            self._forget()
        self._restored, self._taken_at = False, steps_done(trainer)
        if trainer.is_global_zero:
            _write_hyperparameters(trainer, pl_module, ended=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the losses that the module logs, when the Trainer logs: once a step, however many batches it has."""
        done, every = steps_done(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]  # by a connector
        if trainer.is_global_zero and every and done // every > self._taken_at // every:
            self._taken_at = done
            self._take(trainer, trainer.global_step - max(1, len(trainer.optimizers)), self._logged(trainer))
            tensorboard_page.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last card and pictures, and the hyperparameters."""
        if trainer.is_global_zero:
            self._show(trainer, max(trainer.global_step - 1, 0))
            self._draw(trainer, max(trainer.global_step - 1, 0))
            _write_hyperparameters(trainer, pl_module, ended=True)
            _log.info("HealthMonitor: %s", self.told)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves card and hyperparameters as they stand when the run breaks."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._show(trainer, max(trainer.global_step - 1, 0))
            _write_hyperparameters(trainer, pl_module, ended=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens no more."""
        metric_stream.forget(trainer, self)

    def state_dict(self) -> dict[str, Any]:
        """The judge's memory, so that a resumed run is judged as an undisturbed one."""
        return {"judge": self._judge.state_dict(), "layers": self._layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._restored = True
        self._judge.load_state_dict(state_dict["judge"])
        self._layers = {tag: [tuple(point) for point in points] for tag, points in state_dict["layers"].items()}  # type: ignore[misc]

    @property
    def told(self) -> str:
        """The verdict in one line."""
        return f"{look(self.verdict)[0]}. {headline(self.verdict)}"

    def _logged(self, trainer: Trainer) -> dict[str, float]:
        """Losses and gradient norms among the Trainer's metrics, by one copy from the device."""
        known = {
            tag: value.detach().float().reshape(())
            for tag, value in trainer.callback_metrics.items()
            if tag not in self._heard
            and (is_loss(tag) or tag in self.losses or _is_gradient(tag))
            and value.numel() == 1
        }
        values = torch.stack(list(known.values())).tolist() if known else []
        return dict(zip(known, values, strict=True))

    def _hear(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        self._heard.update(metrics)
        self._take(trainer, step, metrics)

    def _take(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        symptoms = self._judge.add(step, metrics)
        for tag, value in metrics.items():
            if self.heat_maps and re.search(r"/\d+$", tag) and indicator_of(tag):
                points = self._layers.setdefault(tag, [])
                points.append((step, float(value)))
                if len(points) > _KEPT:
                    del points[: _KEPT // 2 : 2]
        for group in self.verdict.groups if symptoms else ():
            if group.first.indicator.name not in self._warned:
                self._warned.add(group.first.indicator.name)
                rank_zero_warn(f"HealthMonitor: {sentence(group)}. {group.first.indicator.do}")
        # With the first sample, when there is evidence, and whenever the samples have doubled: the cost stays small in any run.
        due = (samples := self.verdict.samples) >= self._show_at
        if due or symptoms:
            self._show(trainer, step)
        if due:
            self._show_at = max(LEAST_HISTORY, 2 * samples)
        if due and samples >= LEAST_HISTORY:
            self._draw(trainer, step)

    def _show(self, trainer: Trainer, step: int) -> None:
        card = as_markdown(self.verdict)
        if card == self._told:
            return
        self._told = card
        for logger in trainer.loggers:
            show_text(logger, "health", card, step)
            if (folder := folder_of(logger)) is not None:
                _write(folder / "health.md", card)

    def _draw(self, trainer: Trainer, step: int) -> None:
        pages = [logger for logger in trainer.loggers if shows_images(logger)]
        if not pages or not self.heat_maps:
            return
        run = {tag: series_of(points) for tag, points in self._layers.items()}
        for group, layers in layered(run).items():
            pixels = as_pixels(heat_map(group, layers))
            for logger in pages:
                show_image(logger, f"layers/{group}", pixels, step)


def _steps_of(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _is_gradient(tag: str) -> bool:
    found = indicator_of(tag)
    return found is not None and found[0].name == "gradient norm"


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; a folder that cannot be written to is no reason to stop a run."""
    try:
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        rank_zero_warn(f"HealthMonitor: {path} was not written ({error}). The run goes on.")


def _hyperparameters(trainer: Trainer, model: LightningModule) -> dict[str, Any]:
    """The module's own scalars, rule, base and learning rates; TensorBoard's page begins with five of them, capitals first."""
    parameters: dict[str, Any] = {
        name: value
        for name, value in model.hparams.items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    }
    plan = next((c.plan for c in trainer.callbacks if isinstance(c, MuECallback)), None)  # type: ignore[attr-defined]
    if plan is not None:
        base = ", ".join(f"{axis}={size:g}" for axis, size in plan.base_axes.items())
        parameters |= {"MuE/rule": plan.rule, "MuE/base": base}
    for i, optimizer in enumerate(trainer.optimizers):
        name = "MuE/lr" if len(trainer.optimizers) == 1 else f"MuE/lr-{i}"
        parameters[name] = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    return parameters


def _write_hyperparameters(trainer: Trainer, model: LightningModule, *, ended: bool) -> None:
    """Gives them to TensorBoard, which shows them beside the losses as last logged, and to W&B.

    The values are written when the run begins, TensorBoard's columns when it has ended and all tags are known. All runs of a page
    share the columns of the one that it finds first.
    """
    parameters = _hyperparameters(trainer, model)
    shown = [tag for tag in trainer.logged_metrics if is_loss(tag) or "bits_per_byte" in tag or tag == "hp_metric"]
    for logger in trainer.loggers:
        if is_lightning(logger, "WandbLogger") and not ended:
            logger.log_hyperparams(parameters)
        if is_lightning(logger, "TensorBoardLogger"):
            start = f"{logger._prefix}-" if logger._prefix else ""  # type: ignore[attr-defined]
            package = type(logger.experiment).__module__.rpartition(".")[0]  # type: ignore[attr-defined]  # torch's or tensorboardX
            hparams = import_module(f"{package}.summary").hparams
            columns, values, end = hparams(parameters, {f"{start}{tag}": 0.0 for tag in shown})
            for summary in (columns, end) if ended else (values,):
                logger.experiment._get_file_writer().add_summary(summary)  # type: ignore[attr-defined]
