"""Hooks on any module of a transformers model, including the inner model."""

from __future__ import annotations

import torch
from support.hf_models import every_pattern, hf_model, some_ids
from torch import nn

from longctx_layers.transformers_calls.arguments import CACHE_NAME


@every_pattern
def test_every_module_is_called_once(pattern):
    """Except containers, which are never called."""
    model, seen = hf_model(*pattern, tie_embeddings=False), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda module, inputs, y, name=name: seen.append(name))
    expected = {n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    model(some_ids(2, 9))
    assert sorted(seen) == sorted(expected)


def test_hooks_on_the_inner_model_see_tokens_and_change_logits():
    model, ids, seen = hf_model("dpassm"), some_ids(2, 9), []
    expected = model(ids.flip(1), labels=ids).logits

    def flip(module, inputs):
        return (inputs[0].flip(1),)

    def double(module, inputs, y):
        seen.append((tuple(inputs[0].shape), tuple(y.shape)))
        return 2 * y

    model.model.register_forward_pre_hook(flip)
    model.model.register_forward_hook(double)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, 2 * expected)
    assert seen == [((2, 9), (2, 9, 13))]
    # The loss is computed from the logits that the hooks return.
    wanted = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wanted, check_dtype=False)
    first = model(ids[:, :4], use_cache=True)
    model(inputs_embeds=model.model.embedding(ids[:, 4:]), past_key_values=first[CACHE_NAME])
    model.model(ids)  # the inner model alone
    assert [shapes for shapes, _ in seen[1:]] == [(2, 4), (2, 5, 16), (2, 9)]


def test_backward_hooks_on_the_inner_model():
    model, seen = hf_model("blade"), []
    model.model.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    model(some_ids(2, 9), labels=some_ids(2, 9)).loss.backward()
    assert seen == [(2, 9, 13)]
