"""A layer as a third party would write it: an exponential moving average, without attention."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx_layers import Layer, register_layer
from longctx_layers.layers import Field
from longctx_layers.ops import diagonal_scan


class EMAState(NamedTuple):
    """The average `[B, d_model]`, and position and segment id of each row."""

    average: Tensor
    position: Tensor
    segment: Tensor


@register_layer("ema")
class EMA(Layer[EMAState]):
    """`h_t = a h_(t-1) + (1 - a) W_in x_t`, `y = W_out h`, with a learned rate per channel."""

    state_type = EMAState
    input_projection = "in_proj"
    output_projection = "out_proj"
    no_decay = ("rate",)

    def __init__(self, d_model, n_heads, *, dropout=0.0, device=None, dtype=None):
        super().__init__(d_model, dropout=dropout, device=device, dtype=dtype)
        self.in_proj = self.linear(d_model, d_model)
        self.out_proj = self.linear(d_model, d_model)
        self.rate = nn.Parameter(torch.empty(d_model, **self.factory))
        self.reset_parameters()

    @property
    def split_multiple(self):
        return 1

    def draw_own(self):
        nn.init.zeros_(self.rate)

    def fields(self):
        return {"average": Field((self.d_model,), "accumulator")}

    def flops_per_token(self, length):
        return 3 * self.d_model

    def mix(self, x, state, segments, offset):
        precise = torch.promote_types(x.dtype, torch.float32)
        log_decay = nn.functional.logsigmoid(self.rate.to(precise))
        u = self.in_proj(x) * -torch.expm1(log_decay).to(x.dtype)
        before = None if state is None else state.average
        h, average = diagonal_scan(u, log_decay, initial_state=before, segments=segments)
        return self.out_proj(h), {"average": average}
