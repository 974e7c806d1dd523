"""Options of a param group: their allowed values, and the options of a step that are read from a group."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mue.checks import listed, require_choice, require_number, require_type, value_error
from lightning_mue.kernels.compute_type import fixed_choice
from lightning_mue.optim.neuron import check_rows
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.split import checked_split
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS, KINDS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Types of the Newton-Schulz products, under the names that a YAML file or a state dict can hold.
COMPUTE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}

#: Types of the momentum.
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

#: Options of the optimizer, not of a group, that are saved with it.
OWN = ("adamw_lr", "adamw_weight_decay", "sphere")
#: Options that a group cannot set: they are the optimizer's, or those of torch's optimizers that this one does not have.
_NOT_OF_A_GROUP = {
    "sphere": "Pass it to the optimizer, or give the group a `kind`.",
    "process_group": "Pass it to the optimizer.",
    "amsgrad": "",
    "dampening": "",
    "ns_steps": "`preset` chooses the Newton-Schulz schedule.",
    "ns_coefficients": "`preset` chooses the Newton-Schulz schedule.",
    "adjust_lr_fn": "It is `lr_convention` here.",
}

#: Keys of a group besides options: this package's, and those that torch's optimizers and schedulers put there.
_OTHER_KEYS = {"params", "param_names", "kind", "name", "role", "roles", "added", "kinds", "splits", "adamw_lr_factor"}
_OTHER_KEYS |= {"mue_scaled", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "base_momentum"}
_OTHER_KEYS |= {"foreach", "fused", "differentiable", "decoupled_weight_decay"}
#: Other names of options that are not near their names here.
_SYNONYMS = {"learning_rate": "lr", "wd": "weight_decay", "decay": "weight_decay", "beta": "betas", "epsilon": "eps"}

#: Ways back onto the sphere. `project`: along the radius (arXiv:2603.28743). `geodesic`: the step is a rotation by exactly
#: `lr` radians (docs/derivations/hypersphere.md).
RETRACTIONS = ("project", "geodesic")

#: What is normalized of an orthogonalized direction: nothing, or each row by its second moment (arXiv:2510.05491).
NORMALIZATIONS = (None, "neuron")
#: What a matrix does whose gradient is exactly zero. `skip`: stays, bit for bit. `momentum`: steps by its momentum and
#: decays, as the paper's code and other Muons do.
ZERO_GRADIENTS = ("skip", "momentum")


def is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is known to be zero; False for a tensor, which would have to be read from a device."""
    return not isinstance(lr, Tensor) and lr == 0


@dataclass(frozen=True)
class StepOptions:
    """Options of one step of a group of matrices; those of `HyperSphereOptimizer` under the same names.

    Attributes:
        dtype: Type of the Newton-Schulz products; None chooses by device.
        factor: Muon's factor on `lr` for one shape of matrix, from `lr_convention`; not used on the sphere.
    """

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    preset: str
    retraction: str
    zero_gradient: str
    lr_convention: str
    maximize: bool
    compile: bool
    betas: tuple[float, float]
    dtype: torch.dtype | None
    factor: float = 1.0

    @property
    def sign(self) -> int:
        """Sign of the gradient in the momentum."""
        return -1 if self.maximize else 1

    def for_matrix(self, sides: tuple[int, int]) -> StepOptions:
        """Return the options with Muon's factor for matrices of these sides, `(out, in)`."""
        return replace(self, factor=CONVENTIONS[self.lr_convention](*sides))


def step_options(group: Mapping[str, Any]) -> StepOptions:
    """Read the options of a step from a param group.

    OneCycleLR and CyclicLR cycle `betas[0]`, if an optimizer has `betas`, and leave `max_momentum` in the groups that they
    cycle. There it is Muon's momentum as well, which would otherwise not be cycled at all.

    Raises:
        ValueError: If an option that is a name was changed in the group to an unknown one.
    """
    _check_choices(group)
    options = {field.name: group[field.name] for field in fields(StepOptions) if field.name not in ("dtype", "factor")}
    if "max_momentum" in group:
        options["momentum"] = group["betas"][0]
    return StepOptions(**options, dtype=COMPUTE_DTYPES.get(group["compute_dtype"]))


def checked(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with its options checked and converted to the plain types that a state dict should hold.

    Raises:
        ValueError: If an option is out of range or unknown, or LIGHTNING_MUE_CPU_DTYPE is.
        TypeError: If an option has the wrong type.
    """
    group = dict(group)
    for key in _NOT_OF_A_GROUP.keys() & group.keys():
        if key == "sphere" or group[key] not in (None, False):
            do = _NOT_OF_A_GROUP[key] or "Leave it out."
            raise value_error(key, found=f"{group[key]!r} in a param group", expected="an option of a group", do=do)
    _check_lr(group)
    for key, below in (("eps", math.inf), ("weight_decay", math.inf), ("momentum", 1.0)):
        require_number(key, group[key], at_least=0, below=below)
        group[key] = float(group[key])
    for key in ("nesterov", "maximize", "capturable", "compile"):
        require_type(key, group[key], bool, "true or false")
    if not isinstance(group["betas"], Sequence) or len(group["betas"]) != 2:
        raise value_error("betas", found=repr(group["betas"]), expected="two numbers in [0, 1)")
    for beta in group["betas"]:
        require_number("betas", beta, at_least=0, below=1)
    group["betas"] = tuple(map(float, group["betas"]))
    for key in ("compute_dtype", "state_dtype"):
        if group[key] is not None:
            group[key] = str(group[key]).removeprefix("torch.")
    _check_choices(group)
    fixed_choice()  # refuses an unknown type before the first step
    group["split"] = checked_split(group["split"])
    if group["normalize"] is not None:
        check_rows(group["split"])
    if group["radius"] is not None:
        require_number("radius", group["radius"], above=0, do="None keeps each matrix's own norm.")
    if "kind" in group:
        require_choice("kind", group["kind"], KINDS)
    return group


def check_keys(group: Mapping[str, Any], options: Collection[str]) -> None:
    """Refuse keys of a param group that look like an option's; warn of others that nothing here reads.

    Raises:
        ValueError: If a key is near the name of an option, or another name of one.
    """
    names = {*options, *_SYNONYMS, "params", "param_names", "kind", "name"}
    unknown = [key for key in group if key not in {*options, *_NOT_OF_A_GROUP, *_OTHER_KEYS}]
    for key in unknown:
        near = difflib.get_close_matches(str(key).lower(), sorted(names), n=1, cutoff=0.75)
        if near:
            meant = _SYNONYMS.get(near[0], near[0])
            do = f"Did you mean {meant!r}? Nothing reads {key!r}; if it is a note of your own, give it another name."
            raise value_error("param group", found=f"the key {key!r}", expected="options of the optimizer", do=do)
    if unknown:
        warnings.warn(
            f"param group: found the keys {listed([repr(key) for key in unknown])}, which are no options. They are kept in the "
            f"group, and have no effect here. Options are {listed(sorted(options), limit=30)}.",
            stacklevel=4,
        )


def checked_process_group(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """Return the process group that was given; "auto", of older configurations, means None.

    Raises:
        ValueError: If it is another string.
    """
    if group == "auto":
        warnings.warn(
            'process_group: found "auto", which means None: no rank shares its work. Under DDP pass '
            "torch.distributed.group.WORLD.",
            stacklevel=3,
        )
        return None
    if isinstance(group, str):
        raise value_error("process_group", found=repr(group), expected="a process group or None")
    return group


def check_adamw(options: dict[str, Any]) -> dict[str, Any]:
    """Return options after a check of `adamw_lr` and `adamw_weight_decay`, where they are given.

    Raises:
        ValueError: If one is negative or not finite.
        TypeError: If one is not a number.
    """
    for key in ("adamw_lr", "adamw_weight_decay"):
        if options.get(key) is not None:
            require_number(key, options[key], at_least=0)
    return options


def _check_lr(group: dict[str, Any]) -> None:
    if not (isinstance(group["lr"], Tensor) and group["capturable"]):
        do = "Pass a Python float, or set capturable." if isinstance(group["lr"], Tensor) else ""
        require_number("lr", group["lr"], at_least=0, do=do)
        group["lr"] = float(group["lr"])
    elif group["lr"].numel() != 1 or group["lr"].ndim > 1:
        found = f"a tensor of shape {list(group['lr'].shape)}"
        raise value_error("lr", found=found, expected="a number or a tensor of one number")


def _check_choices(group: Mapping[str, Any]) -> None:
    """Check the options that are names; they may have been changed in the group since they were given."""
    require_choice("preset", group["preset"], PRESETS)
    require_choice("compute_dtype", group["compute_dtype"], [None, *COMPUTE_DTYPES])
    require_choice("state_dtype", group["state_dtype"], [None, *STATE_DTYPES])
    require_choice("retraction", group["retraction"], RETRACTIONS)
    require_choice("normalize", group["normalize"], NORMALIZATIONS)
    require_choice("zero_gradient", group["zero_gradient"], ZERO_GRADIENTS)
    require_choice("lr_convention", group["lr_convention"], CONVENTIONS)
