"""Interpret the arguments that transformers passes to a decoder; shared by `hf` and `convert`."""
