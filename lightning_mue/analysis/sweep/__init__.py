"""Sweeps of the learning rate over sizes, rules and seeds, with trials as processes and Optuna as storage."""
