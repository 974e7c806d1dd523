"""What a rule does to a model: the plan, how its cells are evaluated, and how it is shown."""
