"""Checkpoints from which a killed run goes on: `SafeCheckpoint`, and what it is made of."""
