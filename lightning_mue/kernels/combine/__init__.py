"""The gate-weighted sum of the experts' outputs."""
