"""Every layer under FSDP2's mixed precision, where parameters and inputs have 16 bits and buffers stay wide."""

import copy

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

import bounds
from legato import GILR, LegendreMemory, Stack
from test_contract import build, every_layer


def trained(layer, x):
    output, state = layer(x)
    sum(value.float().square().sum() for value in (output, *pytree.tree_leaves(state))).backward()
    return output, state


@every_layer
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_layer_trains_in_mixed_precision(case, one_process):
    layer = build(case, torch.float32)
    x, wide = torch.randn(2, 9, layer.input_size), copy.deepcopy(layer).double()
    if not list(layer.parameters()):
        return  # nothing to shard
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output, state = trained(layer, x)

    def run(x, parameters):
        return torch.func.functional_call(wide, parameters, (x,))[0]

    # Weights, input and the results of matrix products are rounded to 16 bits, and theta is.
    given = dict(wide.named_parameters())
    bounds.assert_agrees(output, run, x, given, terms=2, dtype=torch.bfloat16)
    assert all(part.dtype == torch.float32 for part in pytree.tree_leaves(state))
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_memory_behind_a_narrow_layer_takes_its_output(one_process):
    stack = Stack(GILR(3, 4), LegendreMemory(4, 4, 6.0))
    fully_shard(stack, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output, _ = trained(stack, torch.randn(2, 9, 3))
    assert output.shape == (2, 9, 4, 4)
