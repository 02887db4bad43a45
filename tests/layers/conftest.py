import draws
import pytest
import torch

EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def agree():
    """A check that a layer is its equations, (output, memory) = equations(layer, x, memory), gradients included."""

    def check(layer, equations, batch=2, steps=25, terms=16, **options):
        """Each value is a sum of at most ``terms`` products a step: that many roundings of the largest."""
        for name, parameter in layer.named_parameters():
            if name == "bias":  # zero would hide its mistakes
                torch.nn.init.normal_(parameter)
        x = torch.randn(batch, steps, layer.input_size, dtype=torch.float64, requires_grad=True)
        state = layer.initial_state(batch)
        memory = torch.randn_like(state.memory).requires_grad_()
        sources = [x, memory, *layer.parameters()]
        output, state = layer(x, state._replace(memory=memory), **options)
        found = with_gradients(output, state.memory, sources)
        output, memory = equations(layer, x, memory, **options)
        for a, b in zip(found, with_gradients(output, memory, sources), strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=0, atol=terms * steps * EPS * max(1.0, b.abs().max().item()))

    return check


def with_gradients(output, memory, sources):
    """Both and the gradients of a weighted sum of both."""
    draws.seed(1)
    loss = (torch.randn_like(output) * output).sum() + (torch.randn_like(memory) * memory).sum()
    return [output, memory, *torch.autograd.grad(loss, sources)]
