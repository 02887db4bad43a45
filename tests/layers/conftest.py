import pytest
import torch

import bounds
import draws


@pytest.fixture
def agree():
    """A check that a layer is its equations, (output, memory) = equations(layer, x, memory), gradients included."""

    def check(layer, equations, batch=2, steps=25, terms=16, **options):
        """Each value is a sum of at most ``terms`` products a step, right to likely roundings; both have errors."""
        for name, parameter in layer.named_parameters():
            if name == "bias":  # zero would hide its mistakes
                torch.nn.init.normal_(parameter)
        x = torch.randn(batch, steps, layer.input_size, dtype=torch.float64, requires_grad=True)
        memory = torch.randn_like(layer.initial_state(batch).memory).requires_grad_()

        def one_pass(x, memory):
            output, state = layer(x, layer.initial_state(batch)._replace(memory=memory), **options)
            return with_gradients(output, state.memory, [x, memory, *layer.parameters()])

        exact = with_gradients(*equations(layer, x, memory, **options), [x, memory, *layer.parameters()])
        counts = [2 * bounds.likely(y.numel(), terms=terms * steps) for y in exact]
        magnitude = bounds.sensitivity(one_pass, x, memory)
        bounds.assert_close(one_pass(x, memory), exact, magnitude=magnitude, roundings=counts)

    return check


def with_gradients(output, memory, sources):
    """Both and the gradients of a weighted sum of both."""
    draws.seed(1)
    loss = (torch.randn_like(output) * output).sum() + (torch.randn_like(memory) * memory).sum()
    return [output, memory, *torch.autograd.grad(loss, sources)]
