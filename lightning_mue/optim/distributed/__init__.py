"""How the optimizer's work is divided among ranks."""
