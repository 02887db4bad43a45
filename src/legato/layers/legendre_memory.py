"""The Legendre memory: the last theta steps of the input as ``order`` coefficients per channel.

``legato.legendre`` computes its matrices A and B, and ``legato.ops.time_invariant`` the recurrence.
The layer caches the prepared system of A and B. ``lmu.py`` adds an encoder and a read-out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from legato._checks import positive_int
from legato._dtypes import without_autocast
from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._fused import transforms_are_active
from legato.layers._repr import constructor_arguments
from legato.layers.base import RecurrentLayer, StateShapes, full_parameter, never_narrowed, zero_padding
from legato.legendre import delay_network
from legato.ops.time_invariant import METHODS, PreparedSystem, apply, prepare

#: The window in steps: one number, or one per channel.
Theta = float | int | Sequence[float | int] | np.ndarray | Tensor


class LegendreMemoryState(NamedTuple):
    """m_t without the factor ``scale``, in float32 or wider."""

    memory: Float[Tensor, "B C N"]


class LegendreMemory(RecurrentLayer[LegendreMemoryState]):
    """output_t = scale * m_t, m_t = A m_{t-1} + B u_t in every channel.

    m_t are the Legendre coefficients of u over the last theta steps: coefficient i multiplies the
    shifted polynomial P_i(2r - 1) in the approximation of u_{t - r theta}, r in [0, 1]; see
    ``legato.legendre.window_decoder``. The coefficients differ in size by a factor of ten and more,
    which slows down the training of the layers that read them. ``calibrate`` sets ``scale`` so that
    each has a standard deviation of one. The state is not scaled, so it stays valid after
    ``calibrate``.

    Args:
        input_size: C, channels of the input, each with its own memory.
        order: N, Legendre coefficients per channel, 1 or more.
        theta: length of the window in steps, 1 or more: a number, or a sequence or tensor with one
            per channel.
        discretizer: "zoh", "euler" or "bilinear"; see ``legato.legendre.delay_network``.
        trainable_theta: learn theta = 1 + exp(log_theta), so that an optimiser changes theta - 1
            proportionally and theta stays above one step. A and B are then computed again whenever
            theta has changed or gets a gradient.
        return_sequences: True returns m_t at every step. False returns m at the last valid step, by
            equation (25).
        method: the algorithm: "sequential" (19), "toeplitz" (24), "fft" (26), "chunked"; None
            chooses one.
        device, dtype: of the scale, hence of the input; theta itself is float32 or wider.

    Shapes: input (B, T, input_size), output (B, T, input_size, order) or (B, input_size, order), state.memory
    (B, input_size, order).

    Example:
        >>> layer = LegendreMemory(input_size=1, order=6, theta=100)
        >>> memory, state = layer(torch.randn(8, 500, 1))
        >>> memory.shape, state.memory.shape
        (torch.Size([8, 500, 1, 6]), torch.Size([8, 1, 6]))

    Source: Voelker, Kajic & Eliasmith 2019, (1) to (3); Chilkuri & Eliasmith 2021, (19), (24) to
    (26). The scale is our addition.
    """

    State = LegendreMemoryState

    scale: Tensor  # (C, N)
    log_theta: nn.Parameter  # (1,) or (C,), if trainable_theta

    def __init__(
        self,
        input_size: int,
        order: int,
        theta: Theta,
        *,
        discretizer: str = "zoh",
        trainable_theta: bool = False,
        return_sequences: bool = True,
        method: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size)
        self.order = positive_int(order, "order")
        self.discretizer = discretizer
        self.trainable_theta = bool(trainable_theta)
        self.return_sequences = bool(return_sequences)
        refuse_method_without_sequences(method, return_sequences)
        if method is not None and method not in METHODS:
            raise ValueError(f"expected method to be None or one of {', '.join(METHODS)}, got {method!r}")
        self.method = method
        window = _window(theta, self.input_size)
        delay_network(self.order, window, discretizer=discretizer)  # raises on invalid combinations
        if trainable_theta and window.min() <= 1:
            raise ValueError(f"expected a trainable theta to start above 1 step, got {window.min().item()}")
        self.register_buffer("scale", torch.ones(self.input_size, self.order, device=device, dtype=dtype))
        #: The window in steps as Python numbers; of a trained theta the initial value.
        self._theta = window.tolist()
        if trainable_theta:
            # One window has shape (1,), not (): a scalar cannot be sharded over processes.
            log_theta = (window - 1).log().reshape(-1)
            self.log_theta = nn.Parameter(log_theta.to(self.scale.device, self._carry_dtype()))
        self._cache: dict[tuple[str, torch.device], _Cached] = {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scale to one and a trained theta to its initial value; a fixed theta stays."""
        self.scale.fill_(1)
        if self.trainable_theta:
            window = torch.tensor(self._theta, dtype=torch.float64, device=self.log_theta.device)
            with full_parameter(self.log_theta) as log_theta:
                log_theta.copy_((window - 1).log())

    def extra_repr(self) -> str:
        """The constructor arguments that are not defaults; of a trained theta the initial value."""
        return constructor_arguments(self, {"theta": self._theta}, named=("theta",))

    @property
    def output_size(self) -> tuple[int, int]:
        """(input_size, order)."""
        return self.input_size, self.order

    def window(self) -> Float[Tensor, "*channels"]:
        """theta in steps, float64, of shape () or (C,); differentiable if theta is trained."""
        if self.trainable_theta:
            window = 1 + self.log_theta.double().exp()
            return window if isinstance(self._theta, list) else window[0]
        return torch.tensor(self._theta, dtype=torch.float64, device=self.scale.device)

    def get_extra_state(self) -> Tensor:
        """A fixed theta, for state_dict: other weights depend on it. Empty if theta is trained."""
        window = [] if self.trainable_theta else self._theta
        return torch.tensor(window, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Load the fixed theta of a state_dict."""
        expected = self.get_extra_state().shape
        if not isinstance(state, Tensor) or state.shape != expected:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise (ValueError if isinstance(state, Tensor) else TypeError)(
                f"expected a theta of shape {tuple(expected)} in the state_dict, got {got}: build the layer with as "
                "many windows, and as trainable, as the one that was saved"
            )
        if not self.trainable_theta:
            self._theta = state.tolist()

    def prepared(self, steps: int, *, last_only: bool = False) -> PreparedSystem:
        """The prepared system for up to ``steps`` steps; cached unless theta is being trained."""
        return self._cached("last" if last_only else "sequence", steps)

    def transition(self) -> tuple[Float[Tensor, "*channels N N"], Float[Tensor, "*channels N"]]:
        """A transposed, and B, of m_t = m_{t-1} @ A + u_t * B, in the dtype of the state."""
        step = self._cached("step", 1)
        return step.powers, step.inputs

    def _state_shapes(self) -> StateShapes:
        return ((self.input_size, self.order),)

    def _sequence(self, x, state, lengths, reset):
        initial = None if state is None else state.memory
        if not self.return_sequences:
            final = self.last(x, initial, lengths=lengths, reset=reset)
            output = final if x.shape[1] else torch.zeros_like(final)
            return (output * self.scale).to(x.dtype), None, LegendreMemoryState(final)
        # A state at a length is selected from the memories, which must not be rounded to 16 bits.
        u = x if lengths is None else x.to(self._carry_dtype())
        memory, final = apply(u, self.prepared(x.shape[1]), initial, reset=reset)
        output = memory.to(x.dtype) * self.scale.to(x.dtype)
        return output, LegendreMemoryState(memory), LegendreMemoryState(final)

    def _calibrate(self, x, lengths):
        steps = x.shape[0] * x.shape[1] if lengths is None else int(lengths.sum())
        least = max(self.order, 2)
        if steps < least:
            raise ValueError(
                f"expected at least {least} steps to calibrate order {self.order}, got {steps}: pass a longer input"
            )
        total = squares = torch.zeros((), dtype=torch.float64, device=x.device)
        state = None
        for start in range(0, x.shape[1], 1024):
            memory, state = apply(x[:, start : start + 1024], self.prepared(min(x.shape[1], 1024)), state)
            if lengths is not None:
                memory = zero_padding(memory, lengths - start)
            total = total + memory.double().sum((0, 1))
            squares = squares + memory.double().square().sum((0, 1))
        mean = total / steps
        deviation = (squares / steps - mean.square()).clamp(min=0).sqrt()  # (C, N)
        bad = ~(deviation > 1e-6 * (squares / steps).sqrt()) | ~deviation.isfinite()
        if bad.any():
            channel, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"expected a memory that varies on x, got a standard deviation of {deviation[channel, i].item():.3g} "
                f"in channel {channel}, order {i}: pass finite input that changes over time in "
                "every channel"
            )
        self.scale.copy_(1 / deviation)

    def _step(self, x_t, state):
        output, m = self.advance(x_t, state.memory)
        return output, LegendreMemoryState(m)

    def advance(
        self, u_t: Float[Tensor, "B C"], m: Float[Tensor, "B C N"]
    ) -> tuple[Float[Tensor, "B C N"], Float[Tensor, "B C N"]]:
        """scale * m_t and m_t, from u_t and m_{t-1}."""
        A, B = self.transition()
        with without_autocast(u_t):
            m = (m.transpose(0, 1) @ A).transpose(0, 1) if A.ndim == 3 else m @ A
            m = m + u_t.unsqueeze(-1) * B
        return m.to(u_t.dtype) * self.scale.to(u_t.dtype), m

    def last(
        self,
        u: Float[Tensor, "B T C"],
        initial: Float[Tensor, "B C N"] | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B C N"]:
        """m after the last valid step, not scaled, by equation (25): one matrix product.

        The memories of the other steps are not computed. ``u`` must be finite and ``reset`` False
        from ``lengths`` on.
        """
        system = self.prepared(u.shape[1], last_only=True)
        if lengths is None:
            return apply(u, system, initial, reset=reset)[1]
        memory = self._last_of_each(u, system, lengths, reset)
        if initial is None:
            return memory
        if reset is not None:
            initial = torch.where(reset.any(1)[:, None, None], 0, initial)
        # A^length from the binary digits of each length: powers contains A, A^2, A^4, ...,
        # transposed.
        carried = initial.transpose(0, 1)  # (C, B, N)
        for digit in range(system.powers.shape[-3]):
            is_one = (lengths >> digit) % 2 == 1
            with without_autocast(u):
                carried = torch.where(is_one[:, None], carried @ system.powers[..., digit, :, :], carried)
        return memory + carried.transpose(0, 1)

    def response(
        self, lengths: Int[Tensor, "B"], steps: int, *, reset: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T N"]:
        """w, such that m = sum_t w_t u_t after the last valid step, from a memory of zeros.

        w_t of row b is A^(L - 1 - t) B for t below its length L, zero from L on, and zero before
        the last reset. Requires one theta for all channels.
        """
        system = self.prepared(steps, last_only=True)
        ahead = lengths[:, None] - 1 - torch.arange(steps, device=lengths.device)  # steps that follow, (B, T)
        used = ahead >= 0
        if reset is not None:
            resets = reset.cumsum(1)
            used = used & (resets == resets[:, -1:])  # there are no resets from the length on
        return system.inputs.flip(0)[ahead.clamp(min=0)].masked_fill(~used[..., None], 0)

    def _last_of_each(self, u: Tensor, system: PreparedSystem, lengths: Tensor, reset: Tensor | None) -> Tensor:
        """(25) for rows that end at their own lengths, from a memory of zeros."""
        batch, steps, channels = u.shape
        if system.inputs.ndim == 2 and self.order <= channels:
            # Shift H per row: that takes less memory than a shifted u.
            w = self.response(lengths, steps, reset=reset)
            if reset is not None:
                u = torch.where((w != 0).any(-1, keepdim=True), u, 0)  # 0 times NaN is NaN
            with without_autocast(u):  # this order gives the gradient of u the memory layout of u
                return (w.mT @ u.to(w.dtype)).mT
        # Shift each row to the right end. The zeros on the left do not change a memory of zeros.
        source = torch.arange(steps, device=u.device) + (lengths - steps)[:, None]  # (B, T)
        rows = torch.arange(batch, device=u.device)[:, None]
        moved = torch.where((source >= 0)[..., None], u[rows, source.clamp(min=0)], 0)
        reset = None if reset is None else reset[rows, source.clamp(min=0)] & (source >= 0)
        return apply(moved, system, None, reset=reset)[1]

    def _weight(self) -> Tensor:
        return self.scale

    def _check_kind(self, name: str, x: Tensor) -> None:
        # Without weights, the layer accepts 16-bit inputs: FSDP's mixed precision narrows the
        # weights of the neighbouring layers, but not buffers such as the scale.
        narrow = x.dtype in (torch.float16, torch.bfloat16) and self.scale.dtype == torch.float32
        if not (narrow and x.device == self.scale.device):
            super()._check_kind(name, x)

    # Cached systems. They are computed from theta, so they are not saved or copied, but prepared
    # again.

    def _cached(self, use: str, steps: int) -> PreparedSystem:
        """The system for one "step", a "sequence", or the "last" memory of a sequence."""
        theta, scale = self._readable_theta(), self.scale
        if theta is None:
            return self._prepare(use, steps)
        made_of = (theta, self.order, self.discretizer, self.method, scale.dtype)
        place = use, scale.device
        cached = self._cache.get(place)
        if cached is not None and cached.made_of == made_of:
            if steps <= cached.system.steps:
                return cached.system
            steps = max(steps, 2 * cached.system.steps)
        # A system prepared under inference_mode could not be used for training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            system = self._prepare(use, steps)
        if type(system.inputs) is Tensor:  # not fake, not meta
            self._cache[place] = _Cached(made_of, system)
        return system

    def _readable_theta(self) -> Any:
        """The key of the cache: the window, or log_theta if trained, as Python numbers.

        None if theta gets a gradient, or if its value cannot be read.
        """
        if not self.trainable_theta:
            return self._theta
        theta = self.log_theta
        if (
            (theta.requires_grad and torch.is_grad_enabled())
            or transforms_are_active()
            or type(theta) not in (Tensor, nn.Parameter)
            or theta.is_meta
            or (theta.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return None
        return theta.tolist()

    def _prepare(self, use: str, steps: int) -> PreparedSystem:
        A, B = delay_network(self.order, self.window(), discretizer=self.discretizer)
        method = {"step": "sequential", "sequence": self.method, "last": None}[use]
        system = prepare(A, B, steps, method=method, last_only=use == "last", dtype=self._carry_dtype())
        if use == "step":  # drop the axis of powers here, not at every step of a stream
            return system._replace(powers=system.powers[..., 0, :, :], inputs=system.inputs[..., 0, :])
        return system

    def _apply(self, fn, recurse=True):
        self._cache = {}
        # 16 bits are too few for the window of 784 steps: log_theta is never narrowed.
        return super()._apply(never_narrowed(fn, self.log_theta) if self.trainable_theta else fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_cache": {}}


def _window(theta: Any, channels: int) -> Float[Tensor, "*channels"]:
    """theta as a float64 tensor of shape () or (C,) on the CPU."""
    if isinstance(theta, Tensor):
        theta = theta.detach().cpu().double().numpy()
    numbers = None if isinstance(theta, str | bool) else np.asarray(theta)
    if numbers is None or numbers.dtype.kind not in "iuf":
        raise TypeError(f"expected theta as a number of steps, or one per channel, got {theta!r}")
    if numbers.shape not in ((), (channels,)):
        raise ValueError(f"expected theta as one number or {channels}, one per channel, got shape {numbers.shape}")
    return torch.tensor(numbers.tolist(), dtype=torch.float64, device="cpu")


class _Cached(NamedTuple):
    """A prepared system, and the values that it was computed from."""

    made_of: tuple[Any, ...]
    system: PreparedSystem


def refuse_method_without_sequences(method: str | None, return_sequences: bool) -> None:
    """Raise if a method is given although the sequence of memories is not computed."""
    if method is not None and not return_sequences:
        raise ValueError(
            f"expected method=None with return_sequences=False, got {method!r}: drop it, a method "
            "computes the memories of all steps"
        )
