"""ActivationOutlierMonitor: scale and tails of every attention and FFN branch output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import Probe, find_modules, first_tensor, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.checks import value_error
from lightning_mue.contract import branch_kind, declared_multipliers
from lightning_mue.diagnostics import activation_summary, merge_summaries, summary_metrics
from lightning_mue.diagnostics.activation import SUMMARY_SIZE

_AFTER = "rms_after_multiplier"
_METRICS = ("rms", "outlier_percent", "max_over_rms", "kurtosis", _AFTER)


class _BranchProbe(Probe):
    """Statistics: those of `activation_summary`, merged exactly over forward calls and ranks."""

    size = SUMMARY_SIZE

    def __init__(self, module: nn.Module, label: str, threshold: float, block: nn.Module | None) -> None:
        super().__init__(module, label)
        self.threshold, self.block = threshold, block

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        x = first_tensor(output)
        return None if x is None or x.ndim == 0 else activation_summary(x, self.threshold)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return merge_summaries(a, b)

    def metrics(self, total: Tensor) -> dict[str, float]:
        if total[0] == 0:
            return {}
        found = {name: float(value) for name, value in summary_metrics(total).items()}
        if self.block is not None:
            found[_AFTER] = found["rms"] * abs(float(getattr(self.block, declared_multipliers(self.block)["residual"])))
        return {f"stability/{name}/{self.label}": value for name, value in found.items()}


class ActivationOutlierMonitor(SampledMonitor):
    """Logs how large and how heavy-tailed the branch outputs are, before they are added to the residual stream.

    A branch is a module with ``mue_branch = "attention"`` or ``"ffn"`` (or any other string), whose ``forward`` returns
    [..., features]. Metrics, for each branch kind and layer ("ffn/03"), over the global batch:

    - ``stability/rms/<branch>/<layer>``: root mean square of the whole tensor (docs/theory.md section 6, as all of these).
    - ``stability/rms_after_multiplier/...``: what is added to the stream, as HyperP's code logs it: RMS times the residual
      multiplier of the block round the branch (the innermost with a ``residual`` in ``mue_multipliers``; else no such tag). The
      other metrics are the same before and after.
    - ``stability/outlier_percent/...``: % of entries over ``threshold`` standard deviations from their token's mean.
    - ``stability/max_over_rms/...`` and ``stability/kurtosis/...``: of the whole tensor.

    Each kind also has ``stability/<metric>/<branch>_mean`` and ``_max`` over layers.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        threshold: Standard deviations beyond which an entry is an outlier.

    Raises:
        ValueError: If ``threshold`` is not positive.
    """

    looks_for = 'modules with mue_branch = "attention" or "ffn"'
    category = "Stability"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Branch output RMS": [rf"stability/(rms|{_AFTER})/.*"],
        "Outliers (%)": [r"stability/outlier_percent/.*"],
        "Max over RMS": [r"stability/max_over_rms/.*"],
        "Kurtosis": [r"stability/kurtosis/.*"],
    }

    def __init__(self, every_n_steps: int | None = None, *, threshold: float = 5.0) -> None:
        super().__init__(every_n_steps)
        if not threshold > 0:
            expected = "a positive number of standard deviations"
            raise value_error("threshold", found=threshold, expected=expected, do="5 is usual.")
        self.threshold = threshold

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every branch, labelled by kind and layer."""
        branches = find_modules(pl_module, lambda m: branch_kind(m) is not None)
        blocks = find_modules(pl_module, lambda m: "residual" in declared_multipliers(m))
        probes: list[Probe] = []
        for kind in sorted({str(branch_kind(module)) for module in branches.values()}):
            modules = {name: module for name, module in branches.items() if branch_kind(module) == kind}
            labels = layer_labels(modules)
            probes += [
                _BranchProbe(m, f"{kind}/{labels[name]}", self.threshold, _block_of(name, blocks))
                for name, m in modules.items()
            ]
        return probes

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Mean and max over the layers of each kind of branch."""
        kinds = sorted({probe.label.partition("/")[0] for probe in self._probes})
        groups = (f"stability/{name}/{kind}" for name in _METRICS for kind in kinds)
        return {tag: value for group in groups for tag, value in over_layers(metrics, group, "mean", "max").items()}


def _block_of(name: str, blocks: Mapping[str, nn.Module]) -> nn.Module | None:
    """The innermost of the blocks that contains the named module, or None."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return blocks[name]
    return None
