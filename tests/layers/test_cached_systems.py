"""What a Legendre memory prepares of theta is used again only while theta has the value that it was prepared from."""

import copy

import pytest
import torch
from torch import nn

import bounds
from legato.layers import LMU, LegendreMemory, RecurrentLMU


def set_by_fused_optimizer(layer, values):
    layer.log_theta.grad = torch.ones_like(layer.log_theta)
    torch.optim.AdamW([layer.log_theta], lr=0.3, fused=True).step()


def set_by_foreach_optimizer(layer, values):
    layer.log_theta.grad = torch.ones_like(layer.log_theta)
    torch.optim.SGD([layer.log_theta], lr=0.3, foreach=True).step()


def set_by_vector(layer, values):
    nn.utils.vector_to_parameters(values.flatten(), [layer.log_theta])


def set_by_data(layer, values):
    layer.log_theta.data.copy_(values)


def set_by_new_data(layer, values):
    layer.log_theta.data = values.clone()


def set_by_numpy(layer, values):
    layer.log_theta.detach().numpy()[...] = values.numpy()


def set_by_new_parameter(layer, values):
    layer.log_theta = nn.Parameter(values.clone())


def set_by_load(layer, values):
    layer.load_state_dict(layer.state_dict() | {"log_theta": values})


def set_by_assigning_load(layer, values):
    layer.load_state_dict(layer.state_dict() | {"log_theta": values}, assign=True)


def set_by_average(layer, values):
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(layer))
    average.module.log_theta.data.copy_(values)
    with torch.no_grad():
        torch._foreach_lerp_(list(layer.parameters()), list(average.parameters()), 1.0)


def set_by_swap(layer, values):
    torch.utils.swap_tensors(layer.log_theta, nn.Parameter(values.clone()))


def set_by_inference(layer, values):
    with torch.inference_mode():
        layer.log_theta.copy_(values)


WAYS = [value for name, value in list(globals().items()) if name.startswith("set_by")]


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("theta", [20.0, [5.0, 9.0]])
def test_every_change_of_a_trained_theta_takes_effect(change, theta):
    layer = LegendreMemory(2, 4, theta, trainable_theta=True, dtype=torch.float64)
    x, state = torch.randn(1, 50, 2, dtype=torch.float64), layer.initial_state(1)
    with torch.no_grad():
        before = layer(x)[0]  # fills the cache, for sequences and steps
        layer.step(x[:, 0], state)
        layer.last(x)
    change(layer, layer.log_theta.detach() / 2)
    fresh = LegendreMemory(2, 4, theta, trainable_theta=True, dtype=torch.float64)
    fresh.log_theta.data.copy_(layer.log_theta.detach())
    with torch.no_grad():
        assert (layer(x)[0] - before).norm() > 1e-3 * before.norm()
        assert torch.equal(layer(x)[0], fresh(x)[0])
        assert torch.equal(layer.step(x[:, 0], state)[0], fresh.step(x[:, 0], state)[0])
        assert torch.equal(layer.last(x), fresh.last(x))


@pytest.mark.parametrize("build", [LMU, RecurrentLMU])
def test_a_changed_theta_takes_effect_in_layers_with_a_memory(build):
    layer = build(3, 4, order=4, theta=9.0, trainable_theta=True)
    x = torch.randn(1, 30, 3)
    with torch.no_grad():
        before = layer(x)[0]
        set_by_data(layer.memory, layer.memory.log_theta.detach() / 2)
        after = layer(x)[0]
    assert (after - before).norm() > 1e-3 * before.norm()
    assert torch.equal(after, copy.deepcopy(layer)(x)[0])


def test_an_untrained_log_theta_is_prepared_once(monkeypatch):
    layer = LegendreMemory(1, 4, 20.0, trainable_theta=True)
    prepared = []
    monkeypatch.setattr(layer, "_prepare", lambda *a, p=layer._prepare: prepared.append(a) or p(*a))
    x = torch.randn(1, 50, 1)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(prepared) == 1
    layer(x)  # with a graph to theta
    assert len(prepared) == 2
    layer.log_theta.requires_grad_(False)
    layer(x)
    assert len(prepared) == 2


@pytest.mark.parametrize("name", ["discretizer", "method", "order"])
def test_a_changed_option_takes_effect(name):
    layer = LegendreMemory(1, 4, 20.0, dtype=torch.float64)
    x = torch.randn(1, 50, 1, dtype=torch.float64)
    layer(x)
    setattr(layer, name, {"discretizer": "bilinear", "method": "toeplitz", "order": 3}[name])
    if name == "order":
        layer.scale = torch.ones(1, 3, dtype=torch.float64)
    fresh = LegendreMemory(1, layer.order, 20.0, discretizer=layer.discretizer, method=layer.method, dtype=x.dtype)
    assert torch.equal(layer(x)[0], fresh(x)[0])


@pytest.mark.parametrize("trainable", [True, False])
def test_replicas_on_other_devices_have_kernels_of_their_own(trainable):
    layer = LegendreMemory(3, 4, 5.0, trainable_theta=trainable)
    x = torch.randn(2, 20, 3)
    first, second = layer._replicate_for_data_parallel(), layer._replicate_for_data_parallel()
    second._buffers = {name: buffer.to("meta") for name, buffer in layer._buffers.items()}
    for name, parameter in layer.named_parameters():  # replicas have tensors in the place of parameters
        setattr(first, name, parameter.view_as(parameter))
        setattr(second, name, parameter.to("meta"))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(first(x)[0], layer(x)[0])
            assert second(x.to("meta"))[0].is_meta


def test_threads_on_one_layer_agree():
    from concurrent.futures import ThreadPoolExecutor

    layer = LMU(3, 4, order=4, theta=9.0)
    xs = [torch.randn(2, steps, 3) for steps in (1, 30, 65, 200, 64) * 8]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: layer(x)[0], xs))
        wide = copy.deepcopy(layer).double()
        for x, output in zip(xs, found, strict=True):  # chunks of another length add in another order
            bounds.assert_agrees(output, lambda x: wide(x)[0], x, terms=200 * 16)


def test_a_deferred_start_sets_scale_and_theta():
    layer = LMU(3, 8, order=4, theta=5.0, trainable_theta=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer.memory.window().item() == pytest.approx(5.0, rel=1e-6)
    assert (layer.memory.scale == 1).all()
