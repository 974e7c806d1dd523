"""Monomials in axis ratios: the language in which a paper's table is written down as data.

A cell such as ``"d^-1 L^(alpha-1) S"`` is a product of symbols, each raised to a power ``p + q*alpha``. Symbols stand
for the ratio target/base of an axis (docs/theory.md section 1), so at base size every cell is exactly 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from lightning_mue.checks import value_error

#: Symbol -> what its ratio compares. ``fan_in`` and ``fan_out`` are each parameter's own.
SYMBOLS: Mapping[str, str] = {
    "d": "width",
    "L": "depth",
    "H": "ffn_width",
    "h": "expert_width",
    "E": "n_experts",
    "a": "top_k",
    "A": "active_width",
    "k": "head_dim",
    "B": "batch_tokens",
    "T": "tokens",
    "S": "sqrt(batch_tokens / tokens)",
    "kappa": "top_k / n_experts",
    "alpha_ffn": "expert_width / width",
    "fan_in": "fan-in of the parameter",
    "fan_out": "fan-out of the parameter",
}

_FACTOR = re.compile(r"(?P<symbol>[A-Za-z_]+)(?:\^(?P<power>\([^()]+\)|-?[0-9./]+|-?alpha))?\Z")
_TERM = re.compile(r"([+-]?)(?:(\d+(?:/\d+|\.\d+)?)\*?)?(alpha)?")


@dataclass(frozen=True)
class Monomial:
    """A product of symbols with exponents that are linear in alpha.

    Attributes:
        powers: Symbol -> (constant, coefficient of alpha).
    """

    powers: Mapping[str, tuple[Fraction, Fraction]]

    def evaluate(self, ratios: Mapping[str, float], alpha: float = 1.0) -> float:
        """The product, exactly 1.0 when every ratio target/base (positive) is 1.

        Raises:
            KeyError: If a symbol with a non-zero exponent has no ratio.
        """
        value = 1.0
        for symbol, (constant, slope) in self.powers.items():
            exponent = float(constant) + float(slope) * alpha
            if exponent != 0.0:
                value *= ratios[symbol] ** exponent
        return value


def _exponent(text: str | None) -> tuple[Fraction, Fraction]:
    """Parses ``"-1/2"``, ``"alpha"`` or ``"(alpha-1)"`` into (constant, coefficient of alpha)."""
    if text is None:
        return Fraction(1), Fraction(0)
    body = text.strip("()").replace(" ", "")
    constant, slope, position = Fraction(0), Fraction(0), 0
    while position < len(body):
        match = _TERM.match(body, position)
        if match is None or match.end() == position or (position > 0 and not match[1]):
            expected = "a sum of numbers and multiples of alpha, e.g. (alpha-1)"
            raise value_error("exponent", found=repr(text), expected=expected)
        number = Fraction(match[2] or 1) * (-1 if match[1] == "-" else 1)
        if match[3]:
            slope += number
        else:
            constant += number
        position = match.end()
    return constant, slope


@cache
def parse(text: str) -> Monomial:
    """Parses a table cell.

    Args:
        text: Factors separated by spaces, each ``symbol`` or ``symbol^power``; ``"1"`` is the empty product.

    Returns:
        The monomial.

    Raises:
        ValueError: For an unknown symbol or an unreadable exponent, with the cell quoted.

    Example:
        >>> round(parse("d^-1 L^(alpha-1)").evaluate({"d": 4.0, "L": 2.0}, alpha=0.5), 4)
        0.1768
        >>> parse("A^1/2 d^-1").evaluate({"A": 16.0, "d": 4.0})
        1.0
    """
    powers: dict[str, tuple[Fraction, Fraction]] = {}
    for factor in text.split():
        if factor == "1":
            continue
        match = _FACTOR.match(factor)
        if match is None or match["symbol"] not in SYMBOLS:
            found = f"the factor {factor!r}, which cannot be read"
            raise value_error(f"cell {text!r}", found=found, expected=f"powers of {', '.join(SYMBOLS)}")
        constant, slope = _exponent(match["power"])
        old = powers.get(match["symbol"], (Fraction(0), Fraction(0)))
        powers[match["symbol"]] = (old[0] + constant, old[1] + slope)
    return Monomial(powers)
