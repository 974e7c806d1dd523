"""A target compared with its base: counterparts, factors, and the plan that holds them."""
