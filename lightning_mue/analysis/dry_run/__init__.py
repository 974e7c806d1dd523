"""A dry run: what a training on many ranks needs and sends, computed by one process without memory for the weights."""
