"""Muon on the Frobenius sphere for matrices, AdamW for the rest, in one optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.checks import require_choice, value_error
from lightning_mue.optim.distributed.agreement import check_replicas
from lightning_mue.optim.distributed.layout import Layout, layout_of
from lightning_mue.optim.finetuning.adding import match_names, new_groups, with_names
from lightning_mue.optim.finetuning.resuming import note_trainable, thaw
from lightning_mue.optim.groups import announce, describe, named, to_groups, unique_name, warn_of_guesses
from lightning_mue.optim.options import OWN, check_adamw, checked, checked_process_group, is_zero
from lightning_mue.optim.split import warn_of_other_splits
from lightning_mue.optim.state import check_loadable, prepare, restore_dtypes, state_bytes
from lightning_mue.optim.updates import update
from lightning_mue.parameterizations.reading.parameters import named_tensors
from lightning_mue.parameterizations.rules.kinds import KINDS, SPHERE_KINDS, parts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HyperSphereOptimizer(Optimizer):
    """Keeps every matrix at its initial Frobenius norm and turns it by a fixed angle at each step ("HyperP").

    Each param group has a `kind`:

    - `sphere`: Muon's orthogonalized momentum, a step of `lr` radii, and back onto the sphere. A tensor of three
      dimensions is a stack of matrices, each on its own sphere; of more, a convolution, one matrix `[out, rest]`.
    - `adam_sphere`: the same with Adam's direction instead of the orthogonalized one; for the unembedding.
    - `muon`: Muon without the sphere: `lr` times a factor of the shape, and decoupled weight decay.
    - `adamw`: `torch.optim.AdamW`; for embeddings, norms, biases, scalars.

    Groups without a `kind` are split into one group for each kind (`classify` in `groups.py` has the rules), and
    `describe()` returns the result. Because a step is relative to the matrix, the best `lr` does not depend on width, and
    `weight_decay` on the sphere has no effect to first order.

    Weights may be plain, replicated (DDP) or sharded (FSDP2, HSDP, experts sharded over ranks): a step is the same
    function of the whole weights in every layout. Ranks that hold parts of the same matrices share the work, and so do
    those that hold replicas (of plain parameters only in a `process_group`). All ranks must step the same parameters, in
    the same order. See docs/optimizer.md.

    Source: arXiv:2603.28743; docs/theory.md sections 5.1 and 5.2, and docs/derivations/hypersphere.md, for the step.

    Args:
        params: Parameters, (name, parameter) pairs, or group dicts, which may set `kind`, `name`, and any option below
            except the last two. Pairs (`model.named_parameters()`) let embeddings and heads be recognized by name.
        lr: Step in radii on the sphere (0.01 turns a matrix by about 0.01 rad); AdamW's learning rate otherwise. With
            `capturable`, also a tensor of one number.
        adamw_lr: Learning rate of `adamw` groups without an `lr` or `adamw_lr` of their own; None means `lr`.
        adamw_weight_decay: The same for `weight_decay`.
        momentum: Muon's momentum, in [0, 1).
        nesterov: Nesterov momentum.
        betas: Adam's decay rates, for `adamw` and `adam_sphere`.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        preset: Newton-Schulz schedule, a name in `PRESETS`.
        compute_dtype: Type of the Newton-Schulz products: "float32", "tf32", "bfloat16", "float16", "float64". None:
            float16 on CUDA, the faster of float32 and bfloat16 on a CPU (measured once), float32 elsewhere.
        state_dtype: Type of the momentum, "float32", "bfloat16" or "float64". None: the parameter's.
        retraction: "project" (the paper's: step, then scale back) or "geodesic" (rotate by exactly `lr` radians, up to
            weight decay).
        zero_gradient: What a matrix does whose gradient is exactly zero (an expert without tokens): "skip" leaves it as it
            is, "momentum" steps it by its momentum and decay, as the paper's code does.
        radius: Frobenius norm to keep. None: that of each matrix at its first step. Otherwise weights reach it with the
            first step that moves them.
        lr_convention: For `muon`, the factor on `lr` for a matrix [out, in]: "spectral" sqrt(out/in), "rms"
            0.2 sqrt(max(out, in)), "original" sqrt(max(1, out/in)) as torch.optim.Muon has it, "unit" 1.
        normalize: "neuron" scales rows of a direction by their second moments (decay `betas[1]`; arXiv:2510.05491).
        split: Parts of fused matrices: a number, a list of row sizes, "auto"; more forms in docs/optimizer.md.
        maximize: Ascend.
        capturable: Keep Adam's step counts on the device and never read a tensor's value, so that the step can be
            captured in a CUDA graph (after one step outside of it, which creates the state).
        compile: Run Newton-Schulz through `torch.compile`.
        sphere: Where groups are split by kind: False gives hidden matrices `muon` and the unembedding `adamw`.
        process_group: The ranks that hold replicas of the plain parameters and synchronize their gradients (DDP), which
            then share the orthogonalization of their matrices. None: every rank orthogonalizes all of its plain matrices,
            which is right in every setup, and redundant under DDP. "auto", of older configurations, means None.

    State of a parameter: `momentum` (`state_dtype`), `radius` (float32, or the parameter's float64; `[]`, `[E]`, with parts
    last) on the sphere, `row_square` with `normalize`; `exp_avg`, `exp_avg_sq`, `step` for Adam's kinds.
    It is created at the first step with a gradient, so weights may be reinitialized until then: the radius is the norm at
    that step. Options and kinds are read from `param_groups` at every step, except `radius`, `state_dtype` and (for the
    device of Adam's step counts) `capturable`, which are read when the state is created.

    Raises:
        ValueError: If an option is out of range, a `kind` or `preset` is unknown, or trainable weights are zero or not finite.
        TypeError: If an option has the wrong type, or a parameter is complex.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = HyperSphereOptimizer(layer.named_parameters(), lr=0.02)
        >>> [group["name"] for group in optimizer.param_groups]
        ['sphere', 'adamw']
    """

    _built = False
    _names: Mapping[Tensor, str] = {}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.01,
        *,
        adamw_lr: float | None = None,
        adamw_weight_decay: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        preset: str = "scheduled",
        compute_dtype: str | torch.dtype | None = None,
        state_dtype: str | torch.dtype | None = None,
        retraction: str = "project",
        zero_gradient: str = "skip",
        radius: float | None = None,
        lr_convention: str = "spectral",
        normalize: str | None = None,
        split: int | Sequence[int] | Mapping[str, Any] | str | None = None,
        maximize: bool = False,
        capturable: bool = False,
        compile: bool = False,
        sphere: bool = True,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "preset": preset, "compute_dtype": compute_dtype}
        defaults |= {
            "state_dtype": state_dtype,
            "retraction": retraction,
            "zero_gradient": zero_gradient,
            "radius": radius,
        }
        defaults |= {"lr_convention": lr_convention, "normalize": normalize, "split": split, "maximize": maximize}
        defaults |= {"capturable": capturable, "compile": compile}
        own = {"adamw_lr": adamw_lr, "adamw_weight_decay": adamw_weight_decay, "sphere": sphere}
        groups = to_groups(params)
        if not any(group["params"] for group in groups):
            raise value_error(
                "params", found="no parameters", expected="one", do="Build the layers before the optimizer."
            )
        self.process_group = checked_process_group(process_group)
        self._scratch_bytes = 0
        # The last three are among the defaults: a pickle keeps only these.
        super().__init__(groups, {**checked(defaults), **check_adamw(own)})
        self._built = True
        warn_of_guesses(groups)
        announce(self.param_groups, sphere=sphere)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that hold replicas of the plain parameters, with the same gradients, and share the work; or None.

        May be set at any time, on all ranks alike. The next step with a learning rate other than 0 checks once that the
        ranks agree on parameters, weights and gradients. In a copy or pickle of the optimizer it is None.
        """
        return self._process_group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._process_group = group
        self._replicas_checked = False
        self._layouts: dict[Tensor, Layout] = {}

    @property
    def mue_family(self) -> str:
        """Which table of a parameterization has its factors: "sphere", or "muon" off the sphere."""
        kinds = {part["kind"] for part in self._parts()}
        return "muon" if "muon" in kinds and not kinds & set(SPHERE_KINDS) else "sphere"

    def note_names(self, model: nn.Module) -> None:
        """Note a model's names for groups that are added without; MuECallback calls it. A copy does not have them."""
        self._names = {param: name for name, param in named_tensors(model).items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with or without names. It stays one group: of kind `mixed` if its parameters are of several kinds.

        Raises:
            ValueError: As the constructor does.
            TypeError: As the constructor does.
        """
        (given,) = to_groups([param_group])
        given = with_names(given, self._names)
        for group in new_groups(given, self.param_groups, self.defaults, built=self._built):
            group["name"] = unique_name(group["name"], (other["name"] for other in self.param_groups))
            match_names(group, self.param_groups)
            default = [key for key in OWN if key not in group]
            super().add_param_group(group)
            for key in default:  # put there by the base class; only the defaults should hold them
                self.param_groups[-1].pop(key, None)
        if self._built:
            warn_of_guesses([given], added=True)
            announce(parts_of(self.param_groups[-1]), sphere=self.defaults["sphere"], what="has this new group")
        self._replicas_checked = False

    def describe(self) -> str:
        """Return which parameter is in which group, and what decided it."""
        return describe(self._parts(), sphere=self.defaults["sphere"])

    def memory(self) -> dict[str, int]:
        """Return the bytes of this rank's state, by name, and of the last step's scratch memory."""
        return {**state_bytes(self.state), "scratch": self._scratch_bytes}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the parameters that have a gradient.

        Args:
            closure: Reevaluates the model with gradients and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ValueError: If a kind is unknown, weights are zero or not finite at their first step, or the ranks of `process_group`
                do not hold replicas.
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in (groups := self._parts()):
            require_choice("kind", group.get("kind"), KINDS)
        self._check_replicas()
        self._scratch_bytes = 0
        for group in groups:
            if params := prepare(group, self.state, self._layout):
                self._scratch_bytes = max(self._scratch_bytes, update(group, params, self.state, self._layout))
        return loss

    def _parts(self) -> list[Mapping[str, Any]]:
        return [part for group in self.param_groups for part in parts_of(group)]

    def _layout(self, param: Tensor) -> Layout:
        if param not in self._layouts:
            self._layouts[param] = layout_of(param, self._process_group)
        return self._layouts[param]

    def _check_replicas(self) -> None:
        """Check once that the ranks of the process group hold replicas, at the first step with a learning rate.

        Not at a step with lr 0, which shares nothing: restoring takes one before the weights are loaded. All groups
        decide, of any kind, so that a rank without matrices takes part. Weights on meta have no values to compare.
        """
        if any(param.is_meta for group in self.param_groups for param in group["params"]):
            return
        if self._replicas_checked or self._process_group is None or all(is_zero(g["lr"]) for g in self.param_groups):
            return
        check_replicas(self._parts(), self._process_group)
        self._replicas_checked = True

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state; of groups that were added also which parameters are `trainable`."""
        state_dict = super().state_dict()
        note_trainable(state_dict["param_groups"], self.param_groups)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, exactly.

        Raises:
            ValueError: If the state is another optimizer's, or its groups do not fit this one's.
        """
        pairs = [pair for group in self.param_groups for pair in named(group)]
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        check_loadable(state_dict["param_groups"], saved, pairs)
        warn_of_other_splits(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        for state, (_, param) in zip(saved, pairs, strict=True):
            if state:
                restore_dtypes(self.state[param], state, param)
        thaw(self.param_groups, self.state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict; options that an older version did not save get their defaults."""
        super().__setstate__(state)
        self._built = True
        self.defaults.pop("process_group", None)  # "auto" or None, of older versions
        if not hasattr(self, "_process_group"):
            self.process_group, self._scratch_bytes = None, 0
        for key, option in inspect.signature(type(self).__init__).parameters.items():
            if option.kind is option.KEYWORD_ONLY and key != "process_group":
                self.defaults.setdefault(key, option.default)
        for group in self.param_groups:
            group.setdefault("split", None)  # radii of an older version are those of whole matrices
            for key, value in self.defaults.items():
                if key not in (*OWN, "differentiable"):
                    group.setdefault(key, value)
