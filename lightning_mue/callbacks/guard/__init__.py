"""StabilityGuard: sees a step that must not be taken before it is taken, and acts."""
