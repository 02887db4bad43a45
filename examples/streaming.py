"""Train an LMU to estimate the time since the last pulse, then run it on a stream, step by step."""

import torch
from torch import nn

import legato

torch.manual_seed(0)
WINDOW = 40


def pulses(batch: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pulses, and the time since the last one as a fraction of the window: both (B, T, 1)."""
    x = (torch.rand(batch, steps, 1) < 0.03).float()
    since = torch.full((batch, 1), float(WINDOW))
    ages = []
    for t in range(steps):
        since = torch.where(x[:, t] > 0, 0.0, since + 1)
        ages.append(since.clamp(max=WINDOW) / WINDOW)
    return x, torch.stack(ages, 1)


layer, readout = legato.LMU(1, 64, order=24, theta=WINDOW, activation="tanh"), nn.Linear(64, 1)
layer.calibrate(pulses(64, 300)[0])
optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=5e-3)
for update in range(301):
    x, age = pulses(32, 200)
    loss = (readout(layer(x)[0]) - age).square().mean()  # all 200 steps in parallel
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if update % 100 == 0:
        print(f"update {update:3d}   mean squared error {loss.item():.4f}")

x, age = pulses(1, 500)
with torch.inference_mode():
    parallel = readout(layer(x)[0])
    state, worst = layer.initial_state(batch_size=1), 0.0
    for t in range(500):
        output, state = layer.step(x[:, t], state)  # as the samples arrive
        worst = max(worst, (readout(output) - parallel[:, t]).abs().item())
print(
    f"stream of 500 steps: error {(parallel - age).square().mean():.4f}, largest difference from parallel {worst:.1e}"
)
