"""What a layer holds in 32 bits or more stays so, with its gradients, however the layer is converted or moved."""

import pytest
import torch

import draws
from legato import LRU
from legato.layers.base import never_narrowed

WIDE = ("nu_log", "theta_log", "gamma_log")
CONVERSIONS = {
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "float8": lambda layer: layer.to(torch.float8_e4m3fn),
    "meta in bfloat16": lambda layer: layer.to("meta", torch.bfloat16),
    "double and back": lambda layer: layer.double().bfloat16(),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "double": lambda layer: layer.double(),
    "empty": lambda layer: layer.bfloat16().to("meta").to_empty(device="cpu"),
}


def trained():
    draws.seed(0)
    layer = LRU(3, 8)
    layer(torch.randn(2, 5, 3))[0].sum().backward()
    return layer


@pytest.fixture(params=["data", "new parameters", "swapped"])
def _way(request):
    """How ``nn.Module`` converts parameters: their data, by new parameters, or by a swap of both."""
    future = torch.__future__
    setters = future.set_overwrite_module_params_on_conversion, future.set_swap_module_params_on_conversion
    for setter, way in zip(setters, ("new parameters", "swapped"), strict=True):
        setter(request.param == way)
    yield
    for setter in setters:
        setter(False)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_logarithms_of_decays_and_their_gradients_stay_wide(conversion):
    layer, before = trained(), trained()
    conversion(layer)
    emptied = layer.nu_log.is_meta or bool(layer.nu_log.isnan().any())
    for name, parameter in layer.named_parameters():
        if name in WIDE:
            assert parameter.dtype.itemsize >= 4, name
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype, name
            assert parameter.grad.device == parameter.device, name
        if name in WIDE and parameter.grad is not None and not emptied:
            assert torch.equal(parameter.float(), getattr(before, name))
            assert torch.equal(parameter.grad.float(), getattr(before, name).grad)


@pytest.mark.usefixtures("_way")
def test_training_goes_on_in_sixteen_bits():
    layer = trained()
    optimizer = torch.optim.Adam(layer.parameters())
    optimizer.step()
    layer.bfloat16()
    torch.optim.Adam(layer.parameters()).step()
    layer(torch.randn(2, 5, 3, dtype=torch.bfloat16))[0].sum().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())


def test_narrowed_logarithms_are_still_computed_with_in_float32():
    """As under mixed precision that narrows every parameter for the forward pass."""
    layer = LRU(3, 8)
    narrow = {name: p.detach().bfloat16().requires_grad_() for name, p in layer.named_parameters()}
    output, state = torch.func.functional_call(layer, narrow, torch.randn(2, 5, 3, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in narrow.values())


def test_a_buffer_can_be_wide_too():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("window", torch.tensor([1001.0]))
    fn = never_narrowed(lambda x: x.bfloat16(), module.window)
    assert fn(module.window).dtype == torch.float32
    assert fn(module.weight).dtype == torch.bfloat16
