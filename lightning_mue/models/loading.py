"""Loading from a checkpoint file: plain data only, and nothing is called but what the model's arguments expect."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_yaml
from typing_extensions import Self

from lightning_mue.class_paths import check_arguments


class LoadsSafely(LightningModule):
    """`load_from_checkpoint` that runs no code of the file, wherever the file comes from."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # its restricting wrapper adds nothing to the signature
        cls, checkpoint_path: Any, *args: Any, weights_only: bool = True, **kwargs: Any
    ) -> Self:
        """Makes a model of a checkpoint; see `LightningModule.load_from_checkpoint` for the arguments.

        With ``weights_only=False`` the file is unpickled, which runs whatever code it holds.

        Raises:
            ValueError: The hyperparameters name a function, or a class of another type than the argument's.
        """
        if weights_only:
            hparams_file = args[1] if len(args) > 1 else kwargs.get("hparams_file")
            check_arguments(cls, _saved(checkpoint_path, hparams_file), "hyper_parameters")
        kwargs["weights_only"] = weights_only
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _saved(path: Any, hparams_file: Any) -> dict[str, Any]:
    """The hyperparameters of a checkpoint, without its weights."""
    found: dict[str, Any] = {}
    if not isinstance(path, (str, bytes)) and hasattr(path, "seek"):
        found = torch.load(path, map_location="meta", weights_only=True).get("hyper_parameters", {})
        path.seek(0)
    else:
        with get_filesystem(path).open(str(path), "rb") as file:
            found = torch.load(file, map_location="meta", weights_only=True).get("hyper_parameters", {})
    if hparams_file is not None and str(hparams_file).endswith((".yaml", ".yml")):
        found = {**found, **load_hparams_from_yaml(str(hparams_file))}
    return found
