"""The linear recurrent unit: complex decays that are constant in time."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int, real_number
from legato._dtypes import carry_dtype, without_autocast
from legato._shapes import Complex, Float, Tensor
from legato.layers.base import RecurrentLayer, StateShapes, never_narrowed
from legato.ops.recurrence import linear_recurrence


class LRUState(NamedTuple):
    """h_t as pairs of real and imaginary parts, in float32 or wider."""

    memory: Float[Tensor, "B N 2"]


class LRU(RecurrentLayer[LRUState]):
    """h_t = lambda h_{t-1} + gamma B x_t; y_t = Re(C h_t) + D x_t; lambda = exp(-exp(nu_log) + i exp(theta_log)).

    Each unit is a damped oscillation with its own learned frequency and decay, which do not depend
    on the input. The layer is linear and time-invariant, so put a non-linear layer after it.
    ``LegendreMemory`` is linear and time-invariant too, with one fixed system in place of learned
    frequencies; in ``GILR`` and the other gated layers the decay is real and depends on the input.

    Args:
        input_size: channels of x.
        hidden_size: complex units of the state, each two real numbers.
        output_size: channels of y; ``hidden_size`` by default. Where it equals ``input_size``, D is
            one number per channel, as in the paper, else a matrix.
        r_min, r_max: initial range of abs(lambda), uniform over that ring, within 0 to 1. The time
            constant of a unit is -1 / log(abs(lambda)) steps: about 10 for 0.9 and 1,000 for 0.999.
            For long inputs choose r_min near 0.9.
        max_phase: the initial phases of lambda are between 0 and max_phase, in radians per step,
            above 0; small values, such as pi / 10, suit inputs of many thousand steps.
        device, dtype: of B, C and D. The three logarithms below are float32 even in a 16-bit layer:
            16 bits would round a decay to one.

    Shapes: input (B, T, input_size), output (B, T, output_size), state.memory (B, hidden_size, 2). Complex matrices are
    stored as real pairs: B (hidden_size, 2, input_size), C (output_size, hidden_size, 2); nu_log, theta_log and
    gamma_log, the logarithm of gamma, (hidden_size,).

    Raises:
        ValueError: a size is below 1, max_phase is not above 0, or the range is not
            0 <= r_min <= r_max <= 1 with r_min < 1 and r_max > 0.

    Example:
        >>> layer = LRU(4, 256, r_min=0.9, r_max=0.999)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256, 2]))

    Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu & De 2023, arXiv 2303.06349, section 3
    and appendix A, also for the defaults and the initial weights. gamma is initially
    sqrt(1 - abs(lambda)^2), so that all units have the same variance for white noise as input.
    """

    State = LRUState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        output_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size)
        self.hidden_size = hidden_size = positive_int(hidden_size, "hidden_size")
        outputs = hidden_size if output_size is None else positive_int(output_size, "output_size")
        r_min, r_max = real_number(r_min, "r_min"), real_number(r_max, "r_max")
        max_phase = real_number(max_phase, "max_phase")
        if not 0 <= r_min <= r_max <= 1 or r_min == 1 or r_max == 0:
            raise ValueError(
                f"expected 0 <= r_min <= r_max <= 1, with r_min < 1 and r_max > 0, got {r_min} and {r_max}: "
                "they bound abs(lambda)"
            )
        if max_phase <= 0:
            raise ValueError(f"expected max_phase above 0 radians per step, got {max_phase}")
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": carry_dtype(dtype or torch.get_default_dtype())}
        self.B = nn.Parameter(torch.empty(hidden_size, 2, self.input_size, **where))
        self.C = nn.Parameter(torch.empty(outputs, hidden_size, 2, **where))
        self.D = nn.Parameter(
            torch.empty(outputs if outputs == self.input_size else (outputs, self.input_size), **where)
        )
        self.nu_log = nn.Parameter(torch.empty(hidden_size, **exact))
        self.theta_log = nn.Parameter(torch.empty(hidden_size, **exact))
        self.gamma_log = nn.Parameter(torch.empty(hidden_size, **exact))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again; see Source above."""
        n = self.hidden_size
        # In float64, which MPS lacks, and above zero, because the logarithms of a decay of 0 or 1
        # are not finite. rand_like, because the parameters may be sharded.
        dtype = torch.float32 if self.nu_log.device.type == "mps" else torch.float64
        radius, phase = (torch.rand_like(x, dtype=dtype).clamp(min=1e-12) for x in (self.nu_log, self.theta_log))
        nu = -0.5 * (radius * (self.r_max**2 - self.r_min**2) + self.r_min**2).log()  # -log abs(lambda)
        self.nu_log.copy_(nu.log())
        self.theta_log.copy_((phase * self.max_phase).log())
        self.gamma_log.copy_((-torch.expm1(-2 * nu)).log() / 2)
        nn.init.normal_(self.B, std=(2 * self.input_size) ** -0.5)
        nn.init.normal_(self.C, std=n**-0.5)
        nn.init.normal_(self.D, std=1 if self.D.ndim == 1 else self.input_size**-0.5)

    @property
    def output_size(self) -> int:
        """Channels of y."""
        return len(self.C)

    def decay(self) -> Complex[Tensor, "N"]:
        """lambda of each unit, in complex64 or wider."""
        nu, theta = (x.to(self._carry_dtype()).exp() for x in (self.nu_log, self.theta_log))
        return torch.complex(-nu, theta).exp()

    def _arguments(self) -> dict[str, Any]:
        return {"output_size": None if self.output_size == self.hidden_size else self.output_size}

    def _state_shapes(self) -> StateShapes:
        return ((self.hidden_size, 2),)

    def _sequence(self, x, state, lengths, reset):
        memory = None if state is None else state.memory
        # gamma is multiplied into the rows of B: B is smaller than B x_t.
        B = (self.gamma_log.exp()[:, None, None] * self.B).to(self.B.dtype)
        products = F.linear(x, B.flatten(0, 1)).to(self._carry_dtype())  # (B, T, N*2)
        with without_autocast(x):
            impulse = torch.view_as_complex(products.unflatten(-1, (self.hidden_size, 2)))  # (B, T, N)
            initial = None if memory is None else torch.complex(*memory.unbind(-1))
            states, final = linear_recurrence(self.decay(), impulse, initial, reset=reset)
        # Not view_as_real for the final state: its backward fails on an empty batch, where the
        # gradient of a sum has no stride.
        states, final = torch.view_as_real(states), torch.stack([final.real, final.imag], dim=-1)  # (B, T, N, 2)
        # Re(C h) = Re(C) Re(h) - Im(C) Im(h)
        C = torch.stack([self.C[..., 0], -self.C[..., 1]], dim=-1)
        direct = self.D * x if self.D.ndim == 1 else F.linear(x, self.D)
        output = F.linear(states.flatten(-2).to(x.dtype), C.flatten(1)) + direct
        return output.to(x.dtype), LRUState(states), LRUState(final)

    def _weight(self):
        return self.B

    def _apply(self, fn, recurse=True):
        return super()._apply(never_narrowed(fn, self.nu_log, self.theta_log, self.gamma_log), recurse)
