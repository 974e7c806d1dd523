"""What each parameter does, from its name, position and shape, and which parameters can carry a forward multiplier."""
