"""State-space operations: `ssd`, `block_ssd`, `diagonal_scan` and their CPU paths."""
