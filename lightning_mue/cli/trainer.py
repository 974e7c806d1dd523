"""The Trainer of ``lightning-mue``: Lightning's, with more commands as methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import RenderableType

from lightning_mue.analysis.dry_run.run import dry_run
from lightning_mue.callbacks import MuECallback
from lightning_mue.checks import value_error
from lightning_mue.cli.before_fit import attached, stand_in_optimizers
from lightning_mue.cli.coord_check import check_output, check_sizes, report, training_batches
from lightning_mue.cli.dry_run import check_report, read_run, report_dry_run
from lightning_mue.console import wide_console
from lightning_mue.files import whole_file
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.exporting.export import export_plan
from lightning_mue.parameterizations.planning.compare import compare_rules
from lightning_mue.parameterizations.planning.scaling_plan import headline
from lightning_mue.parameterizations.reading.base import save_base as write_base
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.verifying.verify import own_optimizers, verify_plan


class MuETrainer(Trainer):
    """Lightning's Trainer with the commands ``explain``, ``export-plan``, ``dry-run`` and ``coord-check``."""

    def explain(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        family: Literal["adam", "sgd", "sphere", "muon"] | None = None,
        rules: str | None = None,
        save_base: str | None = None,
        verify: bool = False,
    ) -> None:
        """Prints what the parameterization does to every parameter, without memory for the weights.

        Args:
            model: The module, which may be on ``meta``.
            datamodule: Its data, from which batch size and duration are inferred if the base gives its own.
            family: Optimizer family; by default that of the configured optimizer.
            rules: Rules to compare side by side, e.g. ``sp,mup,complete-p,mssp,complete-mue``.
            verify: Also run base and target for one step, near the base's size, and compare what a sound plan keeps. The exit
                status is 1 if it is not kept.
            save_base: File to which the base's shapes and initialization are written; its path can then be given as ``base``.
        """
        callback = self._callback("explain")
        if callback is None:
            raise _no_callback("explain prints")
        if save_base is not None:
            _save_base(model, callback, save_base)
            wide_console().print(f"base written to {save_base}; give this path as `base` of MuECallback")
        plan = callback.make_plan(model, stand_in_optimizers(model, family, self), self, datamodule)
        wide_console().print(plan if rules is None else _compare(model, callback, plan, rules, family))
        if verify and not _verified(self, model, callback, datamodule):
            raise SystemExit(1)

    def export_plan(
        self,
        model: LightningModule,
        to: Literal["param-groups", "transformers", "torchtitan", "megatron"],
        datamodule: LightningDataModule | None = None,
        output: str | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        """Writes the plan as a Python file that another code base imports: tuned here, trained there.

        Rates, weight decay, eps and betas are those of the config's optimizer times the plan's factors; forward multipliers are
        folded into weights, except for param-groups.

        Args:
            model: The module, which may be on ``meta``.
            to: Where to train: ``param-groups`` (any training loop, with this module's names), ``transformers``, ``torchtitan``
                or ``megatron``.
            datamodule: Its data, from which batch size and duration are inferred if the base gives its own.
            output: The file; by default ``plan_<to>.py``.
            names: Regular expression on names -> place of the weight (docs/export.md), for a module whose names are unknown.
        """
        callback = self._callback("export-plan")
        if callback is None:
            raise _no_callback("export-plan writes")
        optimizers = stand_in_optimizers(model, None, self)
        plan = callback.make_plan(model, optimizers, self, datamodule)
        written = Path(output or f"plan_{to.replace('-', '_')}.py")
        source = export_plan(model, plan, optimizers, to=to, names=names)
        with whole_file(written) as part:
            part.write_text(source, encoding="utf-8")
        wide_console().print(f"{written}: {headline(plan)}", markup=False)

    def dry_run(
        self,
        model: LightningModule,
        world: int,
        datamodule: LightningDataModule | None = None,
        tensor_parallel: int | None = None,
        sequences: int | None = None,
        gib: float | None = None,
        output: str | None = None,
    ) -> None:
        """Prints what a training on many ranks would hold and send, without the ranks and without memory for the weights.

        Memory by rank and kind, collectives and bytes of a step, where each weight is, how even the optimizer's work is
        (docs/large-runs.md). For configs of GPUs give ``--trainer.accelerator cpu`` where there is none.

        Args:
            model: The module, which may be on ``meta``.
            world: Ranks.
            datamodule: Its data, from which the micro-batch is taken.
            tensor_parallel: Ranks that share a batch and divide the experts; by default those of the config's
                ModelParallelStrategy. With a config for one device the model is sharded over all ranks.
            sequences: Sequences in a micro-batch of one rank; by default the ``batch_size`` of the data.
            gib: Memory of one rank in GiB. The exit status is 1 if a rank needs more.
            output: A file, to which all figures are written as JSON.
        """
        check_report(gib, output)
        sizes = {"world": world, "tensor_parallel": tensor_parallel, "sequences": sequences}
        run = read_run(self, model, datamodule, **sizes)  # type: ignore[arg-type]
        roles = {}
        if (callback := self._callback("dry-run")) is not None:
            plan = callback.make_plan(model, stand_in_optimizers(model, None, self), self, datamodule, trains=False)
            roles = {each.name: str(each.role) for each in plan.parameters}
        model.trainer = self
        whole = self.precision_plugin.convert_module(model)
        found = dry_run(whole, run, lambda sharded: stand_in_optimizers(sharded, None, self), roles)
        if not report_dry_run(found, run, gib, output):
            raise SystemExit(1)

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

        Model, data, optimizer and rule are those of the config; the learning rate is constant. Writes coordinates.csv and
        coordinates.png. The exit status is 1 if a slope of log(rms) against log(size) is not within the tolerance.

        Args:
            model: The module, which may be on ``meta``: a new one is built at each size, with its other hyperparameters.
            axis: A hyperparameter of the module and its values, e.g. ``width=64,128,256,512``. Several are varied together;
                the first is the x axis. With ``width``, give ``n_heads=2,4,8,16`` too, otherwise the head dimension grows
                with it. ``n_experts=0,4,8`` goes from dense to MoE.
            datamodule: The source of the batches; by default the module's own ``train_dataloader``.
            seeds: Number of seeds at each size.
            steps: Optimizer steps of each training.
            lr: Learning rate; by default a tenth of the optimizer's own, because the check has no warm-up and too high a
                rate saturates the changes.
            rule: Rule to check; by default that of the config's MuECallback.
            alpha: Depth exponent; by default that of the MuECallback.
            base: Overrides that make the base; by default those of the MuECallback, and if it has none, the first size.
            tolerance: Largest absolute slope that passes.
            output: Folder for coordinates.csv and coordinates.png.
        """
        check_output(output)
        check = check_sizes(
            self,
            model,
            axis,
            datamodule,
            self._callback("coord-check") or MuECallback(),
            base=base,
            rule=rule,
            alpha=alpha,
            lr=lr,
            steps=steps,
            seeds=seeds,
            tolerance=tolerance,
        )
        report(check, output)
        if not check.passed:
            raise SystemExit(1)

    def _callback(self, command: str) -> MuECallback | None:
        """The config's MuECallback.

        Raises:
            ValueError: If there are several.
        """
        found = [c for c in self.callbacks if isinstance(c, MuECallback)]  # type: ignore[attr-defined]
        if len(found) > 1:
            raise value_error("trainer.callbacks", found=f"{len(found)} MuECallbacks", expected=f"one for {command}")
        return found[0] if found else None


# The command's name on the command line is the method's.
setattr(MuETrainer, "coord-check", MuETrainer.coord_check)
setattr(MuETrainer, "export-plan", MuETrainer.export_plan)
setattr(MuETrainer, "dry-run", MuETrainer.dry_run)


def _no_callback(needs: str) -> ValueError:
    expected = f"one, whose parameterization {needs}"
    return value_error(
        "trainer.callbacks", found="no MuECallback", expected=expected, do="Add lightning_mue.callbacks.MuECallback."
    )


def _compare(
    model: LightningModule, callback: MuECallback, plan: ScalingPlan, rules: str, family: Family | None
) -> RenderableType:
    """Compares rules, given as names separated by commas, for the base, axes and overrides of a callback's plan."""
    of_plan: Family | None = None if "+" in plan.family else plan.family  # type: ignore[assignment]  # "muon+adam"
    return compare_rules(
        model,
        [rule.strip() for rule in rules.split(",")],
        family=family or of_plan,
        base=callback.base,
        alpha=callback.alpha,
        tokens=plan.axes.get("tokens"),
        batch_tokens=plan.axes.get("batch_tokens"),
        roles=callback.roles,
        multipliers=callback.multipliers,
    )


def _verified(
    trainer: Trainer, model: LightningModule, callback: MuECallback, datamodule: LightningDataModule | None
) -> bool:
    """Verifies a callback's plan on a training batch, and prints the outcome."""

    def optimizer(made: Any) -> Any:
        with attached(made, trainer):
            return own_optimizers(made)

    found = verify_plan(
        model,
        next(iter(training_batches(trainer, model, datamodule))),
        base=callback.base or {},
        rule=callback.rule,
        optimizer=optimizer,
        alpha=callback.alpha,
        roles=callback.roles,
        multipliers=callback.multipliers,
    )
    wide_console().print(str(found), markup=False, highlight=False)
    return found.passed


def _save_base(model: LightningModule, callback: MuECallback, path: str) -> None:
    """Writes the shapes and initialization of a callback's base to a file."""
    # A module on meta has no values to measure; the overrides {} build it again with real ones.
    base = callback.base if callback.base is not None else {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_base(model, path, base=base, roles=callback.roles, multipliers=callback.multipliers)
