"""What happens to one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mue.parameterizations.reading.initializer import Init


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
