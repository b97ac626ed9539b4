"""The language model: configuration, blocks, sizes, generation, saving."""
