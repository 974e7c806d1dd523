"""What the papers say: roles, axes, monomials, and one table of literal data a rule."""
