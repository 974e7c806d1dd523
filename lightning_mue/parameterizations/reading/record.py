"""What a plan needs to know of a model, as plain data: sizes, parameters, multipliers, and how a base's weights were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from lightning_mue.checks import value_error
from lightning_mue.contract import declared_axes, is_router
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.reading.head import own_scales
from lightning_mue.parameterizations.reading.initializer import Init, measure_init
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, list_parameters, named_tensors
from lightning_mue.parameterizations.reading.role_names import name_roles
from lightning_mue.parameterizations.reading.sites import Site, sites
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.sharded import whole

#: Version of the format in which a base is saved.
VERSION = 1


@dataclass(frozen=True)
class ModelRecord:
    """A model, as far as a plan needs it.

    Attributes:
        model: Name of its class.
        sizes: The sizes that it declares, axis -> size; empty if it declares none.
        inferred: ``head_dim``, ``attention_scale``, ``top_k``, ``embedding_scale`` and ``logit_scale``, read from its modules'
            attributes.
        parameters: In order.
        sites: Forward multipliers that can be set.
        inits: Parameter name -> how it was drawn; empty if that was not measured.
        routing: Setting of routers -> values found.
        run: ``tokens`` and ``batch_tokens`` of the run, if known.
    """

    model: str
    sizes: Mapping[str, float]
    parameters: tuple[ParameterInfo, ...]
    sites: tuple[Site, ...]
    inferred: Mapping[str, float] = field(default_factory=dict)
    inits: Mapping[str, Init] = field(default_factory=dict)
    routing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    run: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        plain = asdict(self)
        plain["parameters"] = [_plain_parameter(info) for info in self.parameters]
        plain["sites"] = [{**asdict(site), "kinds": list(site.kinds)} for site in self.sites]
        plain["routing"] = {setting: list(found) for setting, found in self.routing.items()}
        return {"lightning_mue_base": VERSION, **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModelRecord:
        """The inverse of :meth:`to_dict`."""
        plain = {key: value for key, value in plain.items() if key != "lightning_mue_base"}
        return cls(
            **{
                **plain,
                "parameters": tuple(_parameter(entry) for entry in plain["parameters"]),
                "sites": tuple(Site(**{**site, "kinds": tuple(site["kinds"])}) for site in plain["sites"]),
                "inits": {name: Init(**init) for name, init in plain["inits"].items()},
                "routing": {setting: tuple(found) for setting, found in plain["routing"].items()},
            }
        )


def _plain_parameter(info: ParameterInfo) -> dict[str, Any]:
    plain = {**asdict(info), "shape": list(info.shape), "fans": list(info.fans), "folds": sorted(info.folds)}
    plain["also"] = list(info.also)
    return {**plain, "role": info.role.value if info.role is not None else None}


def _parameter(plain: Mapping[str, Any]) -> ParameterInfo:
    role = Role(plain["role"]) if plain["role"] is not None else None
    shape, fans = tuple(plain["shape"]), tuple(plain["fans"])
    folds, also = frozenset(plain["folds"]), tuple(plain.get("also", ()))
    return ParameterInfo(**{**plain, "role": role, "shape": shape, "fans": fans, "folds": folds, "also": also})


def describe(
    model: nn.Module,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    *,
    measure: bool = False,
) -> ModelRecord:
    """Reads a module, also on ``meta``; for ``roles`` and ``multipliers`` see :func:`lightning_mue.plan`.

    With ``measure`` also how its parameters were drawn, which must be freshly initialized.

    Raises:
        ValueError: For a pattern that matches nothing, or sizes by names that are no axes.
    """
    infos = name_roles(list_parameters(model, roles))
    known = {info.name for info in infos}
    tensors = named_tensors(model) if measure else {}
    return ModelRecord(
        model=type(model).__name__,
        sizes=_declared_sizes(model),
        parameters=tuple(infos),
        sites=tuple(sites(model, multipliers)),
        inferred={**_attributes(model, infos), **own_scales(model)},
        inits={name: measure_init(whole(tensor)) for name, tensor in tensors.items() if name in known},
        routing=_routing(model),
    )


def _declared_sizes(module: nn.Module) -> dict[str, float]:
    """The sizes that a module declares by its method ``mue_axes``; empty if it has none."""
    sizes = declared_axes(module)
    known = [f.name for f in fields(Axes)]
    if unknown := sorted(set(sizes) - set(known)):
        found = f"{', '.join(unknown)}, declared by {type(module).__name__}"
        raise value_error("mue_axes", found=found, expected=f"axes among {', '.join(known)}")
    return sizes


_TOP_K = ("top_k", "topk", "num_experts_per_tok", "n_activated_experts", "moe_top_k")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "qk_head_dim", "key_value_proj_dim", "d_kv")
_ATTENTION_SCALE = ("scaling", "scale", "softmax_scale")


def _attributes(module: nn.Module, infos: list[ParameterInfo]) -> dict[str, float]:
    """Reads what the shapes do not show: size and scale of an attention head, and the number of experts that a token uses."""
    experts = [info.name for info in infos if info.role in (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN)]
    found: dict[str, float] = {}
    for name, child in module.named_modules():
        prefix = f"{clean_name(name)}." if name else ""
        if any(expert.startswith(prefix) for expert in experts) and (top_k := _number(child, _TOP_K, int)):
            found["top_k"] = top_k  # the innermost comes last
        if "attention" in type(child).__name__.lower() and (head := _number(child, _HEAD_DIM, int)):
            found.setdefault("head_dim", head)
            if (scale := _number(child, _ATTENTION_SCALE, float)) is not None:
                found.setdefault("attention_scale", scale)
    return found


def _number(module: nn.Module, names: tuple[str, ...], kind: type) -> Any:
    return next((value for name in names if type(value := getattr(module, name, None)) is kind), None)


def _routing(model: nn.Module) -> dict[str, tuple[str, ...]]:
    routers = [module for module in model.modules() if is_router(module)]
    found = {s: {str(getattr(r, s)) for r in routers if hasattr(r, s)} for s in ("scoring", "gate")}
    return {setting: tuple(sorted(values)) for setting, values in found.items() if values}
