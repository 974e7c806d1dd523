"""Distributed checkpoints as plain data.

torch unpickles their table of contents and all that is no tensor, and a pickle may call anything. Both are read here first, by
readers that know a few classes and no functions, before torch or Lightning touch them.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, ReadItem, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

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
_DO = "Loading it would run code. Use a checkpoint that you wrote yourself."


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
        found = f"{str(folder)!r}, which cannot be read as plain data ({brief(error)})"
        expected = "a distributed checkpoint of tensors, numbers and text"
        raise value_error("ckpt_path", found=found, expected=expected, do=_DO) from error


def load_plain_only(trainer: Trainer) -> None:
    """Holds every checkpoint that a trainer loads to `refuse_code`, those that Lightning finds (``last``, ``hpc``) included."""
    loads = trainer.strategy.load_checkpoint
    if not getattr(loads, "refuses_code", False):

        @functools.wraps(loads)
        def load(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            refuse_code(checkpoint_path)
            return loads(checkpoint_path, *args, **kwargs)

        load.refuses_code = True  # type: ignore[attr-defined]
        trainer.strategy.load_checkpoint = load  # type: ignore[method-assign]


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
