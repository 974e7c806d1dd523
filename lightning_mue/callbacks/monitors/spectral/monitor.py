"""SpectralMonitor: spectra of the weights, and how inputs align with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import Layers, Probe, find_modules, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.spectral.probes import MatrixProbe, QueryKeyProbe
from lightning_mue.checks import listed, require_integer, require_types
from lightning_mue.parameterizations import MATRIX_ROLES
from lightning_mue.parameterizations.planning.model_roles import read_parameters
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, module_form, role_patterns
from lightning_mue.parameterizations.reading.roles.queries import key_of
from lightning_mue.sharded import whole

#: Metric -> how it is summed up over the layers of a role.
_OVER_LAYERS = {
    "leading": ("mean", "max"),
    "stable_rank": ("mean", "min"),
    "alignment": ("mean", "max"),
    "minority_share": ("mean", "min"),
    "qk_entropy": ("mean", "min"),
}


class SpectralMonitor(SampledMonitor):
    """Logs spectra of the weights and how inputs align with them: early signs of an explosion, at the price of some products.

    Not in the configurations by default. Metrics for each matrix (``spectral/<metric>/<role>/<layer>``; the layer is the block's
    index where a role has one matrix a layer, else the parameter's name); of a stack of experts the worst:

    - ``leading``: largest singular value, by power iteration (`lightning_mue.diagnostics.leading_singular`) from the vectors of
      the sample before. ``stable_rank``: ``|W|_F^2 / leading^2``.
    - ``alignment``: mean over tokens of ``|cos(x, v)|`` of a matrix's inputs x with its leading right singular vector v.
      ``minority_share``: share of the tokens whose cosine has the rarer sign; falls to 0 before an explosion (arXiv:2510.04202).
      Not for stacks of experts, and not where the product is not made by ``linear``, e.g. in a fused kernel.
    - ``qk_entropy`` and ``qk_entropy_lowest_head``: entropy of the normalized squared singular values of ``W_q^T W_k``, mean over
      heads and lowest head, in nats (arXiv:2606.28116). Gains of QK-norms and rotations are not in it.

    Over the layers of a role: ``_mean``, and ``_max`` or ``_min``, whichever is the worse side. Under FSDP2 weights are read while
    their module runs, when they are whole; a weight that is still sharded then (tensor parallelism) is gathered, a collective each.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        iterations: Power iterations a sample, four times as many at the first.
        roles: Regular expression on parameter names -> role, before what is read.
        detail: "full" logs every layer, "brief" what is over layers and the worst layer; None: brief above 16 layers.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, or ``detail`` is something else; when fitting begins, for a pattern or role that
            is unknown.
    """

    looks_for = "trainable matrices whose role can be read; name it by pattern, e.g. roles: {'proj.weight': hidden}"
    category = "Spectral"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Leading singular value (largest layer)": [r"spectral/leading/[^/]+_max"],
        "Stable rank (lowest layer)": [r"spectral/stable_rank/[^/]+_min"],
        "Spectral alignment (largest layer)": [r"spectral/alignment/[^/]+_max"],
        "Share of tokens with the rarer sign (lowest layer)": [r"spectral/minority_share/[^/]+_min"],
        "QK spectral entropy (nats)": [r"spectral/qk_entropy/[^/]+_(mean|min)"],
    }

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        iterations: int = 4,
        roles: dict[str, str] | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        require_integer("iterations", iterations, 1)
        require_types(SpectralMonitor.__init__, locals())
        role_patterns(roles)
        self.iterations, self.roles = iterations, roles
        self._labels: list[str] = []

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every matrix, and the queries and keys of every attention."""
        infos = read_parameters(pl_module, self.roles)
        modules = find_modules(pl_module, lambda _: True)
        matrices: dict[str, dict[str, ParameterInfo]] = defaultdict(dict)
        for info in infos:
            if info.role in MATRIX_ROLES and info.trainable and len(info.shape) >= 2 and not info.part:
                matrices[str(info.role)][info.path] = info
        probes: list[Probe] = []
        for role, found in matrices.items():
            labels = layer_labels(found)
            for path, info in found.items():
                owner, leaf = _owner(info, modules)
                probes.append(MatrixProbe(f"{role}/{labels[path]}", owner, leaf, self.iterations))
        probes += _query_key_probes(infos, modules, pl_module)
        self._labels = [probe.label for probe in probes]
        return probes

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Mean over each role's layers, and the worst layer."""
        found: dict[str, float] = {}
        seen = {f"{group.split('/', 2)[2]}/{label}" for group, labels in layers.items() for label in labels}
        if unseen := [label for label in self._labels if label not in seen]:
            self._warn("unseen", f"saw no forward pass of the modules that hold {listed(unseen, limit=4)}.")
        for role in dict.fromkeys(label.partition("/")[0] for label in self._labels):
            for name, reductions in _OVER_LAYERS.items():
                found |= over_layers(layers, f"spectral/{name}/{role}", *reductions)
        return found


def _owner(info: ParameterInfo, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that runs to multiply by a parameter, of several that share it a linear layer, and its name there."""
    places = [name.rpartition(".")[::2] for name in (info.name, *info.also)]
    path, leaf = next((p for p in places if module_form(modules[p[0]]) == "linear"), places[0])
    around, _, own = path.rpartition(".")
    if isinstance(modules.get(around), nn.MultiheadAttention):  # reads its output layer's weight, without running it
        return modules[around], f"{own}.{leaf}"
    return modules[path], leaf


def _query_key_probes(
    infos: list[ParameterInfo], modules: Mapping[str, nn.Module], pl_module: LightningModule
) -> list[Probe]:
    found: dict[str, tuple[ParameterInfo, ParameterInfo, int, int]] = {}
    for info in infos:
        if info.trainable and (keys := key_of(info, infos, pl_module)) is not None:
            found[info.path] = (info, *keys)
    labels = layer_labels(found)
    probes: list[Probe] = []
    for path, (info, key, first, count) in found.items():
        owner, leaf = _owner(info, modules)
        key_owner, key_leaf = _owner(key, modules)
        rows = (0, info.query.rows[1]) if info.query is not None and info.query.rows is not None else (0, info.fans[1])
        read: Callable[[], tuple[Tensor, Tensor]] = partial(
            _read, info, (owner, leaf, *rows), (key_owner, key_leaf, first, count)
        )
        probes.append(QueryKeyProbe(f"{info.role}/{labels[path]}", owner, read))
    return probes


def _read(info: ParameterInfo, queries: Any, keys: Any) -> tuple[Tensor, Tensor]:
    """The rows of queries and keys by head, [H, k, d] and [G, k, d]."""
    query = info.query
    assert query is not None
    dim, period = (query.rows[0], query.rows[2]) if query.rows is not None else (0, None)
    found = []
    for owner, leaf, first, count in (queries, keys):
        weight = whole(owner.get_parameter(leaf).detach())
        rows = weight.T if dim == 1 or type(owner).__name__ == "Conv1D" else weight
        rows = rows.unflatten(0, (-1, period or len(rows)))[:, first : first + count]
        found.append(rows.flatten(0, 1).unflatten(0, (-1, query.head_dim)))
    return found[0], found[1]
