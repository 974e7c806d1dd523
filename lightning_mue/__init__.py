"""Tune once on a small dense model, then train any Mixture-of-Experts model with the same hyperparameters."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.callbacks import MuECallback, TransferMonitor
    from lightning_mue.models import MoELanguageModel
    from lightning_mue.moe import MoELayer
    from lightning_mue.optim import HyperSphereOptimizer
    from lightning_mue.parameterizations import ScalingPlan, initialize, param_groups, plan

# An application that configures no logging shall still see what was done to its parameters; one that does gets the records.
_logger = logging.getLogger(__name__)
if _logger.level == logging.NOTSET:  # the program may have set it already
    _logger.setLevel(
        logging.INFO if os.environ.get("RANK", os.environ.get("LOCAL_RANK")) in (None, "", "0") else logging.WARNING
    )
_handler = logging.StreamHandler()
_handler.addFilter(lambda record: not logging.root.handlers)
_logger.addHandler(_handler)

__version__ = "0.1.0"

#: Public name -> module that holds it. Loaded on first use: `import lightning_mue` alone is quick.
_PUBLIC = {
    "HyperSphereOptimizer": "lightning_mue.optim",
    "MoELanguageModel": "lightning_mue.models",
    "MoELayer": "lightning_mue.moe",
    "MuECallback": "lightning_mue.callbacks",
    "ScalingPlan": "lightning_mue.parameterizations",
    "TransferMonitor": "lightning_mue.callbacks",
    "initialize": "lightning_mue.parameterizations",
    "param_groups": "lightning_mue.parameterizations",
    "plan": "lightning_mue.parameterizations",
}

__all__ = [
    "HyperSphereOptimizer",
    "MoELanguageModel",
    "MoELayer",
    "MuECallback",
    "ScalingPlan",
    "TransferMonitor",
    "initialize",
    "param_groups",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
