"""Lightning has two namespaces, ``lightning.pytorch`` and ``pytorch_lightning``, whose classes are not each other's.

So no class of it is asked for by ``isinstance`` here, and ``pytorch_lightning`` is not imported unless the user has.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch


def is_lightning(value: object, name: str) -> bool:
    """Whether a value is an instance of Lightning's class of this name, of either namespace.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> is_lightning(CSVLogger("logs"), "Logger"), is_lightning(CSVLogger("logs"), "TensorBoardLogger")
        (True, False)
    """
    roots = ("lightning", "pytorch_lightning")
    return any(cls.__name__ == name and cls.__module__.split(".")[0] in roots for cls in type(value).__mro__)


def namespace_of(module: object) -> Any:
    """The namespace whose LightningModule a module is, as a Python module: its Trainer trains it."""
    classes = type(module).__mro__
    if any(cls.__name__ == "LightningModule" and cls.__module__.startswith("pytorch_lightning.") for cls in classes):
        import pytorch_lightning

        return pytorch_lightning
    return lightning.pytorch
