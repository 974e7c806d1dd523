"""How parameters were drawn: followed while the base is built, or recognised from its values."""
