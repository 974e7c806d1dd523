"""Orthogonalization of batches of matrices: the schedules and the iteration."""
