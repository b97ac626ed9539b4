"""Documents in, packed batches of tokens out: sources, tokenizers, store, packing, loaders."""
