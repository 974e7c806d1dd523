"""One linear layer of all experts."""
