"""The experts of transformers' own models computed by this package's kernels: ``experts_implementation="lightning_mue"``.

transformers 5 looks up by name what computes a model's experts, each time that they run. Modules, parameters and state dicts
stay as they are. Experts whose activation the fused kernels have run as one operator; the others as two grouped products with
the module's own gate, activation and norm between and after them.

Shape legend: T tokens, K experts per token, E experts, d width, h expert hidden width.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import mismatch, type_error, value_error
from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.dispatch.op import DispatchPlan, count_by_expert, plan_dispatch
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn
from lightning_mue.kernels.grouped_linear.op import grouped_linear
from lightning_mue.moe import autocast

#: The value of `experts_implementation`.
NAME = "lightning_mue"

#: What the fused kernels have of each function, gated and not gated (None: no kernel).
_KERNELS: dict[str, tuple[str | None, str | None]] = {
    "silu": ("swiglu", None),
    "gelu": ("geglu", "gelu"),
    "gelu tanh": ("geglu-tanh", "gelu-tanh"),
    "relu": (None, "relu"),
    "relu2": (None, "relu2"),
}
_OTHER = "Use experts_implementation='eager' for this model."


def register_experts() -> str:
    """Make this package's kernels an experts implementation of transformers, by the name "lightning_mue".

    Call it before a model is given the name: in `from_pretrained`, `from_config` or `set_experts_implementation`, which
    also changes models that exist. Calling it again changes nothing.

    Returns:
        The name.

    Raises:
        ImportError: transformers is not installed, or is older than the interface (5.0).

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, vocab_size=9)
        >>> model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **sizes))
        >>> model.set_experts_implementation(register_experts())
    """
    try:
        import transformers
    except ImportError as error:
        do = "Install it: pip install 'transformers>=5'."
        raise ImportError(mismatch("transformers", found="no such package", expected="version 5", do=do)) from error
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        do = "Upgrade it (pip install -U 'transformers>=5'), or replace the model's blocks with replace_moe_blocks(model)."
        expected = "version 5, whose experts have an interface"
        raise ImportError(mismatch("transformers", found=transformers.__version__, expected=expected, do=do)) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    Args:
        module: Of a class that transformers' `use_experts_implementation` decorates.
        hidden_states: [T, d].
        top_k_index: int64 [T, K], in [0, E); E or more: an expert on another device, which counts as zero.
        top_k_weights: [T, K], of any floating type.

    Returns:
        [T, d], of the type of `hidden_states`.

    Raises:
        ValueError: Gate and up are interleaved without a gate function that knows it.
        TypeError: The weights are not of a floating type that the kernels have.
        RuntimeError: An id is negative; as in the built-in "eager", on a GPU by an assertion there.
    """
    dtype = _compute_dtype(module, hidden_states)
    parts = {name: None if t is None else t.to(dtype) for name, t in _weights(module).items()}
    _refuse_negative(module, top_k_index)
    n_experts = len(module.down_proj)
    ids_TK = top_k_index.clamp(max=n_experts)
    gates_TK = top_k_weights.to(torch.promote_types(dtype, torch.float32))
    plan = plan_dispatch(ids_TK, count_by_expert(ids_TK, n_experts)[0])
    x, activation = hidden_states.to(dtype), _fused_activation(module)
    if activation is None:
        return _unfused(module, x, gates_TK, plan, parts).to(hidden_states.dtype)
    w_up, w_down, b_up, b_down = (parts[name] for name in ("w_up", "w_down", "b_up", "b_down"))
    assert w_up is not None
    assert w_down is not None
    with autocast.disabled(x.device.type):
        y = grouped_ffn(x, gates_TK, w_up, w_down, plan, b_up=b_up, activation=activation)
        if b_down is not None:  # sum_k gate_tk * b_down_e, as a product with the gates of all experts
            zeros = gates_TK.new_zeros(len(gates_TK), n_experts + 1)
            gates_TE = zeros.scatter_add(1, ids_TK, gates_TK)[:, :n_experts]
            y = y + (gates_TE @ b_down.to(gates_TE.dtype)).to(dtype)
    return y.to(hidden_states.dtype)


def _unfused(
    module: Any, x: Tensor, gates_TK: Tensor, plan: DispatchPlan, parts: Mapping[str, Tensor | None]
) -> Tensor:
    """[T, d]; all that is between the products is the module's own, and runs as autocast would have it."""
    w_up, w_down = parts["w_up"], parts["w_down"]
    assert w_up is not None
    assert w_down is not None
    with autocast.disabled(x.device.type):
        z_Sh = grouped_linear(x, w_up, plan, bias=parts["b_up"], by_token=True)
    a_Sh = module._apply_gate(z_Sh) if module.has_gate else module.act_fn(z_Sh)
    with autocast.disabled(x.device.type):
        y_Sd = grouped_linear(a_Sh.to(x.dtype), w_down, plan, bias=parts["b_down"])
    if module.has_post_expert_norm:
        y_Sd = module.post_expert_norm(y_Sd).to(x.dtype)
    return combine_rows(y_Sd, plan, gates_TK)


def _refuse_negative(module: nn.Module, ids_TK: Tensor) -> None:
    """Raise for ids below zero, without waiting for a GPU and without a graph break."""
    do = "Give absent choices the id num_experts, which counts as zero."
    message = mismatch(
        f"{type(module).__name__}.top_k_index", found="negative ids", expected="ids of 0 and more", do=do
    )
    torch._assert_async((ids_TK >= 0).all(), message)


def _fused_activation(module: Any) -> str | None:
    """The kernels' name of all that the module computes between and after its two products; None where they lack it."""
    from transformers.integrations.moe import _default_apply_gate

    own_gate = "_apply_gate" in module.__dict__ or type(module)._apply_gate is not _default_apply_gate
    if module.has_gate and not own_gate and not module.is_concatenated:
        found = "gate and up interleaved, and the default gate, which cuts in the middle"
        raise value_error(type(module).__name__, found=found, expected="a gate of its own (_apply_gate)", do=_OTHER)
    if module.has_post_expert_norm or (module.has_gate and own_gate):
        return None
    gated, plain = _KERNELS.get(_function_of(module.act_fn), (None, None))
    return gated if module.has_gate else plain


def _function_of(act: Any) -> str:
    """A key of `_KERNELS`, or "". By identity: a user's own `silu` may compute anything."""
    from transformers import activations

    if isinstance(act, functools.partial):
        tanh = act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}
        return "gelu tanh" if tanh else ""
    if not isinstance(act, nn.Module):
        functions = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"), (torch.relu, "relu"))
        return next((name for function, name in functions if act is function), "")
    hooks = (act._forward_pre_hooks, act._forward_hooks, act._backward_pre_hooks, act._backward_hooks)
    if "forward" in act.__dict__ or any(hooks):  # changed on this instance
        return ""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu tanh"}.get(act.approximate, "")
    classes = (
        (nn.SiLU, "silu"),
        (activations.SiLUActivation, "silu"),
        (activations.GELUActivation, "gelu"),
        (activations.GELUTanh, "gelu tanh"),
        (activations.NewGELUActivation, "gelu tanh"),
        (nn.ReLU, "relu"),
        (activations.ReLUSquaredActivation, "relu2"),
    )
    return next((name for kind, name in classes if type(act) is kind), "")


def _compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """The type of the products: autocast's, else the weights', as in transformers' own implementations."""
    dtype: torch.dtype = module.down_proj.dtype
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        name = re.sub("^torch.", "", str(dtype))
        expected = "float64, float32, bfloat16 or float16"
        raise type_error(f"{type(module).__name__}.down_proj", found=name, expected=expected, do=_OTHER)
    wanted = autocast.compute_dtype(x)
    return dtype if wanted is None or dtype == torch.float64 else wanted


def _weights(module: Any) -> dict[str, Tensor | None]:
    """The weights as `grouped_ffn` takes them, gate and up fused, and the biases; views where they are transposed."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.mT, down.mT
    found: dict[str, Tensor | None] = {"w_up": up, "w_down": down, "b_up": None, "b_down": None}
    if module.has_bias:
        found |= {"b_up": getattr(module, f"{name}_bias"), "b_down": module.down_proj_bias}
    return found
