"""Checks of whole models that the tests of both packages share: devices, deferred start, replicas, sharding."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

import draws


def start(model, *, parents_first):
    """Deferred initialisation: from the meta device, through memory that holds anything, by reset_parameters."""
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    modules = list(model.modules()) if parents_first else list(model.modules())[::-1]
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:  # nothing of its own is left without a start
            assert not [p for p in module.parameters(recurse=False) if p.numel()]
            assert not [b for b in module.buffers(recurse=False) if b.numel()]
    return model


def alike(found, expected):
    """Equal where nothing is drawn; drawn numbers from distributions of one size."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        assert not value.isnan().any(), name
        if other.numel() and (other == other.flatten()[0]).all():
            assert torch.equal(value, other), name
        elif other.numel() > 1000:
            assert 0.8 < value.double().std() / other.double().std() < 1.25, name


def replica(model):
    """As nn.DataParallel makes one: a copy of each module, with tensors in the place of its parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else copies[child]
        other._former_parameters = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                other._parameters[name] = None
            else:
                tensor = parameter.detach().clone().requires_grad_()
                setattr(other, name, tensor)
                other._former_parameters[name] = tensor
        for name, buffer in module._buffers.items():
            other._buffers[name] = None if buffer is None else buffer.clone()
    return copies[model]


def spoiled(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    return model


def assert_equal(found, expected):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_ignores_default_device(make, calls, elsewhere):
    draws.seed(0)
    model = make().eval()
    expected = [call() for call in calls(model)]
    elsewhere()
    assert_equal([call() for call in calls(model)], expected)


def assert_trains_on_its_own_device(make, calls, elsewhere):
    model = make().train()
    call = next(calls(model))
    elsewhere()
    sum(part.sum() for part in pytree.tree_leaves(call()) if part.is_floating_point()).backward()
    assert all(p.grad is None or not p.grad.is_meta for p in model.parameters())


def assert_starts_from_the_meta_device(make, calls, parents_first):
    model = make()
    start(model, parents_first=parents_first)
    assert not [name for name, value in model.state_dict().items() if value.isnan().any()]
    for call in calls(model.eval()):
        call()


def assert_replicas_have_their_own_tensors(make, calls):
    model = make().eval()
    expected = [call() for call in list(calls(model))[:2]]
    other = replica(model)
    spoiled(model)
    assert_equal([call() for call in list(calls(other))[:2]], expected)


def assert_tied_weights_are_one_parameter(model):
    inside = nn.Sequential(model)  # as in a task
    for module in (inside.to("meta").to_empty(device="cpu"), copy.deepcopy(inside), inside.double()):
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        assert len(names) == len(list(module.parameters())) + 1


def assert_trains_when_sharded(make, run, dtype):
    """``run`` gives an output by a call of the model, for which FSDP waits."""
    with torch.device("meta"):
        model = make().train()
    for name in ("layer", "encoder", "decoder"):  # sharded separately, as layers of large networks are
        if hasattr(model, name) and list(getattr(model, name).parameters()):
            fully_shard(getattr(model, name), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    start(model, parents_first=True)
    output = run(model)
    output.float().sum().backward()
    assert output.isfinite().all()
