"""Finds parameters that are parts of a weight, which a module computes from them: weight norm, spectral norm, LoRA, pruning.

A rule scales the weight that a layer multiplies by. Its parts scale otherwise, each kind in its own way, and no paper whose rule is
here gives a row for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from lightning_mue.checks import listed, value_error
from lightning_mue.names import clean_name

_LORA = re.compile(r"(^|[._])lora[_.](a|b|down|up|embedding_a|embedding_b|magnitude_vector)(\.|$)", re.IGNORECASE)
_FACTOR = re.compile(r"\.((lora_?)?(a|b|down|up))(\.weight)?$", re.IGNORECASE)
_REMEDY = {
    "weight norm": "torch.nn.utils.remove_weight_norm(layer)",
    "spectral norm or pruning": "torch.nn.utils.remove_spectral_norm(layer) or torch.nn.utils.prune.remove(layer, 'weight')",
    "parametrization": "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
    "LoRA": "for LoRA train without MuECallback, or merge the factors into their weights first",
}


def weight_parts(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that is a part of a weight -> kind of the part."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        start = f"{clean_name(prefix)}." if prefix else ""
        found |= {f"{start}{leaf}": kind for leaf, kind in _own_parts(module, own).items()}
        for name, _ in module.named_parameters() if "lora" in type(module).__name__.lower() else ():
            if _FACTOR.fullmatch(f".{clean_name(name)}"):
                found[f"{start}{clean_name(name)}"] = "LoRA"
    for name, _ in model.named_parameters():
        if "parametrizations" in clean_name(name).split("."):
            found[clean_name(name)] = "parametrization"
        elif _LORA.search(clean_name(name)):
            found[clean_name(name)] = "LoRA"
    return found


def _own_parts(module: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, str]:
    """The parts that torch's older functions make, among the parameters of one module."""
    found = {leaf: "spectral norm or pruning" for leaf in own if leaf.endswith("_orig")}
    for leaf, length in own.items():
        direction = own.get(f"{leaf[:-2]}_v") if leaf.endswith("_g") else None
        if direction is not None and _is_length(length, direction, computed=hasattr(module, leaf[:-2])):
            found |= dict.fromkeys((leaf, f"{leaf[:-2]}_v"), "weight norm")
    return found


def _is_length(length: Tensor, direction: Tensor, computed: bool) -> bool:
    """Whether the one holds a length for each row of the other (not so for matrices that somebody called w_g and w_v).

    A single row may also be the gate of the only head: it counts if the module has the weight that is computed from the parts.
    """
    if length.dim() == 0:
        return True
    if length.dim() == 2 and length.shape[0] == 1 and not computed:
        return False
    same = length.dim() == direction.dim() > 1 and length.shape != direction.shape
    return same and all(a in (1, b) for a, b in zip(length.shape, direction.shape, strict=True))


def refuse_parts(parts: Iterable[tuple[str, str]]) -> None:
    """Refuses to scale parts of weights; takes (name, kind) of each that is trained.

    Raises:
        ValueError: Naming all of them.
    """
    names: dict[str, list[str]] = {}
    for name, kind in parts:
        names.setdefault(kind, []).append(name)
    if names:
        shown = "; ".join(f"{kind}: {listed(found)}" for kind, found in names.items())
        raise value_error(
            "model",
            found=f"{sum(map(len, names.values()))} parameter(s) that are parts of a weight ({shown})",
            expected="weights that are parameters themselves, since the rules do not say how their parts scale",
            do=f"Before the fit: {'; '.join(_REMEDY[kind] for kind in names)}. At the base's size nothing is scaled, and they may "
            "stay.",
        )
