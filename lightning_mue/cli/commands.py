"""What ``lightning-mue`` does beside training: ``explain`` and ``coord-check``, as methods of its Trainer."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from lightning_mue.analysis import coordinate_check
from lightning_mue.analysis.training import flatten_optimizers
from lightning_mue.callbacks import MuECallback
from lightning_mue.console import wide_console
from lightning_mue.parameterizations.planning.compare import compare_rules
from lightning_mue.parameterizations.reading.base import RUN_KEYS, build_base
from lightning_mue.parameterizations.reading.base_record import save_base as write_base
from lightning_mue.parameterizations.rules.kinds import Family


class MuETrainer(Trainer):
    """Lightning's Trainer with the commands that are no ordinary training."""

    def explain(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        family: Literal["adam", "sgd", "sphere", "muon"] | None = None,
        rules: str | None = None,
        save_base: str | None = None,
    ) -> None:
        """Prints what the parameterization does to every parameter, on the meta device.

        Args:
            model: The module, which may be on ``meta``.
            datamodule: Its data, from which batch size and duration are inferred where the base holds its own.
            family: Optimizer family to explain for; by default that of the configured optimizer.
            rules: Rules to compare side by side, e.g. ``sp,mup,complete-p,mssp,complete-mue``.
            save_base: File to which the base's shapes and initialization are written; it can then stand as ``base``.
        """
        callback = self._callback("explain")
        if callback is None:
            raise ValueError(
                "explain: trainer.callbacks holds no MuECallback, so there is no parameterization to explain. Add "
                "lightning_mue.callbacks.MuECallback to it."
            )
        if save_base is not None:
            # A module on meta has no values to measure: {} makes it again with real ones.
            base = callback.base if callback.base is not None else {}
            Path(save_base).parent.mkdir(parents=True, exist_ok=True)
            write_base(model, save_base, base=base, roles=callback.roles, multipliers=callback.multipliers)
            wide_console().print(f"base written to {save_base}: give its path as `base` of MuECallback")
        made = callback.make_plan(model, _optimizers(model, family), self, datamodule)
        if rules is None:
            wide_console().print(made)
            return
        comparison = compare_rules(
            model,
            [rule.strip() for rule in rules.split(",")],
            family=family or _single(made.family),
            base=callback.base,
            alpha=callback.alpha,
            tokens=made.axes.get("tokens"),
            batch_tokens=made.axes.get("batch_tokens"),
            roles=callback.roles,
            multipliers=callback.multipliers,
        )
        wide_console().print(comparison)

    def coord_check(
        self,
        model: LightningModule,
        axis: list[str],
        datamodule: LightningDataModule | None = None,
        seeds: int = 3,
        steps: int = 5,
        lr: float | None = None,
        rule: str | None = None,
        alpha: float | None = None,
        base: dict[str, Any] | None = None,
        tolerance: float = 0.15,
        output: str = ".",
    ) -> None:
        """Checks that every layer's update keeps its size when the model grows: trains a few steps at each size.

        Model, data, optimizer and rule are those of the config, but no schedule. Writes coordinates.csv and
        coordinates.png. The exit status is 1 if a slope of log(rms) against log(size) is not within the tolerance.

        Args:
            model: The module, which may be on ``meta``: it is made anew at each size, with its other hyperparameters.
            axis: A hyperparameter of the module and its values, e.g. ``width=64,128,256,512``. Give it several times to vary
                several together; the first is the x axis. With ``width``, give ``n_heads=2,4,8,16`` too, or the head dimension
                grows with it. ``n_experts=0,4,8`` goes from dense to MoE.
            datamodule: Where batches come from; by default the module's own ``train_dataloader``.
            seeds: Number of seeds at each size.
            steps: Optimizer steps of each training.
            lr: Learning rate; by default a tenth of the optimizer's own, because the check has no warm-up and a rate that
                needs one saturates the changes.
            rule: Rule to check; by default that of the config's MuECallback.
            alpha: Depth exponent; by default the MuECallback's.
            base: Overrides that make the base; by default the MuECallback's, and if it has none, the first size.
            tolerance: Largest absolute slope that passes.
            output: Folder for coordinates.csv and coordinates.png.
        """
        callback = self._callback("coord-check") or MuECallback()
        sizes = _parse_axes(axis)
        # Batch and duration stay the base's at every size.
        chosen: Any = callback.base if base is None else base
        if isinstance(chosen, dict):
            chosen = {key: value for key, value in chosen.items() if key not in RUN_KEYS} or None
            chosen = None if chosen is None else build_base(model, chosen)
        elif chosen is not None and not isinstance(chosen, (str, Path)):
            chosen = build_base(model, chosen)
        factory = getattr(model, "optimizer", None)
        with Console(stderr=True).status("coordinate check") as status:
            check = coordinate_check(
                partial(_at_size, model),
                sizes,
                self._batches(model, datamodule),
                rule=callback.rule if rule is None else rule,
                base=chosen,
                optimizer=factory if callable(factory) and not isinstance(factory, Optimizer) else None,
                lr=lr,
                lr_factor=0.1 if lr is None else 1.0,
                steps=steps,
                seeds=seeds,
                tolerance=tolerance,
                trainer_options={
                    "accelerator": "cpu" if self.strategy.root_device.type == "cpu" else "auto",
                    "gradient_clip_val": self.gradient_clip_val,
                    "gradient_clip_algorithm": self.gradient_clip_algorithm,
                },
                on_run=lambda run: status.update(f"coordinate check: {run}"),
                alpha=callback.alpha if alpha is None else alpha,
                roles=callback.roles,
                multipliers=callback.multipliers,
                preset=callback.preset,
            )
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        check.to_csv(folder / "coordinates.csv")
        wide_console().print(check)
        try:
            check.plot(folder / "coordinates.png")
        except ModuleNotFoundError as error:
            wide_console().print(f"note: coordinates.png was not drawn. {error}")
        if not check.passed:
            raise SystemExit(1)

    def _callback(self, command: str) -> MuECallback | None:
        """The config's MuECallback.

        Raises:
            ValueError: If there are several.
        """
        found = [c for c in self.callbacks if isinstance(c, MuECallback)]  # type: ignore[attr-defined]
        if len(found) > 1:
            raise ValueError(f"{command}: trainer.callbacks holds {len(found)} MuECallbacks, expected one.")
        return found[0] if found else None

    def _batches(self, model: LightningModule, datamodule: LightningDataModule | None) -> Iterable[Any]:
        """The training batches, from the datamodule or the module itself, made ready as ``fit`` does."""
        source: Any = datamodule
        if datamodule is None:
            if not is_overridden("train_dataloader", model):
                raise ValueError(
                    f"coord-check: there is no data; the config has no `data`, and {type(model).__name__} has no "
                    "train_dataloader."
                )
            source = model
        self.strategy.connect(model)  # a datamodule may ask the trainer for its module
        source.trainer = self
        source.prepare_data()
        source.setup("fit")
        loader: Iterable[Any] = source.train_dataloader()
        return loader


# The command's name on the command line is the method's.
setattr(MuETrainer, "coord-check", MuETrainer.coord_check)


def _parse_axes(axes: Sequence[str]) -> list[dict[str, Any]]:
    """The sizes that ``["width=64,128", "n_heads=2,4"]`` stands for: ``[{"width": 64, "n_heads": 2}, ...]``."""
    values: dict[str, list[Any]] = {}
    for axis in axes:
        name, equals, listed = axis.partition("=")
        if not equals or not name or not listed:
            raise ValueError(
                f"--axis: found {axis!r}, expected name=value,value,..., e.g. --axis width=64,128,256,512."
            )
        if name in values:
            raise ValueError(f"--axis: {name} is given twice. Give all of its values at once.")
        values[name] = [yaml.safe_load(value) for value in listed.split(",")]
    lengths = {name: len(listed) for name, listed in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"--axis: axes that vary together need equally many values; found {', '.join(f'{k}: {n}' for k, n in lengths.items())}."
        )
    if min(lengths.values(), default=0) < 2:
        raise ValueError(f"--axis: found {' '.join(axes) or 'none'}, expected at least two sizes; better are four.")
    return [dict(zip(values, size, strict=True)) for size in zip(*values.values(), strict=True)]


def _at_size(model: LightningModule, **size: Any) -> nn.Module:
    """The module with other hyperparameters."""
    try:
        return build_base(model, size)
    except (ValueError, TypeError, ArgumentError) as error:
        reason: BaseException = error
        while (deeper := reason.__cause__ or reason.__context__) is not None:
            reason = deeper  # the configuration parser wraps what the module said in a page of its own
        what = ", ".join(f"{name}={value}" for name, value in size.items())
        raise ValueError(
            f"--axis: no {type(model).__name__} with {what}. {str(reason).removeprefix('base.')}"
        ) from error


def _single(family: str) -> Family | None:
    """The family of a plan; None where it has several (``"muon+adam"``)."""
    return None if "+" in family else family  # type: ignore[return-value]


def _optimizers(model: LightningModule, family: Family | None) -> list[Optimizer]:
    """The module's optimizers without a run: only their family counts."""
    if family is not None:
        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        stand_in.mue_family = family  # type: ignore[attr-defined]
        return [stand_in]
    factory = getattr(model, "optimizer", None)
    if callable(factory):
        return [factory(list(model.named_parameters()))]
    try:
        configured = model.configure_optimizers()
    except Exception as error:
        raise ValueError(
            f"explain: {type(model).__name__}.configure_optimizers cannot run without a trainer ({error}). Name the optimizer's "
            "family: --family adam, sgd, sphere or muon."
        ) from error
    return flatten_optimizers(configured)
