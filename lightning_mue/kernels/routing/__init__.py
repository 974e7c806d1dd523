"""Router logits, gates and the choice of experts."""
