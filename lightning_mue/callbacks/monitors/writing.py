"""Writes the metrics of a sampled step to a logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_mue.namespaces import is_lightning


def write(logger: Logger, metrics: Mapping[str, float], step: int) -> None:
    """``logger.log_metrics``; to a TensorBoardLogger all in one event, not in one a tag, each of which wakes the writing thread."""
    writer = _event_writer(logger)
    if writer is None:
        logger.log_metrics(dict(metrics), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary  # comes with TensorBoardLogger, which is optional

    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""  # type: ignore[attr-defined]
    values = [Summary.Value(tag=f"{prefix}{tag}", simple_value=value) for tag, value in metrics.items()]
    writer.add_summary(Summary(value=values), step)


def _event_writer(logger: Logger) -> Any:
    """The writer of events below a TensorBoardLogger that logs as Lightning's own does; None for another logger."""
    own = type(logger).log_metrics.__module__.split(".")[0] in ("lightning", "lightning_fabric")
    if not own or not is_lightning(logger, "TensorBoardLogger"):
        return None
    experiment = logger.experiment  # type: ignore[attr-defined]
    get = getattr(experiment, "_get_file_writer", None)  # of torch's and tensorboardX's SummaryWriter alike
    return get() if callable(get) else None
