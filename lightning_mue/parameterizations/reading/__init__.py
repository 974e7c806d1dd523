"""What one model tells by itself: its parameters, their roles, sizes, forward multipliers and initial weights."""
