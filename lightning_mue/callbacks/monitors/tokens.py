"""TokenMonitor: how varied the tokens of each sequence are that a model reads.

Shape legend: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.finding.reading import Found, SearchResult, read
from lightning_mue.callbacks.monitors.probes import Probe
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.diagnostics.routing import load_entropy
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.sharded import whole

#: Shorter sequences say nothing.
_LEAST_LENGTH = 16


class _TokenProbe(Probe):
    """Statistics: how many sequences, and of their entropies the sum, the largest, and the largest gap to ``ln(V)``."""

    size = 4

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        return self.measure_call(inputs, {}, output)

    def measure_call(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor | None:
        ids = next((x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor)), None)
        if ids is None or ids.is_floating_point() or ids.ndim < 2 or ids.shape[-1] < _LEAST_LENGTH or not ids.numel():
            return None
        ids_BS = whole(ids.detach()).flatten(0, -2).long()
        counts_BV = torch.zeros(len(ids_BS), self._classes, device=ids_BS.device)
        entropy_B = load_entropy(counts_BV.scatter_add_(1, ids_BS, torch.ones_like(ids_BS, dtype=counts_BV.dtype)))
        of_all = (entropy_B.new_tensor(len(entropy_B)), entropy_B.sum(), entropy_B.max(), self._bound - entropy_B.min())
        return torch.stack(of_all)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[:2] + b[:2], torch.maximum(a[2:], b[2:])])

    def metrics(self, total: Tensor) -> dict[str, float]:
        if not total[0] > 0:
            return {}
        values = {"mean": total[1] / total[0], "max": total[2], "min": self._bound - total[3]}
        return {f"data/sequence_entropy_{name}": float(value) for name, value in values.items()}

    @property
    def _classes(self) -> int:
        return int(self.module.num_embeddings)  # type: ignore[arg-type]

    @property
    def _bound(self) -> float:
        return math.log(self._classes)


class TokenMonitor(SampledMonitor):
    """Logs how varied the tokens of each sequence are: a corrupt shard shows in what is read before it shows in the loss.

    Metrics: ``data/sequence_entropy_max``, ``_mean`` and ``_min`` over the sequences of the global batch, of the entropy of the
    tokens in a sequence, in nats: ``ln(S)`` if all S tokens are different (noise), 0 if they are one and the same (padding, a
    repeated line). The tokens are what goes into the largest look-up table, [..., S] with S of 16 or more.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
    """

    looks_for = "a look-up table of tokens (nn.Embedding)"
    category = "Training"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {"Entropy of a sequence's tokens": [r"data/sequence_entropy_.*"]}

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe the largest look-up table."""
        reading = read(pl_module)
        names = {reading.owner(info.path) for info in reading.of_role(Role.EMBEDDING)}
        tables = {name: m for name in names if isinstance(m := reading.modules.get(name), nn.Embedding)}
        largest = max(tables, key=lambda name: (tables[name].num_embeddings, name), default=None)
        found = [] if largest is None else [Found(largest, tables[largest], "tokens", "role")]
        self.findings = {"tokens": SearchResult(found)}
        return [_TokenProbe(each.module, "tokens") for each in found]
