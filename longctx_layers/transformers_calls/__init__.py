"""What decoders built from these layers understand of the calls that transformers makes."""
