"""How a plan is applied: initial weights, parameter groups, and scaled groups for one optimizer step."""
