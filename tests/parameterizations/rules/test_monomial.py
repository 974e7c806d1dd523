from __future__ import annotations

import math

import pytest

from lightning_mue.parameterizations.rules.monomial import SYMBOLS, parse

RATIOS = {"d": 4.0, "L": 2.0, "A": 3.0, "B": 8.0, "T": 2.0, "S": 2.0, "kappa": 0.25, "fan_in": 5.0}


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1", 1.0),
        ("d", 4.0),
        ("d^-1", 0.25),
        ("d^-1/2", 0.5),
        ("A^1/2 d^-1", math.sqrt(3) / 4),
        ("L^-1/2 T^-0.32 B^1/2", 2**-0.5 * 2**-0.32 * 8**0.5),
        ("L^(alpha-1)", 2**-0.25),
        ("L^-alpha", 2**-0.75),
        ("L^alpha", 2**0.75),
        ("L^(2*alpha-1)", 2**0.5),
        ("kappa A^-1 L^-alpha S^-1", 0.25 / 3 * 2**-0.75 / 2),
        ("d d^-1", 1.0),
        ("fan_in^-1/2", 5**-0.5),
    ],
)
def test_value(cell, value):
    assert parse(cell).evaluate(RATIOS, alpha=0.75) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("cell", ["d^-1 L^(alpha-1) S", "A^1/2 d^-1", "L^-1/2 T^-0.32 B^1/2"])
def test_is_exactly_one_at_the_base(cell):
    assert parse(cell).evaluate(dict.fromkeys(SYMBOLS, 1.0), alpha=0.7) == 1.0


@pytest.mark.parametrize("cell", ["x", "d^", "d^-", "d^(alpha", "d**2", "q^-1", "d^(alpha beta)"])
def test_unreadable_cell_is_quoted(cell):
    with pytest.raises(ValueError, match=r"cannot be read, expected powers of d, L|expected a sum"):
        parse(cell)
