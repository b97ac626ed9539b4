"""Parts of `python -m longctx_layers.evals.synthetic`."""
