"""ActivationOutlierMonitor: scale and tails of every residual branch's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.finding.branches import find_branches
from lightning_mue.callbacks.monitors.finding.reading import read
from lightning_mue.callbacks.monitors.probes import Layers, Probe, first_tensor, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.seeing.padding import PaddingMask
from lightning_mue.callbacks.monitors.seeing.watching import Handles
from lightning_mue.checks import require_pattern, require_types, value_error
from lightning_mue.contract import declared_multipliers
from lightning_mue.diagnostics import activation_summary, merge_summaries, summary_metrics
from lightning_mue.diagnostics.activation import SUMMARY_SIZE
from lightning_mue.diagnostics.channels import (
    CHANNELS_SIZE,
    channel_metrics,
    channel_summary,
    massive_channels,
    merge_channels,
)

_AFTER = "rms_after_multiplier"
_METRICS = ("rms", "outlier_percent", "max_over_rms", "kurtosis", _AFTER)
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


class _BranchProbe(Probe):
    """Statistics: those of `activation_summary` and of `channel_summary`, merged exactly over forward calls and ranks."""

    size = SUMMARY_SIZE + CHANNELS_SIZE

    def __init__(
        self, module: nn.Module, label: str, threshold: float, block: nn.Module | None, padding: PaddingMask
    ) -> None:
        super().__init__(module, label)
        self.threshold, self.block, self._padding = threshold, block, padding
        self.massive: list[int] = []  # of the last sample

    def attach(self, device: torch.device) -> Any:
        """Hook the module and forget the previous step."""
        return Handles(super().attach(device), self._padding.attach())

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        x = first_tensor(output)
        if x is None or x.ndim == 0:
            return None
        if isinstance(self.module, _CHANNELS_SECOND) and x.ndim > 2:
            x = x.movedim(1, -1)
        real = self._padding.real(x.shape[:-1].numel(), x.shape[:-1])
        return torch.cat([activation_summary(x, self.threshold, real), channel_summary(x, real)])

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        n = SUMMARY_SIZE
        return torch.cat([merge_summaries(a[:n], b[:n]), merge_channels(a[n:], b[n:])])

    def metrics(self, total: Tensor) -> dict[str, float]:
        if total[0] == 0:
            return {}
        summary, channels = total[:SUMMARY_SIZE], total[SUMMARY_SIZE:]
        found = {
            name: float(value) for name, value in {**summary_metrics(summary), **channel_metrics(channels)}.items()
        }
        self.massive = massive_channels(channels)
        if self.block is not None:
            found[_AFTER] = found["rms"] * abs(float(getattr(self.block, _residual_of(self.block))))
        return {f"stability/{name}/{self.label}": value for name, value in found.items()}


class ActivationOutlierMonitor(SampledMonitor):
    """Logs how large and how heavy-tailed the branch outputs are, before they are added to the residual stream.

    A branch is a module with ``mue_branch = "attention"`` or ``"ffn"`` (or any other string), whose ``forward`` returns
    [..., features]; or, on any model, the module that the roles of the parameters show to end a residual branch: an output
    projection, a down projection, an MoE block, the norm behind one of them, ``nn.MultiheadAttention`` (docs/monitors.md).
    Metrics, for each branch kind and layer ("ffn/03"), over the global batch:

    - ``stability/rms/<branch>/<layer>``: root mean square of the whole tensor (docs/theory.md section 6, as all of these).
    - ``stability/rms_after_multiplier/...``: what is added to the stream, as HyperP's code logs it: RMS times the residual
      multiplier of the block round the branch (the innermost with a ``residual`` in ``mue_multipliers``; else no such tag). The
      other metrics are the same before and after.
    - ``stability/outlier_percent/...``: % of entries over ``threshold`` standard deviations from their token's mean.
    - ``stability/max_over_rms/...`` and ``stability/kurtosis/...``: of the whole tensor.
    - ``stability/massive_channels/...``: channels (at most 8 are counted) with an entry above 100 times the mean magnitude, and
      ``stability/largest_channel/...``: the index of the channel with the largest entry.

    Each kind also has ``stability/<metric>/<branch>_mean`` and ``_max`` over layers, of massive channels ``_max`` only.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        threshold: Standard deviations beyond which an entry is an outlier.
        branches: Regular expression on whole names of modules whose output is a branch's, besides those that are found; or kind
            ("attention", "ffn", another) -> regular expression.
        detail: See `SampledMonitor`.

    Raises:
        ValueError: If ``threshold`` is not positive; when fitting begins, if an expression matches no module.
    """

    looks_for = 'modules with mue_branch = "attention" or "ffn", or the ends of residual branches in numbered layers'
    worst = r"stability/(rms|outlier_percent|kurtosis|massive_channels)/.*_max"
    category = "Stability"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Branch output RMS": [r"stability/rms/[^/]+_(mean|max)"],
        "Branch output RMS after the multiplier": [rf"stability/{_AFTER}/[^/]+_(mean|max)"],
        "Branch output RMS by layer": [r"stability/rms/[^/]+/.*"],
        "Outliers (%)": [r"stability/outlier_percent/[^/]+_(mean|max)"],
        "Max over RMS": [r"stability/max_over_rms/[^/]+_(mean|max)"],
        "Kurtosis": [r"stability/kurtosis/[^/]+_(mean|max)"],
        "Massive channels": [r"stability/massive_channels/[^/]+_max"],
    }

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        threshold: float = 5.0,
        branches: str | Mapping[str, str] | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        require_types(ActivationOutlierMonitor.__init__, locals())
        for pattern in [branches] if isinstance(branches, str) else (branches or {}).values():
            require_pattern("branches", pattern)
        if not threshold > 0:
            expected = "a positive number of standard deviations"
            raise value_error("threshold", found=threshold, expected=expected, do="5 is usual.")
        self.threshold, self.branches = threshold, branches

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every branch, labelled by kind and layer."""
        reading = read(pl_module)
        branches = find_branches(reading, self.branches)
        self.findings = {"residual branches": branches}
        padding = PaddingMask(pl_module)
        blocks = {name: m for name, m in reading.modules.items() if _residual_of(m)}
        probes: list[Probe] = []
        for kind in sorted({each.kind for each in branches.found}):
            modules = {each.name: each.module for each in branches.found if each.kind == kind}
            labels = layer_labels(modules)
            probes += [
                _BranchProbe(m, f"{kind}/{labels[name]}", self.threshold, _block_of(name, blocks), padding)
                for name, m in modules.items()
            ]
        return probes

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Mean and max over the layers of each kind of branch."""
        found: dict[str, float] = {}
        for kind in sorted({probe.label.partition("/")[0] for probe in self._probes}):
            for name in _METRICS:
                found |= over_layers(layers, f"stability/{name}/{kind}", "mean", "max")
            found |= over_layers(layers, f"stability/massive_channels/{kind}", "max")
        return found

    def massive(self) -> dict[str, list[int]]:
        """Label of a branch ("ffn/03") -> indices of its massive channels in the last sample, of those that have any."""
        return {p.label: p.massive for p in self._probes if isinstance(p, _BranchProbe) and p.massive}


def _residual_of(module: nn.Module) -> str:
    """Name of the attribute by which a block multiplies its branches: as declared, or Granite's; empty if it has none."""
    granite = "residual_multiplier" if isinstance(getattr(module, "residual_multiplier", None), (int, float)) else ""
    return declared_multipliers(module).get("residual", granite)


def _block_of(name: str, blocks: Mapping[str, nn.Module]) -> nn.Module | None:
    """The innermost of the blocks that contains the named module, or None."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return blocks[name]
    return None
