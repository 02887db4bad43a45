"""The delay network: a linear system whose state is the Legendre coefficients of its recent input.

This module computes its matrices A and B, their discretisation in time steps, and the decoder of
the state. ``legato.ops.time_invariant`` computes the recurrence; the derivation is in
``docs/maths/delay-network.md``.
"""

import difflib
import math
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from legato._checks import positive_int


def delay_network(
    order: int, theta: float | int | Tensor | np.ndarray, *, discretizer: str = "zoh"
) -> tuple[Float[Tensor, "*channels N N"], Float[Tensor, "*channels N"]]:
    """m_t = A m_{t-1} + B u_t, such that u_{t - r theta} ~ sum_i P_i(2r - 1) m_t[i], r in [0, 1].

    Args:
        order: N, the number of Legendre coefficients, 1 or more.
        theta: length of the window in steps, 1 or more. A number, or a float tensor or NumPy array
            of shape () or (C,), with one window per channel. The result is differentiable in a
            tensor.
        discretizer: the discretisation of the continuous system with a step of one unit. "zoh"
            (input constant during a step; exact, the paper's choice), "bilinear" (Tustin) or
            "euler" (forward; unstable if theta is too short for the order).

    Returns:
        A (N, N) and B (N,) in float64, on the device of theta, or on torch's default device if
        theta is a number; with a leading axis C if theta is (C,).

    Raises:
        ValueError: order or theta out of range, unknown discretizer, or an unstable Euler system.
            Under ``torch.compile`` the values of a theta tensor are not checked.

    Example:
        >>> A, B = delay_network(6, theta=100)
        >>> A.shape, B.shape
        (torch.Size([6, 6]), torch.Size([6]))

    Source: Voelker, Kajic & Eliasmith 2019; Chilkuri & Eliasmith 2021, who use the zero-order hold
    ("zoh").
    """
    order = positive_int(order, "order")
    theta = _checked_theta(order, theta, discretizer)[..., None, None]
    generator = _generator(order, theta.device) / theta
    return _DISCRETIZERS[discretizer](generator)


def window_decoder(order: int, points: int) -> Float[Tensor, "points N"]:
    """D[k, i] = P_i(2 r_k - 1), r_k = k / (points - 1): D @ m_t approximates u_{t - r_k theta}.

    Args:
        order: N, the order of the memory, 1 or more.
        points: number of points in the window, evenly spaced from now (row 0) to theta steps ago
            (the last row), 1 or more.

    Returns:
        (points, N) in float64, on torch's default device.

    Raises:
        TypeError: order or points is not an integer.
        ValueError: order or points is below 1.

    Example:
        >>> window_decoder(3, 2)
        tensor([[ 1., -1.,  1.],
                [ 1.,  1.,  1.]], dtype=torch.float64)

    Source: Voelker, Kajic & Eliasmith 2019; the three-term recurrence of the Legendre polynomials.
    """
    order, points = positive_int(order, "order"), positive_int(points, "points")
    x = 2 * torch.linspace(0, 1, points, dtype=torch.float64) - 1
    columns = [torch.ones_like(x), x]
    for i in range(1, order - 1):
        columns.append(((2 * i + 1) * x * columns[i] - i * columns[i - 1]) / (i + 1))
    return torch.stack(columns[:order], dim=1)


def _generator(order: int, device: torch.device | None = None) -> Float[Tensor, "N N+1"]:
    """[A, B] of theta dm/dt = A m + B u: A_ij = (2i+1) (-1 if i < j else (-1)^(i-j+1)), B_i = (2i+1) (-1)^i."""
    i = torch.arange(order, device=device)[:, None]
    j = torch.arange(order, device=device)
    sign = torch.where(i < j, -1, 2 * ((i - j) % 2) - 1)
    ab = torch.cat([sign, 1 - 2 * (i % 2)], dim=1)
    return ((2 * i + 1) * ab).double()


# Discretisers: from [A, B] of dm/dt = A m + B u, (*channels, N, N + 1), to A and B of a unit time
# step.


def _zoh(generator: Tensor) -> tuple[Tensor, Tensor]:
    # exp [[A, B], [0, 0]] = [[exp A, A^-1 (exp A - I) B], [0, 1]] avoids the inverse of A, which is
    # ill-conditioned.
    exponential = _exponential_less_one(torch.nn.functional.pad(generator, (0, 0, 0, 1)))
    A, B = exponential[..., :-1, :-1], exponential[..., :-1, -1]
    return A + _identity(A), B


def _euler(generator: Tensor) -> tuple[Tensor, Tensor]:
    A, B = generator[..., :-1], generator[..., -1]
    return A + _identity(A), B


def _bilinear(generator: Tensor) -> tuple[Tensor, Tensor]:
    A, B = generator[..., :-1] / 2, generator[..., -1:]
    solution = torch.linalg.solve(_identity(A) - A, torch.cat([_identity(A) + A, B], dim=-1))
    return solution[..., :-1].clone(), solution[..., -1].clone()  # A and B own their storage


def _exponential_less_one(X: Tensor) -> Tensor:
    """exp(X) - I of a generator X with theta >= 1: Taylor series to X^16, then squarings.

    ``torch.matrix_exp`` has an error of 3e-11 here, and its backward pass needs a matrix of twice
    the size.
    """
    # The 1-norm of the generator is at most N^2 / theta, so for all theta of 1 or more, these
    # halvings reduce it to 1/2 or less. Squaring exp - I, not exp, avoids the loss of digits.
    halvings = math.ceil(math.log2(2 * X.shape[-1] ** 2))
    X = X / 2**halvings
    X2 = X @ X
    powers = [X, X2, X2 @ X, X2 @ X2]
    Z = torch.zeros_like(X)
    for j in (12, 8, 4, 0):
        Z = sum(powers[i] / math.factorial(i + j + 1) for i in range(4)) + powers[3] @ Z
    for _ in range(halvings):
        Z = 2 * Z + Z @ Z
    return Z


_DISCRETIZERS = {"zoh": _zoh, "euler": _euler, "bilinear": _bilinear}


def _identity(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)


def _checked_theta(order: int, theta: Any, discretizer: Any) -> Float[Tensor, "*channels"]:
    """theta as a float64 tensor, checked against order and discretizer."""
    if discretizer not in _DISCRETIZERS:
        nearest = difflib.get_close_matches(str(discretizer), _DISCRETIZERS, n=1, cutoff=0)
        raise ValueError(
            f"discretizer must be one of {', '.join(_DISCRETIZERS)}, got {discretizer!r}: did you mean {nearest[0]!r}?"
        )
    if isinstance(theta, np.ndarray):
        theta = torch.as_tensor(np.asarray(theta, dtype=np.float64), device="cpu")
    if isinstance(theta, Tensor):
        if theta.ndim > 1 or not theta.is_floating_point():
            raise ValueError(
                f"theta must be a number or a float tensor of shape () or (C,), got {theta.dtype} of shape "
                f"{tuple(theta.shape)}"
            )
        # Reading values would break a compiled graph; under vmap, the values of the plain tensor
        # are read.
        if torch.compiler.is_compiling() or theta.is_meta or theta.numel() == 0:
            return theta.double()
        shortest, longest = (float(end) for end in torch.func.debug_unwrap(theta.detach()).aminmax())
    elif isinstance(theta, Real) and not isinstance(theta, bool):
        shortest = longest = theta = float(theta)
    else:
        raise ValueError(f"theta must be a number or a float tensor, got {type(theta).__name__}")
    if not (math.isfinite(shortest) and math.isfinite(longest)):
        raise ValueError(f"theta must be finite, got {shortest}")
    if shortest < 1:
        raise ValueError(f"theta must be 1 step or more, got {shortest}: pass it in steps, not in seconds")
    if discretizer == "euler" and shortest < _least_euler_theta(order):
        raise ValueError(
            f"order {order} with the Euler discretizer is stable from theta = {_least_euler_theta(order):.6g}, got "
            f'{shortest}: use discretizer="zoh", which is stable for every theta'
        )
    # Not as_tensor, which would move a tensor to the default device.
    return theta.double() if isinstance(theta, Tensor) else torch.tensor(theta, dtype=torch.float64)


@lru_cache(maxsize=128)
def _least_euler_theta(order: int) -> float:
    """The smallest theta with |1 + z / theta| <= 1 for every eigenvalue z of the delay network."""
    z = torch.linalg.eigvals(_generator(order, torch.device("cpu"))[:, :-1])
    return float((z.abs() ** 2 / (-2 * z.real)).max())
