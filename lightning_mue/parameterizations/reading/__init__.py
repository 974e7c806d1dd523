"""What a model is: its parameters, their roles, its sizes, and the base that it is compared with."""
