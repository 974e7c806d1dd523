"""Values that the types of a configuration allow and no run can use: told by their keys before anything is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_mue.callbacks.checkpointing.loading import refuse_code
from lightning_mue.checks import brief, value_error
from lightning_mue.class_paths import as_mapping

#: What Lightning takes instead of the path of a checkpoint.
_NAMES = ("best", "last", "hpc", "auto", "registry")
_RATE = re.compile(r"(^|_)(lr|learning_rate|weight_decay|tolerance)$")
_LARGEST_SEED = 2**32 - 1


def check_values(config: Any) -> None:
    """Refuses numbers that are none, learning rates below 0, and seeds that no generator takes.

    Raises:
        ValueError: With the key.
    """
    for key, value in _leaves(config, ""):
        if key == "trainer.max_time" and isinstance(value, str) and not re.fullmatch(r"\d+:\d+:\d+:\d+", value):
            raise value_error(key, found=repr(value), expected="days:hours:minutes:seconds, such as 00:12:00:00")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        name = re.split(r"[.\[]", key)[-1]
        if isinstance(value, float) and math.isnan(value):
            raise value_error(key, found="nan, which is no number", expected="a number")
        if _RATE.search(name) and not 0 <= value < math.inf:
            raise value_error(key, found=value, expected="a finite number of at least 0")
        if name == "accumulate_grad_batches" and value < 1:  # a run would divide by it
            raise value_error(key, found=value, expected="an integer of at least 1")
        if name in ("seed", "seed_everything", "seeds") and not 0 <= value <= _LARGEST_SEED:
            raise value_error(key, found=value, expected=f"an integer from 0 to {_LARGEST_SEED}")


def check_checkpoint(path: Any) -> None:
    """Refuses the path of a checkpoint at which there is none that can be read.

    Raises:
        ValueError: With what is there.
    """
    if path is None or "://" in str(path) or (str(path).startswith(_NAMES) and not Path(path).exists()):
        return
    expected = "a checkpoint of Lightning, such as logs/debug/version_0/checkpoints/epoch=0-step=6.ckpt"
    if not Path(path).exists():
        raise value_error("ckpt_path", found=f"{str(path)!r}, which does not exist", expected=expected)
    if Path(path).is_dir():
        if not (Path(path) / ".metadata").exists():  # not a distributed checkpoint
            raise value_error(
                "ckpt_path", found=f"the folder {str(path)!r}", expected=expected, do="Give a file in it."
            )
        refuse_code(path)
        return
    do = "It may have been cut off while it was copied, or be another file: use an earlier checkpoint."
    try:
        saved = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever reading a damaged file raises
        found = f"{str(path)!r}, which cannot be read ({brief(error)})"
        raise value_error("ckpt_path", found=found, expected=expected, do=do) from error
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise value_error("ckpt_path", found=f"{str(path)!r}, which holds no state_dict", expected=expected, do=do)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if (named := as_mapping(value)) is not None:
        for name, inner in named.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{i}]")
    else:
        yield key, value
