"""Tune once on a small dense model, then train any Mixture-of-Experts model with the same hyperparameters."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; tests/test_package.py compares it with `_PUBLIC`
    from lightning_mue.analysis import coordinate_check as coordinate_check
    from lightning_mue.callbacks import ActivationOutlierMonitor as ActivationOutlierMonitor
    from lightning_mue.callbacks import HealthMonitor as HealthMonitor
    from lightning_mue.callbacks import LogitsZMonitor as LogitsZMonitor
    from lightning_mue.callbacks import MuECallback as MuECallback
    from lightning_mue.callbacks import PrecisionMonitor as PrecisionMonitor
    from lightning_mue.callbacks import QKClip as QKClip
    from lightning_mue.callbacks import RouterMonitor as RouterMonitor
    from lightning_mue.callbacks import SafeCheckpoint as SafeCheckpoint
    from lightning_mue.callbacks import SampleGrid as SampleGrid
    from lightning_mue.callbacks import SpectralMonitor as SpectralMonitor
    from lightning_mue.callbacks import StabilityGuard as StabilityGuard
    from lightning_mue.callbacks import ThroughputMonitor as ThroughputMonitor
    from lightning_mue.callbacks import TokenMonitor as TokenMonitor
    from lightning_mue.callbacks import TransferMonitor as TransferMonitor
    from lightning_mue.callbacks import UpdateMonitor as UpdateMonitor
    from lightning_mue.data import DigitsDataModule as DigitsDataModule
    from lightning_mue.data import TextDataModule as TextDataModule
    from lightning_mue.data import TokenDataModule as TokenDataModule
    from lightning_mue.models import FlowMatchingTransformer as FlowMatchingTransformer
    from lightning_mue.models import MoELanguageModel as MoELanguageModel
    from lightning_mue.moe import GlobalBatchBalance as GlobalBatchBalance
    from lightning_mue.moe import LossFreeBalance as LossFreeBalance
    from lightning_mue.moe import MoELayer as MoELayer
    from lightning_mue.moe import clip_grad_norm as clip_grad_norm
    from lightning_mue.moe import parallelize_experts as parallelize_experts
    from lightning_mue.moe import register_experts as register_experts
    from lightning_mue.moe import replace_moe_blocks as replace_moe_blocks
    from lightning_mue.optim import HyperSphereOptimizer as HyperSphereOptimizer
    from lightning_mue.parameterizations import ScalingPlan as ScalingPlan
    from lightning_mue.parameterizations import initialize as initialize
    from lightning_mue.parameterizations import param_groups as param_groups
    from lightning_mue.parameterizations import plan as plan
    from lightning_mue.parameterizations import save_base as save_base
    from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers as KeepsMultipliers
    from lightning_mue.parameterizations.verifying.verify import verify_plan as verify_plan

# Where the application configures no logging, records go to stderr, so that users see what was done to their parameters.
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
    "ActivationOutlierMonitor": "callbacks",
    "DigitsDataModule": "data",
    "FlowMatchingTransformer": "models",
    "GlobalBatchBalance": "moe",
    "HealthMonitor": "callbacks",
    "HyperSphereOptimizer": "optim",
    "KeepsMultipliers": "parameterizations.applying.keeps_multipliers",
    "LogitsZMonitor": "callbacks",
    "LossFreeBalance": "moe",
    "MoELanguageModel": "models",
    "MoELayer": "moe",
    "MuECallback": "callbacks",
    "PrecisionMonitor": "callbacks",
    "QKClip": "callbacks",
    "RouterMonitor": "callbacks",
    "SafeCheckpoint": "callbacks",
    "SampleGrid": "callbacks",
    "ScalingPlan": "parameterizations",
    "SpectralMonitor": "callbacks",
    "StabilityGuard": "callbacks",
    "TextDataModule": "data",
    "ThroughputMonitor": "callbacks",
    "TokenDataModule": "data",
    "TokenMonitor": "callbacks",
    "TransferMonitor": "callbacks",
    "UpdateMonitor": "callbacks",
    "clip_grad_norm": "moe",
    "coordinate_check": "analysis",
    "initialize": "parameterizations",
    "parallelize_experts": "moe",
    "param_groups": "parameterizations",
    "plan": "parameterizations",
    "register_experts": "moe",
    "replace_moe_blocks": "moe",
    "save_base": "parameterizations",
    "verify_plan": "parameterizations.verifying.verify",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
