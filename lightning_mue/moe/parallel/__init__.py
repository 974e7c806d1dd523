"""Expert parallelism: every rank holds some of the experts."""
