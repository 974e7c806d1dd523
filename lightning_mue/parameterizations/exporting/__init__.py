"""A plan in the terms of another code base: parameter groups, initial weights, multipliers, with no need of this package."""
