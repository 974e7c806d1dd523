"""What a verification tells of a value that a sound plan would have kept."""

from __future__ import annotations

from dataclasses import dataclass

_WHAT = {
    "share": "what it adds to the residual stream at initialization, relative to the stream and summed over the layers as the rule "
    "does",
    "update": "what one optimizer step of it changes in the residual stream",
    "input": "what it adds to the input of the first layer",
    "input update": "what one optimizer step of it changes in the input of the first layer",
    "output update": "what one optimizer step of it changes in the model's output",
    "attention update": "what one optimizer step changes in the attention logits",
    "output": "the model's output at initialization",
    "gradient": "its gradient, against which Adam's eps counts here,",
}


@dataclass(frozen=True)
class Deviation:
    """A measured value that a sound plan would have kept.

    Attributes:
        quantity: ``share``, ``update``, ``input``, ``input update``, ``output update``, ``attention update`` or ``output``.
        parameter: Name of one parameter, or of the model.
        role: Its role, empty for a quantity of the whole model.
        source: The row of the table that was applied.
        ratio: Target's value over the base's.
        expected: What the rule makes of it.
        cause: The likely cause, and what to do.
    """

    quantity: str
    parameter: str
    role: str
    source: str
    ratio: float
    expected: float
    cause: str

    def __str__(self) -> str:
        of = f"{self.parameter} ({self.role}; {self.source})" if self.role else self.parameter
        return (
            f"{of}: {_WHAT[self.quantity]} is {self.ratio:.3g} times the base's, expected about {self.expected:.3g} times. "
            f"{self.cause}"
        )
