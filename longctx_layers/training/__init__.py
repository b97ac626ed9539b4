"""Training with Lightning: `python -m longctx_layers.training.train fit`."""
