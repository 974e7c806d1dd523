"""Reads one model: its parameters and their roles, sizes, forward multipliers and initial weights."""
