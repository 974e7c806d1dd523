"""A head that shares the embedding's weight: the norm right before it, and what the model's own code multiplies by."""

from __future__ import annotations

import re

from torch import nn

from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.rules.roles import Role

_FINAL = re.compile(r"(^|[._])(final_?(layer_?)?norm|final_ln|ln_?f|norm_?f)$", re.IGNORECASE)
_OF_EMBEDDING = re.compile(r"(^|[._])\w*emb\w*", re.IGNORECASE)


def head_norms(infos: list[ParameterInfo]) -> list[str]:
    """Paths of the norms whose gains can carry a multiplier on the logits of tied heads: one for each tied weight.

    Candidates are norms behind the last numbered layer, or behind all embeddings where there are no layers. The one nearest to
    the head in the module tree counts, else the one nearest to the embedding, else the one with the role ``final_norm``. A weight
    for which several remain has none: to guess would be wrong without a word.
    """
    found = []
    for head in (info for info in infos if info.tied):
        candidates = _candidates(infos, head)
        ranks = {info.path: _rank(info, head) for info in candidates}
        best = [path for path, rank in ranks.items() if rank == max(ranks.values())]
        found += best if len(best) == 1 else []
    return found


def _candidates(infos: list[ParameterInfo], head: ParameterInfo) -> list[ParameterInfo]:
    """Gains of norms outside the layers that see the output of the layers on the embedding's side of the model."""
    table = _embedding_name(head)
    layers = [(i, info) for i, info in enumerate(infos) if info.position[1] >= 0]
    found = []
    for i, info in enumerate(infos):
        norm = info.form == "norm" and len(info.shape) == 1 and info.path != info.name
        if not norm or info.name.endswith("bias") or info.role is Role.QK_NORM:
            continue
        outside = info.position[1] < 0
        if (outside and _FINAL.search(info.path)) or (info.role is Role.FINAL_NORM and not outside):
            found.append(info)  # some models define it before the layers; inside them only the user gives it this role
            continue
        if not outside:
            continue
        if _OF_EMBEDDING.search(info.path.rpartition(".")[2]) or (layers and i < layers[0][0]):
            continue
        later = max((_common(layer.name, table) for j, layer in layers if j > i), default=-1)
        if _common(info.name, table) > later:  # layers of another tower may follow
            found.append(info)
    return found


def _rank(info: ParameterInfo, head: ParameterInfo) -> tuple[int, int, bool]:
    heads = [name for name in (head.name, *head.also) if name != _embedding_name(head)]
    nearest = max((_common(info.name, name) for name in heads[-1:]), default=0)
    return nearest, _common(info.name, _embedding_name(head)), info.role is Role.FINAL_NORM


def _embedding_name(head: ParameterInfo) -> str:
    """The name of the look-up table; of several (encoder and decoder), the last, whose side makes the logits."""
    names = [head.name, *head.also]
    tables = [name for name in names if _OF_EMBEDDING.search(name) or re.search(r"\bw[tp]e\b", name)]
    return tables[-1] if tables else names[0]


def _common(one: str, other: str) -> int:
    """Number of leading parts that two names share."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def own_scales(module: nn.Module) -> dict[str, float]:
    """What a model's own code multiplies by, where that depends on the width.

    ``embedding_scale``: the rows of the look-up table, as in models with ``embed_scale`` (often sqrt(d)). ``logit_scale``: the
    input of the head, as in T5, which multiplies it by ``model_dim ** -0.5`` where the embeddings are tied.
    """
    found: dict[str, float] = {}
    for child in module.modules():
        for name in ("scalar_embed_scale", "embed_scale"):
            if type(value := getattr(child, name, None)) is float:
                found.setdefault("embedding_scale", value)
        config, dim = getattr(child, "config", None), getattr(child, "model_dim", None)
        if isinstance(dim, int) and hasattr(child, "lm_head") and _scales_logits(config):
            found["logit_scale"] = dim**-0.5
    return found


def _scales_logits(config: object) -> bool:
    tied = getattr(config, "tie_word_embeddings", False) and getattr(config, "model_type", "") in _SCALE_IF_TIED
    return bool(getattr(config, "scale_decoder_outputs", tied))


#: Relatives of T5 that have no setting for it.
_SCALE_IF_TIED = frozenset({"umt5", "switch_transformers"})
