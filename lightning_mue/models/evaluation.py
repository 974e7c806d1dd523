"""Evaluation of a language model: validation and test with metrics that are exact over batches and ranks.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_mue.metrics import BitsPerByte, CrossEntropy, Perplexity


class Evaluates(LightningModule):
    """``validation_step`` and ``test_step`` for a module whose ``forward`` maps token ids [B, S] to logits [B, S, V]."""

    def add_metrics(self, bytes_per_token: float) -> None:
        """Adds the metrics of both stages; they have no entry in checkpoints."""
        for stage in ("val", "test"):
            metrics: dict[str, Metric | MetricCollection] = {
                "loss": CrossEntropy(),
                "bits_per_byte": BitsPerByte(bytes_per_token),
                "perplexity": Perplexity(),
            }
            # One group: the sums are made once, and the three are computed from them.
            collection = MetricCollection(metrics, prefix=f"{stage}/", compute_groups=[list(metrics)])
            self.add_module(f"{stage}_metrics", collection)

    def evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        """Takes a batch into the metrics of a stage, which are logged at the end of the epoch."""
        self._measure(stage, self(batch["tokens"]), batch["targets"])

    @torch.compiler.disable  # the counts that metrics keep would have the step compiled anew for each batch
    def _measure(self, stage: str, logits_BSV: Tensor, targets_BS: Tensor) -> None:
        metrics = self.get_submodule(f"{stage}_metrics")
        assert isinstance(metrics, MetricCollection)
        metrics.update(logits_BSV, targets_BS)
        self.log_dict(metrics, prog_bar=stage == "val")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``val/loss``, ``val/bits_per_byte`` and ``val/perplexity``."""
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``test/loss``, ``test/bits_per_byte`` and ``test/perplexity``."""
        self.evaluate(batch, "test")
