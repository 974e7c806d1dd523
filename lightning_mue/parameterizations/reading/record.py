"""What a plan needs to know of a model: sizes, parameters, multipliers and, of a base, how its weights were drawn.

A record is made from a module, or read from a file that :func:`save_base` wrote, so that the base's code need not exist any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from lightning_mue.contract import branch_sizes, declared_multipliers, is_router
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.planning.scaling_plan import Init
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, build_base
from lightning_mue.parameterizations.reading.inference import name_roles
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, list_parameters, role_patterns
from lightning_mue.parameterizations.rules.axes import declared_sizes
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.sharded import whole

_VERSION = 1


@dataclass(frozen=True)
class Site:
    """One forward multiplier: an attribute of a module that is a plain number.

    Attributes:
        path: Dotted path of the attribute.
        kind: ``residual``, ``attention``, ``ffn``, ``route`` or ``output``.
        value: Its value.
        kinds: All kinds that the same module exposes: a dense FFN and an MoE differ in them.
        branch: Sizes of the module, where it is an FFN or MoE branch.
    """

    path: str
    kind: str
    value: float
    kinds: tuple[str, ...]
    branch: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ModelRecord:
    """A model, as far as a plan needs it.

    Attributes:
        model: Name of its class.
        sizes: Its own declaration, axis -> size; empty if it makes none.
        inferred: ``head_dim``, ``attention_scale`` and ``top_k`` as its attributes tell them.
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

    def same_shapes(self, other: ModelRecord) -> bool:
        """True if both have the same parameters in the same shapes."""
        mine, theirs = ([(info.name, info.shape) for info in record.parameters] for record in (self, other))
        return mine == theirs

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        plain = asdict(self)
        plain["parameters"] = [_plain_parameter(info) for info in self.parameters]
        plain["sites"] = [{**asdict(site), "kinds": list(site.kinds)} for site in self.sites]
        plain["routing"] = {setting: list(found) for setting, found in self.routing.items()}
        return {"lightning_mue_base": _VERSION, **plain}

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
    return {**plain, "role": info.role.value if info.role is not None else None}


def _parameter(plain: Mapping[str, Any]) -> ParameterInfo:
    role = Role(plain["role"]) if plain["role"] is not None else None
    shape, fans = tuple(plain["shape"]), tuple(plain["fans"])
    return ParameterInfo(**{**plain, "role": role, "shape": shape, "fans": fans, "folds": frozenset(plain["folds"])})


def describe(
    model: nn.Module,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    *,
    measure: bool = False,
) -> ModelRecord:
    """Reads a module.

    Args:
        model: Any module, also on ``meta``.
        roles: Regular expression on names -> role.
        multipliers: Kind -> regular expression on dotted attribute paths, beside what the modules declare.
        measure: Measure how the parameters were drawn; they must be fresh.

    Raises:
        ValueError: For a pattern that matches nothing.
    """
    infos = name_roles(list_parameters(model, roles))
    known = {info.name for info in infos}
    tensors = {clean_name(name): tensor for name, tensor in model.named_parameters()} if measure else {}
    return ModelRecord(
        model=type(model).__name__,
        sizes=declared_sizes(model),
        parameters=tuple(infos),
        sites=tuple(sites(model, multipliers)),
        inferred=_attributes(model, infos),
        inits={name: measure_init(whole(tensor)) for name, tensor in tensors.items() if name in known},
        routing=_routing(model),
    )


def describe_base(
    model: nn.Module,
    base: Base,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    *,
    measure: bool,
) -> ModelRecord:
    """Makes the base, or reads its file, and describes it.

    Args:
        model: The target, from which a base given as overrides is rebuilt.
        base: See :func:`lightning_mue.parameterizations.reading.base.build_base`; or the path of a file from :func:`save_base`.
        roles: As for the target; patterns that name nothing in the base are left out.
        multipliers: As for the target.
        measure: Make real weights and measure how they were drawn; otherwise shapes only.
    """
    if isinstance(base, (str, Path)):
        record, patterns = load_base(base), role_patterns(roles)
        named = [
            replace(info, role=next((role for pattern, role in patterns if pattern.search(info.name)), info.role))
            for info in record.parameters
        ]
        return replace(record, parameters=tuple(named))
    run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}
    made = build_base(model, base, device=None if measure else "meta")
    names = [clean_name(name) for name, _ in made.named_parameters(remove_duplicate=False)]
    # An MoE's patterns need not name anything where the base is dense.
    some_roles = {p: r for p, r in (roles or {}).items() if any(re.search(p, name) for name in names)}
    some_paths = {k: p for k, p in (multipliers or {}).items() if any(re.search(p, path) for path in _numbers(made))}
    return replace(describe(made, some_roles, some_paths, measure=measure), run=run)


def save_base(
    model: nn.Module,
    path: str | Path,
    *,
    base: Base | None = None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
) -> None:
    """Writes what plans need of a base to a YAML file, which then stands for it: ``base="base.yaml"``.

    Args:
        model: The base itself, freshly initialized; or a target whose hyperparameters ``base`` overrides.
        path: The file.
        base: As for :func:`lightning_mue.plan`; None: ``model`` is the base.
        roles: Regular expression on names -> role, for modules that declare none.
        multipliers: Kind -> regular expression on dotted attribute paths.
    """
    if base is None:
        base = {} if any(p.is_meta for p in model.parameters()) else model
    record = describe_base(model, base, roles, multipliers, measure=True)
    Path(path).write_text(yaml.safe_dump(record.to_dict(), sort_keys=False), encoding="utf-8")


def load_base(path: str | Path) -> ModelRecord:
    """Reads a file that :func:`save_base` wrote.

    Raises:
        ValueError: If there is no such file, or it is something else.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"base: cannot read the file {str(path)!r} ({error}). Write it with `lightning-mue explain --save-base FILE`, or give "
            "the base as overrides, e.g. base: {width: 64}."
        ) from error
    if not isinstance(plain, dict) or plain.get("lightning_mue_base") != _VERSION:
        raise ValueError(
            f"base: {str(path)!r} is not a base of version {_VERSION}. Write it anew with `lightning-mue explain --save-base FILE`."
        )
    try:
        return ModelRecord.from_dict(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"base: {str(path)!r} is damaged ({error!r}). Write it anew.") from error


def sites(module: nn.Module, patterns: Mapping[str, str] | None = None) -> Iterator[Site]:
    """Yields the forward multipliers of a module tree: those declared by ``mue_multipliers``, then those that patterns name.

    Raises:
        ValueError: For a pattern that matches no number.
    """
    for name, child in module.named_modules():
        if hasattr(child, "_orig_mod"):
            continue  # torch.compile's wrapper shows the attributes of the module inside it, which comes next
        declared = declared_multipliers(child)
        sizes = branch_sizes(child) if declared else None
        for kind, attribute in declared.items():
            clean = clean_name(name)
            path = f"{clean}.{attribute}" if clean else attribute
            yield Site(path, kind, float(getattr(child, attribute)), tuple(sorted(declared)), sizes)
    numbers = _numbers(module) if patterns else {}
    for kind, pattern in (patterns or {}).items():
        found = [path for path in numbers if re.search(pattern, path)]
        if not found:
            raise ValueError(
                f"multipliers.{kind}: the pattern {pattern!r} matches no attribute that is a number. There are: "
                f"{', '.join(list(numbers)[:12]) or 'none'}."
            )
        yield from (Site(path, kind, numbers[path], (kind,)) for path in found)


def _numbers(module: nn.Module) -> dict[str, float]:
    """Dotted path -> value of every attribute that is a float."""
    return {
        f"{clean_name(name)}.{attribute}".lstrip("."): value
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, float) and not attribute.startswith("_")
    }


def _attributes(module: nn.Module, infos: list[ParameterInfo]) -> dict[str, float]:
    """What leaves no trace in the shapes: the size and scale of an attention head, and how many experts a token uses."""
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


_TOP_K = ("top_k", "topk", "num_experts_per_tok", "n_activated_experts", "moe_top_k")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "qk_head_dim", "key_value_proj_dim", "d_kv")
_ATTENTION_SCALE = ("scaling", "scale", "softmax_scale")


def _number(module: nn.Module, names: tuple[str, ...], kind: type) -> Any:
    return next((value for name in names if type(value := getattr(module, name, None)) is kind), None)


def _routing(model: nn.Module) -> dict[str, tuple[str, ...]]:
    routers = [module for module in model.modules() if is_router(module)]
    found = {s: {str(getattr(r, s)) for r in routers if hasattr(r, s)} for s in ("scoring", "gate")}
    return {setting: tuple(sorted(values)) for setting, values in found.items() if values}


def measure_init(tensor: Tensor) -> Init:
    """Recognises how a parameter was drawn.

    Args:
        tensor: Freshly initialized parameter, any shape.

    Returns:
        ``constant`` where all entries are equal; ``uniform`` or ``normal`` for a mean of about 0; else ``keep``.
    """
    values = tensor.detach().float().flatten()
    if values.numel() == 0:
        return Init("keep", 0.0)
    first = float(values[0])
    if bool((values == first).all()):
        return Init("constant", first)
    mean, std, peak = float(values.mean()), float(values.std(correction=0)), float(values.abs().max())
    # Five standard errors: a false alarm once in two million parameters.
    if abs(mean) > 5 * std / values.numel() ** 0.5 or values.numel() < 2:
        return Init("keep", 0.0)
    # A uniform distribution ends at sqrt(3) standard deviations; 64 normal draws go past 1.8 with near certainty.
    rms = float(values.square().mean().sqrt())
    kind = "uniform" if values.numel() >= 64 and peak < 1.8 * rms else "normal"
    return Init(kind, rms)
