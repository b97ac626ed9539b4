"""Reports on trained checkpoints: `python -m longctx_layers.reports`."""
