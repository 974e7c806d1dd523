"""What is looked at before Lightning loads a checkpoint; and whether a distributed one is plain data.

torch unpickles a distributed checkpoint's table of contents and all that is no tensor, and a pickle may call anything. Both are
read here first, by readers that know a few classes and no functions.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_mue.checks import brief, value_error

#: Modules and names of what a table of contents consists of.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, TensorProperties, MetadataIndex, "
        "StorageMeta, _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "collections": "OrderedDict",
    "pathlib": "Path, PosixPath, WindowsPath, PurePosixPath, PureWindowsPath",
    "pathlib._local": "Path, PosixPath, WindowsPath, PurePosixPath, PureWindowsPath",
}


def refuse_code(ckpt_path: str | os.PathLike[str] | None) -> None:
    """Refuses a distributed checkpoint that is more than tensors and plain data; other paths are left alone.

    Raises:
        ValueError: With what was found in it.
    """
    folder = Path(ckpt_path or "")
    if not ckpt_path or not folder.is_dir() or not any(folder.glob("*.metadata")):
        return
    try:
        contents = _Reader(folder).read_metadata()
        names = [name for name, kind in contents.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
        load(dict.fromkeys(names), storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # whatever reading a damaged or forged file raises
        found = f"{str(folder)!r}, which cannot be read as plain data ({first_brief(error)})"
        expected = "a distributed checkpoint of tensors, numbers and text"
        do = "It is damaged, or made to run code: use an earlier one, that you wrote yourself."
        raise value_error("ckpt_path", found=found, expected=expected, do=do) from error


def before_loading(trainer: Trainer, act: Callable[[Any], None]) -> None:
    """Calls a function with the path of each checkpoint before a trainer loads it, those that Lightning finds (``last``) included.

    A second function of the same name takes the place of the first. What torch raises on several ranks becomes a ValueError.
    """
    strategy: Any = trainer.strategy
    if not hasattr(loads := strategy.load_checkpoint, "acts"):

        @functools.wraps(loads)
        def load(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            for each in strategy.load_checkpoint.acts.values():
                each(checkpoint_path)
            try:
                return loads(checkpoint_path, *args, **kwargs)
            except CheckpointException as error:  # no Exception, so that nobody would tell it
                found = f"{str(checkpoint_path)!r}, which cannot be loaded ({first_brief(error)})"
                expected = "a checkpoint of this module and its optimizers"
                do = "Use one of the same module; if it is of the same, it is damaged: use an earlier one."
                raise value_error("ckpt_path", found=found, expected=expected, do=do) from error

        strategy.load_checkpoint = load
        load.acts = {}  # type: ignore[attr-defined]
    strategy.load_checkpoint.acts[act.__name__] = act


def first_brief(error: BaseException) -> str:
    """Of errors on several ranks, the first."""
    ranks = error.failures.values() if isinstance(error, CheckpointException) else ()
    return brief(next((each for each, _ in ranks), error))


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a table of contents only."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, "").split(", ") or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}")


class _Reader(FileSystemReader):
    """Reads the table of contents with that."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        # torch would go on to the table of a rank, where it cannot handle this one.
        if type(contents) is not Metadata or not isinstance(contents.storage_meta, StorageMeta | None):
            raise pickle.UnpicklingError(f".metadata holds {type(contents).__name__}")
        return contents


class _Planner(DefaultLoadPlanner):
    """Reads what is no tensor, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
