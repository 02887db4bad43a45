"""A NaN or an infinity in the input of a layer leaves what came before it, and the other rows, as they are."""

import pytest
import torch
from torch.utils import _pytree as pytree

from legato.layers import LMU, LRU, LegendreMemory
from test_contract import (
    BATCH,
    SPLIT,
    STEPS,
    build,
    every_streaming_layer,
    flat,
    in_single_steps,
    inputs,
)

ROW = 1
every_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)


def spoiled(x, value):
    x = x.detach().clone()
    x[ROW, SPLIT, 1] = value
    return x.requires_grad_()


@every_value
@every_streaming_layer
def test_earlier_outputs_and_other_rows_are_unchanged(case, value):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    clean, found = (flat(layer(given, state)) for given in (x, spoiled(x, value)))
    loop = flat(in_single_steps(layer, spoiled(x, value), state, None, None))
    others = torch.arange(BATCH) != ROW
    for got, want, stepped in zip(found, clean, loop, strict=True):
        assert torch.equal(got[others], want[others])
        assert torch.equal(got.isfinite(), stepped.isfinite())
    if layer.return_sequences:
        assert torch.equal(found[0][:, :SPLIT], clean[0][:, :SPLIT])


@every_value
@every_streaming_layer
def test_a_reset_ends_what_is_spoiled(case, value):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[:, SPLIT + 3] = True
    clean, found = (flat(layer(given, state, reset=reset)) for given in (x, spoiled(x, value)))
    if layer.return_sequences:
        clean[0], found[0] = clean[0][:, SPLIT + 3 :], found[0][:, SPLIT + 3 :]
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got, want)


@every_streaming_layer
def test_a_reset_at_the_first_step_drops_a_spoiled_state(case):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[:, 0] = True
    bad = pytree.tree_map(lambda part: torch.full_like(part, torch.nan), state)
    for got, want in zip(flat(layer(x, bad, reset=reset)), flat(layer(x, state, reset=reset)), strict=True):
        assert torch.equal(got, want)


@every_value
@every_streaming_layer
def test_gradients_of_earlier_outputs_are_clean(case, value):
    layer = build(case)
    if not layer.return_sequences:
        return
    x, state, _, _ = inputs(layer)

    def gradients(x):
        output, _ = layer(x, state)
        return torch.autograd.grad(output[:, :SPLIT].square().sum(), [x, *pytree.tree_leaves(state)])

    found, clean = gradients(spoiled(x, value)), gradients(x)
    for got, want in zip(found, clean, strict=True):
        others = torch.arange(BATCH) != ROW
        assert torch.equal(got[others], want[others])
    # Elsewhere the gradient 0 of later outputs is multiplied by the slope of a gate or tanh at a NaN, which is NaN.
    if layer_is_linear_in_time(layer):
        assert torch.equal(found[0][:, :SPLIT], clean[0][:, :SPLIT])
        assert torch.equal(found[1], clean[1])


def layer_is_linear_in_time(layer):
    if isinstance(layer, LMU):
        return layer.encoder_activation == "identity" and layer.activation in ("identity", "relu")
    return isinstance(layer, LegendreMemory | LRU)
