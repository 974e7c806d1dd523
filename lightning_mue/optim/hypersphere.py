"""Muon on the Frobenius sphere for matrices, AdamW for the rest, in one optimizer."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_mue.optim.announcement import announce
from lightning_mue.optim.coefficients import get_preset
from lightning_mue.optim.distributed.layout import Layout, layout_of
from lightning_mue.optim.distributed.pieces import as_state, local_grad, norms, total, world
from lightning_mue.optim.distributed.sharding import orthogonalize_sharded
from lightning_mue.optim.groups import (
    check_loadable,
    classify,
    describe,
    label,
    named,
    split_group,
    to_groups,
    unique_name,
    warn_of_guesses,
)
from lightning_mue.optim.newton_schulz import Pool, default_dtype, math_dtype, orthogonalize_chunk, tf32_products
from lightning_mue.optim.options import (
    COMPUTE_DTYPES,
    STATE_DTYPES,
    check_choices,
    check_kind,
    check_number,
    checked,
)
from lightning_mue.optim.step import (
    Batch,
    Matrix,
    Step,
    accumulate,
    adam_direction,
    as_matrices,
    direction,
    move,
    moving,
    muon_update,
    write_back,
)
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS, MUON_KINDS, SPHERE_KINDS
from lightning_mue.sharded import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

#: Options of the optimizer, not of a group.
_OWN = ("adamw_lr", "sphere", "process_group")

#: Bytes of whole matrices that are communicated and stepped together; what bounds scratch where weights are sharded.
_ROUND_BYTES = 1 << 30


class HyperSphereOptimizer(Optimizer):
    """Keeps every matrix at its initial Frobenius norm and turns it by a fixed angle a step ("HyperP").

    Each param group has a `kind`:

    - `sphere`: Muon's orthogonalized momentum, a step of `lr` radii, and back onto the sphere. A tensor of three
      dimensions is a stack of matrices, each on its own sphere; of more, a convolution, one matrix `[out, rest]`.
    - `adam_sphere`: the same with Adam's direction in place of the orthogonalized one; for the unembedding.
    - `muon`: Muon without the sphere: `lr` times a factor of the shape, and decoupled weight decay.
    - `adamw`: `torch.optim.AdamW`; for embeddings, norms, biases, scalars.

    Groups without a `kind` are split into one group a kind (see `classify` in `grouping.py` for the order of
    decisions), and `describe()` says what went where. Because a step is relative to the matrix, the best `lr` does not
    depend on width, and `weight_decay` on the sphere has no effect to first order.

    Weights may be plain, replicated (DDP) or sharded (FSDP2, HSDP, experts over ranks): a step is the same function of
    the whole weights in every layout, and ranks that hold the same or parts of the same share out the work. All ranks
    must step the same parameters, in the same order. See docs/optimizer.md.

    Source: arXiv:2603.28743, and theory.md sections 4.7, 5.1 and 5.2 for the step in full.

    Args:
        params: Parameters, (name, parameter) pairs, or group dicts, which may set `kind`, `name`, and any option below
            but the last two. Pairs (`model.named_parameters()`) let embeddings and heads be recognized by name.
        lr: Step in radii on the sphere (0.01 turns a matrix by about 0.01 rad); AdamW's learning rate otherwise. With
            `capturable`, also a tensor of one number.
        adamw_lr: Learning rate of `adamw` groups that do not bring their own; None means `lr`.
        momentum: Muon's momentum, in [0, 1).
        nesterov: Nesterov momentum.
        betas: Adam's decay rates, for `adamw` and `adam_sphere`.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        preset: Newton-Schulz schedule, a name in `PRESETS`.
        compute_dtype: Type of the Newton-Schulz products: "float32", "tf32", "bfloat16", "float16", "float64". None:
            float16 on CUDA, bfloat16 on a CPU that has matrix units for it (AMX), float32 elsewhere.
        state_dtype: Type of the momentum, "float32" or "bfloat16". None: the parameter's.
        retraction: "project" (the paper's: step off, then scale back) or "geodesic" (rotate by exactly `lr` radians,
            but for weight decay).
        radius: Frobenius norm to keep. None: the one that each matrix has at its first step. Otherwise weights come
            to it with the first step that moves them.
        lr_convention: For `muon`, what `lr` multiplies, for a matrix [out, in]: "spectral" sqrt(out/in), "rms"
            0.2 sqrt(max(out, in)), "original" sqrt(max(1, out/in)) as torch.optim.Muon has it, "unit" 1.
        maximize: Ascend.
        capturable: Keep Adam's step counts on the device and never read a tensor's value, so that the step can be
            captured in a CUDA graph (after one step outside of it, which creates the state).
        compile: Run Newton-Schulz through `torch.compile`.
        sphere: Where groups are split by kind: False gives hidden matrices `muon` and the unembedding `adamw`.
        process_group: Which ranks hold copies of the plain parameters and synchronize their gradients, so that they
            may share out the work. "auto": all ranks, for those parameters whose weights and gradients agree on all of
            them at one of the first steps (1, 2, 4, ... 64). None: nothing is shared.

    State of a parameter: `momentum` (`state_dtype`) and `radius` (float32, or float64 with float64 parameters; `[]`, or
    `[E]` for a stack) on the sphere; `exp_avg`, `exp_avg_sq`, `step` for Adam's kinds, and `radius` for `adam_sphere`.
    It is created at the first step with a gradient, so weights may be initialized anew until then: the radius is the
    norm at that step. Options and kinds are read from `param_groups` at every step, but `radius` and `state_dtype` (and
    `capturable`, for the device of Adam's step counts) only when the state is made.

    Raises:
        ValueError: If an option is out of range, a `kind` or `preset` is unknown, or a trainable matrix is zero.
        TypeError: If an option has the wrong type, or a parameter is complex.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = HyperSphereOptimizer(layer.named_parameters(), lr=0.02)
        >>> [group["name"] for group in optimizer.param_groups]
        ['sphere', 'adamw']
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.01,
        *,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        preset: str = "scheduled",
        compute_dtype: str | torch.dtype | None = None,
        state_dtype: str | torch.dtype | None = None,
        retraction: str = "project",
        radius: float | None = None,
        lr_convention: str = "spectral",
        maximize: bool = False,
        capturable: bool = False,
        compile: bool = False,
        sphere: bool = True,
        process_group: ProcessGroup | str | None = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "preset": preset,
            "compute_dtype": compute_dtype,
            "state_dtype": state_dtype,
            "retraction": retraction,
            "radius": radius,
            "lr_convention": lr_convention,
            "maximize": maximize,
            "capturable": capturable,
            "compile": compile,
        }
        if adamw_lr is not None:
            check_number("adamw_lr", adamw_lr)
        if isinstance(process_group, str) and process_group != "auto":
            raise ValueError(f"process_group must be a process group, 'auto' or None; found {process_group!r}.")
        groups = to_groups(params)
        if not any(group["params"] for group in groups):
            raise ValueError("params is empty: there is nothing to optimize. Are the model's layers made yet?")
        self._start(process_group)
        # The last three are among the defaults because they are all that a pickle keeps beside groups and state. A
        # process group cannot be pickled: a copy shares nothing out, rather than to wait for ranks that have no copy.
        kept = process_group if process_group == "auto" else None
        own = {"adamw_lr": adamw_lr, "sphere": sphere, "process_group": kept}
        super().__init__(groups, {**checked(defaults), **own})
        warn_of_guesses(groups)
        announce(self.param_groups, sphere=sphere)

    def _start(self, process_group: ProcessGroup | str | None) -> None:
        """Set what is not saved."""
        self._process_group = process_group
        #: The plain parameters that the ranks of the process group hold copies of.
        self._copies: set[Tensor] = set()
        self._asked = 0  # how often they were looked for
        self._ask = True  # whether to look for them in this step
        self._layouts: dict[Tensor, Layout] = {}
        self._scratch_bytes = 0

    @property
    def mue_family(self) -> str:
        """In which table of a parameterization this optimizer's factors stand: "sphere", or "muon" off the sphere."""
        kinds = {group["kind"] for group in self.param_groups}
        return "muon" if "muon" in kinds and not kinds & set(SPHERE_KINDS) else "sphere"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by kind if it does not set `kind` (so more than one group may be added).

        Raises:
            ValueError: As the constructor does.
            TypeError: As the constructor does.
        """
        (param_group,) = to_groups([param_group])
        if "kind" in param_group:
            check_kind(param_group)
        start = sum(len(group["params"]) for group in self.param_groups)
        for index, (name, param) in enumerate(named(param_group), start):
            kind = param_group.get("kind", classify(name, param, sphere=self.defaults["sphere"])[0])
            if kind != "adamw" and param.requires_grad:
                _check_matrix(param, label(name, param, f"number {index}"), kind)
        _check_unique(param_group, self.param_groups)
        options = {key: value for key, value in self.defaults.items() if key not in _OWN}
        for group in split_group(param_group, self.defaults["adamw_lr"], sphere=self.defaults["sphere"]):
            group = checked({**options, **group})
            group["name"] = unique_name(group["name"], (other["name"] for other in self.param_groups))
            super().add_param_group(group)
            for key in _OWN:  # put there by the base class; only the defaults should hold them
                self.param_groups[-1].pop(key, None)

    def describe(self) -> str:
        """Return which parameter is in which group, and what decided it."""
        return describe(self.param_groups, sphere=self.defaults["sphere"])

    def memory(self) -> dict[str, int]:
        """Return the bytes of this rank's state and of the scratch that the last step took, by name."""
        found: dict[str, int] = defaultdict(int)
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found[key] += local(value).nbytes
        return {**found, "scratch": self._scratch_bytes}

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
            ValueError: If a group's kind is unknown, or a matrix met for the first time is zero.
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = {"sphere": self._muon, "muon": self._muon, "adam_sphere": self._adam_sphere, "adamw": self._adamw}
        self._scratch_bytes = 0
        self._ask = True
        for group in self.param_groups:
            kind = check_kind(group)
            if params := self._prepare(group):
                updates[kind](group, params)
        return loss

    def _prepare(self, group: Mapping[str, Any]) -> list[Tensor]:
        """Return the group's parameters with a gradient, each with the state that its kind needs."""
        params, new = [], []
        for index, param in enumerate(group["params"]):
            if param.grad is None or (param.numel() == 0 and not is_sharded(param)):
                continue
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{_label_in(group, index)} has a sparse gradient, which this optimizer does not take. Build "
                    "its embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )
            if group["kind"] in SPHERE_KINDS and "radius" not in self.state[param]:
                new.append((param, _label_in(group, index)))
            _add_missing(self.state[param], param, group)
            params.append(param)
        self._add_radii(new, group)
        return params

    def _add_radii(self, new: Sequence[tuple[Tensor, str]], group: Mapping[str, Any]) -> None:
        params = [param for param, _ in new]
        for (param, what), norm_E in zip(new, norms(params, [self._layout(param) for param in params]), strict=True):
            _check_radius(param, norm_E, what)
            radius_E = norm_E if group["radius"] is None else torch.full_like(norm_E, group["radius"])
            self.state[param]["radius"] = as_state(radius_E, param)

    def _layout(self, param: Tensor) -> Layout:
        if param not in self._layouts:
            group = self._process_group if param in self._copies else None
            if group == "auto":
                group = torch.distributed.group.WORLD
            self._layouts[param] = layout_of(param, group)  # type: ignore[arg-type]
        return self._layouts[param]

    def _find_copies(self) -> None:
        """Find out which plain parameters are held by all ranks; a collective, at steps 1, 2, 4, ... 64.

        More than once, because a gradient that is still zero (behind a projection that starts at zero) or missing tells
        nothing. The steps depend on nothing that could differ between ranks.
        """
        self._ask = False
        self._asked += 1
        if world() == 1 or self._process_group is None or self._asked > 64 or self._asked.bit_count() > 1:
            return
        groups = [group for group in self.param_groups if group["kind"] in MUON_KINDS]
        plain = [param for group in groups for param in group["params"] if not is_sharded(param)]
        params = [param for param in plain if param not in self._copies]
        copies = set(params)
        if self._process_group == "auto":
            from lightning_mue.optim.distributed.replicas import find_copies

            copies = {p for p, copied in zip(params, find_copies(params), strict=True) if copied}
        if copies:
            self._copies |= copies
            self._layouts = {}
            # Not by the launcher's environment, which spawned processes do not have.
            log = logger.info if torch.distributed.get_rank() == 0 else logger.debug
            counts = len(self._copies), len(plain), world()
            log("HyperSphereOptimizer: %d of %d plain matrices are shared out over %d ranks.", *counts)

    def _muon(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        step = _step_of(group)
        if self._ask and not step.stands:
            self._find_copies()
        whole: list[Tensor] = []
        spread: list[Tensor] = []
        for param in params:
            layout = self._layout(param)
            (spread if layout.sum_groups or layout.copy_group or layout.gather else whole).append(param)
        buckets: dict[Any, list[Tensor]] = defaultdict(list)
        for param in whole:
            buckets[as_matrices(local(param)).shape[1:], param.dtype, param.device].append(param)
        with tf32_products(group["compute_dtype"] == "tf32"):
            for members in buckets.values():
                pool = Pool()  # of one shape, lest it keep what the others need no more
                items = [self._matrix(param, group) for param in members]
                factor = CONVENTIONS[group["lr_convention"]](*self._layout(members[0]).matrix)
                muon_update(items, replace(step, factor=factor), pool)
                self._scratch_bytes = max(self._scratch_bytes, pool.nbytes)
            for members in _rounds(spread):
                self._muon_spread(group, members, step)

    def _matrix(self, param: Tensor, group: Mapping[str, Any]) -> Matrix:
        state = self.state[param]
        radius = local(state["radius"]) if group["kind"] in SPHERE_KINDS else None
        momentum = local(state["exp_avg" if group["kind"] == "adam_sphere" else "momentum"])
        return Matrix(local(param), local_grad(param), momentum, radius)

    def _muon_spread(self, group: Mapping[str, Any], params: Sequence[Tensor], step: Step) -> None:
        """Step parameters that other ranks hold too, or parts of; a collective."""
        layouts = [self._layout(param) for param in params]
        items = [self._matrix(param, group) for param in params]
        for item in items:
            accumulate([item.momentum], [item.grad], step)
        if step.stands:
            return
        schedule = get_preset(step.preset)
        dtype = step.dtype or default_dtype(items[0].weight)

        def orthogonalize(u_Boi: Tensor) -> Tensor:
            return orthogonalize_chunk(u_Boi, schedule, dtype, Pool(), compile=step.compile)

        wide = [torch.empty_like(item.weight, dtype=math_dtype(item.weight.dtype)) for item in items]
        for item, u in zip(items, wide, strict=True):
            direction(item.momentum, item.grad, step, out=u)
        for done in orthogonalize_sharded(layouts, wide, orthogonalize, dtype=dtype):
            for index, result in done:
                wide[index].copy_(result)  # all of it has been sent
        self._scratch_bytes = max(self._scratch_bytes, sum(u.nbytes for u in wide))
        if group["kind"] == "sphere":
            _move(items, layouts, wide, step)
            return
        for item, layout, u in zip(items, layouts, wide, strict=True):
            _move([item], [layout], [u], replace(step, factor=CONVENTIONS[group["lr_convention"]](*layout.matrix)))

    def _adam_sphere(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        step = _step_of(group)
        for param in params:
            state, item = self.state[param], self._matrix(param, group)
            options = {key: group[key] for key in ("betas", "eps", "maximize")}
            wide = adam_direction(item.grad, item.momentum, local(state["exp_avg_sq"]), state["step"], **options)
            if not step.stands:
                _move([item], [self._layout(param)], [wide], step)

    def _adamw(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        states = [self.state[param] for param in params]
        capturable = group["capturable"] and all(param.device.type != "cpu" for param in params)
        lr = group["lr"]
        if isinstance(lr, Tensor) and not capturable:
            lr = lr.item()  # torch refuses a tensor here
        adamw(
            [local(param) for param in params],
            [local_grad(param) for param in params],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            capturable=capturable,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, exactly.

        Raises:
            ValueError: If the state is another optimizer's, or its groups do not fit this one's.
        """
        pairs = [pair for group in self.param_groups for pair in named(group)]
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        check_loadable(state_dict["param_groups"], saved, pairs)
        super().load_state_dict(state_dict)
        for state, (_, param) in zip(saved, pairs, strict=True):
            # torch has cast these to the parameter's dtype; a radius in bfloat16 would move the sphere.
            for key in ("radius", "momentum"):
                if key in state:
                    self.state[param][key] = state[key].to(device=param.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict; options that an older version did not save get their defaults."""
        super().__setstate__(state)
        if not hasattr(self, "_layouts"):
            self._start(self.defaults.get("process_group", "auto"))
        signature = inspect.signature(type(self).__init__).parameters
        for key in (key for key, option in signature.items() if option.kind is option.KEYWORD_ONLY):
            self.defaults.setdefault(key, signature[key].default)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key not in (*_OWN, "differentiable"):
                    group.setdefault(key, value)


def _step_of(group: Mapping[str, Any]) -> Step:
    check_choices(group)  # they may have been changed in the group
    keys = ("lr", "momentum", "nesterov", "weight_decay", "preset", "retraction", "maximize", "compile")
    return Step(**{key: group[key] for key in keys}, dtype=COMPUTE_DTYPES.get(group["compute_dtype"]))


def _move(items: Sequence[Matrix], layouts: Sequence[Layout], wide: Sequence[Tensor], step: Step) -> None:
    """Step parameters, or this rank's parts of them, along directions that are overwritten."""
    weights = [as_matrices(item.weight) for item in items]
    counts = total(layouts, [moving(as_matrices(item.grad)).to(torch.float64) for item in items])
    radii = [None if item.radius is None else item.radius.reshape(-1) for item in items]
    batches = [
        Batch([w_Eoi], as_matrices(u), radius_E, count_E > 0)
        for w_Eoi, u, radius_E, count_E in zip(weights, wide, radii, counts, strict=True)
    ]
    move(batches, step, lambda sums: total(layouts, sums))
    write_back([item.weight for item in items], weights)


def _rounds(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into rounds of one dtype and of `_ROUND_BYTES` at most in the math type, the same on all ranks.

    A parameter that is larger has a round of its own. The dtype decides on the type of a round's products.
    """
    batch: list[Tensor] = []
    size = 0
    for param in params:
        more = param.numel() * math_dtype(param.dtype).itemsize  # of the whole parameter, wherever its pieces are
        if batch and (size + more > _ROUND_BYTES or param.dtype != batch[0].dtype):
            yield batch
            batch, size = [], 0
        batch.append(param)
        size += more
    if batch:
        yield batch


def _label_in(group: Mapping[str, Any], index: int) -> str:
    """Say in a message which parameter of an optimizer's group is meant."""
    names, place = group.get("param_names"), f"number {index} of group '{group.get('name', group['kind'])}'"
    return label(names[index] if names else None, group["params"][index], place)


def _check_unique(group: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that no parameter comes twice, before anything is changed.

    Raises:
        ValueError: If one does.
    """
    seen = {param for other in groups for param in other["params"]}
    for name, param in named(group):
        if param in seen:
            raise ValueError(f"{label(name, param)} is given twice. Give each parameter once, in one group.")
        seen.add(param)


def _check_matrix(param: Tensor, what: str, kind: str) -> None:
    """Check that a parameter can live on a sphere; a sharded one is asked at its first step only.

    Raises:
        ValueError: If it is a vector or scalar, or one of its matrices is zero.
    """
    if param.ndim < 2:
        raise ValueError(
            f"{what} is not a matrix, so it cannot be in a group of kind '{kind}'. Give it to a "
            "group of kind 'adamw', or leave `kind` out."
        )
    if kind in SPHERE_KINDS and not is_sharded(param) and not param.is_meta and param.numel():
        with torch.no_grad():
            _check_radius(param, norms([param], [layout_of(param)])[0], what)


def _check_radius(param: Tensor, norm_E: Tensor, what: str) -> None:
    if not param.is_meta and bool((norm_E == 0).any()):
        which = f", matrix {int((norm_E == 0).nonzero()[0])} of the stack," if param.ndim == 3 else ""
        raise ValueError(
            f"{what}{which} is zero (its Frobenius norm is 0), so it has no direction to keep on a sphere. Initialize "
            "it with random values, or put it in a group of kind 'adamw'."
        )


def _add_missing(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Create the buffers that the group's kind needs, where missing; those of another kind stay."""
    if group["kind"] in MUON_KINDS:
        if "momentum" not in state:
            dtype = STATE_DTYPES.get(group["state_dtype"], param.dtype)
            state["momentum"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    elif "step" not in state:
        on_device = group["capturable"] and param.device.type != "cpu"
        state["step"] = torch.tensor(0.0, device=param.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
