"""Probes of what happens inside a module and is no module's output: they see the calls of functions while the module runs.

A `torch.overrides.TorchFunctionMode` is open from the module's pre-hook to its forward hook, in sampled steps only. It changes
nothing: it calls each function, and looks at the arguments and results of a few. Functions that a probe itself calls are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks.monitors.probes import Probe, is_measuring, measuring
from lightning_mue.moe.passes import records_gradients
from lightning_mue.sharded import is_sharded

#: What sees one call: (function, arguments, keywords, result).
See = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], None]

_MATMULS = frozenset({torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__})
_RIGHT = _MATMULS | {F.linear, torch.addmm}
_CASTS = frozenset({Tensor.to, Tensor.type, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.type_as})


class _Mode(TorchFunctionMode):
    def __init__(self, see: See, device: torch.device) -> None:
        super().__init__()
        self._see, self._device = see, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not is_measuring():
            with measuring(self._device):
                self._see(func, args, kwargs or {}, output)
        return output


class Handles:
    """Several hooks that are removed together."""

    def __init__(self, *handles: RemovableHandle | Any) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Removes them."""
        for handle in self.handles:
            handle.remove()


class WatchingProbe(Probe):
    """A probe of the function calls inside a module; a subclass defines `see` and, for what it keeps of one pass, `enter`, `leave`.

    Passes that do not count (`Probe.attach`) are not watched. ``scopes`` are the modules inside which calls are seen; of those
    inside each other the outermost that is called opens the pass.
    """

    def __init__(self, module: nn.Module, label: str, scopes: Sequence[nn.Module] = ()) -> None:
        super().__init__(module, label)
        self.scopes = tuple(scopes) or (module,)

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Nothing: outputs tell nothing here."""
        return None

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Look at one call."""

    def enter(self) -> None:
        """A pass through the scope begins."""

    def leave(self, output: Any) -> None:
        """A pass through the scope has ended, with this output; None after an exception."""

    def attach(self, device: torch.device) -> Any:
        """Hook the scopes and forget the previous step."""
        self.total, open_ = None, list[_Mode | None]()
        modes = {id(scope): scope.training for scope in self.scopes}

        def before(module: nn.Module, inputs: Any) -> None:
            counts = module.training == modes[id(module)] and records_gradients() and not any(open_)
            open_.append(_Mode(self.see, device) if counts else None)
            if (watch := open_[-1]) is not None:
                self.enter()
                watch.__enter__()

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            watched = open_.pop() if open_ else None
            if watched is not None:
                watched.__exit__(None, None, None)
                with measuring(device):
                    self.leave(output)

        handles = []
        for scope in self.scopes:  # first of all: where a later hook raises, `after` runs too
            handles.append(scope.register_forward_pre_hook(before, prepend=True))
            handles.append(scope.register_forward_hook(after, always_call=True))
        return Handles(*handles)


class WeightCalls:
    """Recognises products with one weight, also through casts and transposed views of it.

    Args:
        owner: The module that has the weight.
        leaf: Its name in there.
        classes: Outputs of a product that counts: the size of its last dimension.
    """

    def __init__(self, owner: nn.Module, leaf: str, classes: int) -> None:
        self._owner, self._leaf, self._classes = owner, leaf, classes
        self._casts: list[Tensor] = []

    def forget(self) -> None:
        """A new pass begins: what was cast before is gone."""
        self._casts = []

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        """The result of a product with the weight, its classes last; None for another call."""
        if func in _CASTS:
            if args and self._is_weight(args[0]) and isinstance(output, Tensor):
                self._casts.append(output)
            return None
        if not isinstance(output, Tensor):
            return None
        result = None
        on_the_right = args[2:3] if func is torch.addmm else args[1:2]
        if func in _RIGHT and any(self._is_weight(x) for x in (*on_the_right, *kwargs.values())):
            result = output
        elif func in _MATMULS and args and self._is_weight(args[0]) and output.ndim > 1:  # W x has the classes first
            result = output.mT
        elif func is torch.einsum:
            result = self._of_einsum(args, output)
        return result if result is not None and result.shape[-1] == self._classes else None

    def _of_einsum(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The classes are the index of the weight that is summed over nowhere, and is no other operand's."""
        operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        at = next((i for i, x in enumerate(operands) if self._is_weight(x)), None)
        if at is None or not isinstance(args[0], str) or "->" not in args[0]:
            return None
        given, result = args[0].replace(" ", "").split("->")
        terms = given.split(",")
        others = "".join(term for i, term in enumerate(terms) if i != at)
        own = [letter for letter in terms[at] if letter in result and letter not in others]
        if len(own) != 1:
            return None
        before, _, behind = result.rpartition("...")
        return output.movedim(behind.index(own[0]) - len(behind) if own[0] in behind else before.index(own[0]), -1)

    def _is_weight(self, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return False
        weight = getattr(self._owner, self._leaf, None)
        base = x._base if not is_sharded(x) else None
        return any(x is known or (base is not None and base is known) for known in (weight, *self._casts))
