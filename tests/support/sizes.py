"""Sizes of programs with which the interpreted tests run the kernels."""

from longctx_layers.kernels import (
    attention_backward,
    attention_forward,
    conv_silu,
    diagonal,
    gated_norms,
    ssd_backward,
    ssd_configs,
    ssd_forward,
)

# Small programs, so that short inputs have many of them, and edges.
TILES = {"default": attention_forward.Choices(*[attention_forward.Tiles(16, 16, 4, 1)] * 4)}
SPANS = {"default": ssd_configs.Choices(*[ssd_configs.Tiles(16, 2, 256, 4, 4)] * 4)}
SIZES = {
    attention_forward: {"FORWARD": TILES, "DECODE": TILES},
    attention_backward: {"QUERIES": TILES, "KEYS": TILES, "FAR": TILES},
    conv_silu: {"TOKENS": 8, "CHANNELS": 4},
    diagonal: {"TILE": 16, "CHANNELS": 4},
    gated_norms: {"ELEMENTS": 32},
    ssd_backward: {"CONFIGS": SPANS, "HEADS": 3},
    ssd_forward: {"CONFIGS": SPANS},
}

# Lengths around the edges of these programs, by operation.
LENGTHS = {
    "block_ssd": [1, 16, 17, 33],
    "conv_silu": [1, 2, 3, 5, 7, 8, 9, 17],
    "diagonal_scan": [1, 2, 15, 16, 17, 33, 40],
    "sparse_attention": [1, 2, 15, 16, 17, 33, 40],
    "ssd": [1, 16, 17, 33],
    "gated_norms": [1, 2, 7, 8, 9, 17],
}
