"""Parts of examples/evaluate.py and examples/proofs.py."""
