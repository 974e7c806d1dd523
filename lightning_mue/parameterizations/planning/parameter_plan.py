"""What a plan does to one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mue.parameterizations.reading.initial.initializer import Init


@dataclass(frozen=True)
class FoldedRows:
    """A forward multiplier that some rows of a parameter carry: those of a fused matrix that make an attention's queries.

    The rows are drawn ``factor`` times as large, and trained as if the multiplier stood behind them (`ScaledStep`).

    Attributes:
        dim: The dimension of the parameter that has the rows.
        count: The first so many of them ...
        period: ... of every so many.
        factor: The multiplier.
    """

    dim: int
    count: int
    period: int
    factor: float


@dataclass(frozen=True)
class ParameterPlan:
    """What happens to one parameter.

    Attributes:
        name: Fully qualified name.
        role: Its role.
        shape: Its shape.
        base: The base's parameter that it scales from, or None (a router whose base is dense).
        init: How it is drawn.
        lr: Factor on the group's learning rate.
        weight_decay: Factor on the group's weight decay.
        eps: Factor on Adam's epsilon.
        kind: The update it gets (``adamw``, ``sgd``, ``sphere``, ``adam_sphere``, ``muon``).
        source: The paper of its row, with table or section, and the page of docs/ that derives it.
        base_shape: Shape of the base's parameter; of its hidden matrices for one that the base lacks.
        tied: Every expert of the layer starts from the same draw.
        init_factor: The std (or constant) that is planned over the base's.
        rows: Some of its rows carry a forward multiplier. The other fields hold for the parameter without it.
        carried: The forward multiplier that the whole of it carries; the other fields are with it.
        trainable: False if it is frozen: then nothing of this is applied.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    base: str | None
    init: Init
    lr: float
    weight_decay: float
    eps: float
    kind: str
    source: str
    base_shape: tuple[int, ...] | None = None
    tied: bool = False
    init_factor: float = 1.0
    rows: FoldedRows | None = None
    carried: float = 1.0
    trainable: bool = True
