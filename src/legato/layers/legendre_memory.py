"""The Legendre memory: no weights, only the last theta steps of its input kept as ``order`` numbers a channel.

``legato.legendre`` makes its two matrices, ``legato.ops.lti`` runs them; here they become a layer that keeps what it
prepared. ``lmu.py`` puts an encoder before it and a read-out after it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from legato._autocast import without_autocast
from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._base import RecurrentLayer, at_length, positive_int, zero_padding
from legato.legendre import delay_network
from legato.ops.lti import METHODS, Kernels, apply, prepare

#: The window in steps: one number, or one per channel.
Theta = float | int | Sequence[float | int] | Tensor


class LegendreMemoryState(NamedTuple):
    """m_t as the recurrence has it: not scaled, in float32 or wider."""

    memory: Float[Tensor, "B C N"]


class LegendreMemory(RecurrentLayer):
    """m_t = A m_{t-1} + B u_t in every channel, such that m_t holds u over the last theta steps; output scale * m_t.

    Coefficient i of a channel multiplies the shifted Legendre polynomial P_i(2r - 1) in u_{t - r theta}, r in [0, 1]
    (``legato.legendre.window_decoder`` draws it). The orders differ in size by far, which slows the training of what
    reads them: ``calibrate`` sets ``scale`` so that each varies by one. The state is never scaled, so calibrating does
    not invalidate it.

    Args:
        channels: C, channels of the input, each with a memory of its own.
        order: N, numbers kept a channel, 1 or more.
        theta: length of the window in steps, 1 or more: a number, or a sequence or tensor of one per channel.
        discretizer: "zoh", "euler" or "bilinear"; see ``legato.legendre.delay_network``.
        trainable_theta: learn theta, as theta = 1 + exp(log_theta), so that an optimiser changes it in proportion and
            it stays above one step. A and B are then made again at every call.
        return_sequences: True gives m_t at every step. False gives m at the last step that counts, by form (25).
        method: how the memories are computed: "sequential" (19), "toeplitz" (24), "fft" (26), "chunked"; None chooses.
        device, dtype: of the scale, hence of the input; theta itself is kept in float32 or wider.

    Shapes: input (B, T, channels), output (B, T, channels, order) or (B, channels, order), state.memory
    (B, channels, order).

    Example:
        >>> layer = LegendreMemory(channels=1, order=6, theta=100)
        >>> memory, state = layer(torch.randn(8, 500, 1))
        >>> memory.shape, state.memory.shape
        (torch.Size([8, 500, 1, 6]), torch.Size([8, 1, 6]))

    Source: Voelker, Kajic & Eliasmith 2019, (1) to (3); Chilkuri & Eliasmith 2021, (19), (24) to (26). scale is ours.
    """

    State = LegendreMemoryState

    scale: Tensor  # (C, N)
    log_theta: nn.Parameter  # () or (C,), when trained

    def __init__(
        self,
        channels: int,
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
        super().__init__(positive_int(channels, "channels"))
        self.channels = channels
        self.order = positive_int(order, "order")
        self.discretizer = discretizer
        self.trainable_theta = trainable_theta
        self.return_sequences = return_sequences
        refuse_method_without_sequences(method, return_sequences)
        if method is not None and method not in METHODS:
            raise ValueError(f"expected method to be None or one of {', '.join(METHODS)}, got {method!r}")
        self.method = method
        if isinstance(theta, str | bool) or not isinstance(theta, Tensor | Sequence | float | int):
            raise ValueError(f"expected theta as a number of steps, or one per channel, got {theta!r}")
        window = torch.as_tensor(theta, dtype=torch.float64, device="cpu").detach()
        if window.shape not in ((), (channels,)):
            raise ValueError(
                f"expected theta as one number or {channels}, one per channel, got shape {tuple(window.shape)}"
            )
        delay_network(order, window, discretizer=discretizer)  # raises when they do not go together
        if trainable_theta and window.min() <= 1:
            raise ValueError(f"expected a trainable theta to start above 1 step, got {window.min().item()}")
        self.register_buffer("scale", torch.ones(channels, order, device=device, dtype=dtype))
        # A frozen theta is a plain number: no buffer, so nobody can write to it behind the kept kernels' back.
        self._frozen_theta = window.tolist()
        if trainable_theta:
            self.log_theta = nn.Parameter((window - 1).log().to(self.scale.device, self._carry_dtype()))
        self._kept: dict[str, Kernels] = {}
        self._kept_version: tuple[Any, int] | None = None

    def extra_repr(self) -> str:
        window = "trainable" if self.trainable_theta else self._frozen_theta
        return f"{self.channels}, order={self.order}, theta={window}, discretizer={self.discretizer!r}"

    @property
    def output_size(self) -> tuple[int, int]:
        """(channels, order)."""
        return self.channels, self.order

    def window(self) -> Float[Tensor, "*channels"]:
        """theta in steps, float64, of shape () or (C,); differentiable when it is trained."""
        if self.trainable_theta:
            return 1 + self.log_theta.double().exp()
        return torch.tensor(self._frozen_theta, dtype=torch.float64, device=self.scale.device)

    def get_extra_state(self) -> Tensor:
        """A frozen theta, for state_dict: weights were trained with it. Empty when theta is trained."""
        return torch.tensor([] if self.trainable_theta else self._frozen_theta, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the frozen theta of a state_dict."""
        expected = self.get_extra_state().shape
        if not isinstance(state, Tensor) or state.shape != expected:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"expected a theta of shape {tuple(expected)} in the state_dict, got {got}: build the layer with as "
                "many windows, and as trainable, as the one that was saved"
            )
        if not self.trainable_theta:
            self._frozen_theta = state.tolist()
        self._kept.clear()

    @torch.no_grad()
    def calibrate(self, u: Float[Tensor, "B T C"], *, lengths: Int[Tensor, "B"] | None = None) -> None:
        """scale[c, i] = 1 / std(m[c, i]) over all rows and steps of ``u``, run from an empty memory.

        Args:
            u: typical input, (B, T, channels); at least ``order`` steps in all.
            lengths: steps of each row that count, as in ``forward``.

        Raises:
            ValueError: too few steps; an order that does not vary, or not by a finite amount.

        Source: measured in this project: on Mackey-Glass the NRMSE falls from 0.0197 to 0.0070.
        """
        self._check_arguments(u, None, lengths, None)
        steps = u.shape[0] * u.shape[1] if lengths is None else int(lengths.sum())
        least = max(self.order, 2)
        if steps < least:
            raise ValueError(f"expected at least {least} steps to calibrate order {self.order}, got {steps}: give more")
        if lengths is not None:
            u = zero_padding(u, lengths)
        total = squares = torch.zeros((), dtype=torch.float64, device=u.device)
        state = None
        for start in range(0, u.shape[1], 1024):
            memory, state = apply(u[:, start : start + 1024], self.kernels(min(u.shape[1], 1024)), state)
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
                f"expected a memory that varies on u, got a standard deviation of {deviation[channel, i].item():.3g} "
                f"in channel {channel}, order {i}: give finite input that changes over time, in every channel"
            )
        self.scale.copy_(1 / deviation)

    def kernels(self, steps: int, *, last_only: bool = False) -> Kernels:
        """What ``lti.apply`` needs for inputs of up to ``steps``; made once and kept, unless theta is being trained."""
        if last_only:
            return self._keep("last", steps, last_only=True)
        return self._keep("sequence", steps, method=self.method)

    def transition(self) -> tuple[Float[Tensor, "*channels N N"], Float[Tensor, "*channels N"]]:
        """A transposed and B of one step, m_t = m_{t-1} @ A + u_t * B, in the dtype of the state."""
        kernels = self._keep("step", 1, method="sequential")
        return kernels.powers[..., 0, :, :], kernels.inputs[..., 0, :]

    def _state_shapes(self) -> LegendreMemoryState:
        return LegendreMemoryState((self.channels, self.order))  # pyright: ignore[reportArgumentType]

    def _sequence(self, x, state, lengths, reset):
        initial = None if state is None else state.memory
        if not self.return_sequences:
            final = self.last(x, initial, lengths=lengths, reset=reset)
            output = final if x.shape[1] else torch.zeros_like(final)
            return (output * self.scale).to(x.dtype), LegendreMemoryState(final)
        # at_length must not pick a state that was rounded to 16 bits.
        u = x if lengths is None else x.to(self._carry_dtype())
        memory, final = apply(u, self.kernels(x.shape[1]), initial, reset=reset)
        final = at_length(memory, initial, final, lengths)
        return memory.to(x.dtype) * self.scale.to(x.dtype), LegendreMemoryState(final)

    def _step(self, x_t, state):
        A, B = self.transition()
        with without_autocast(x_t):
            m = (state.memory.transpose(0, 1) @ A).transpose(0, 1) if A.ndim == 3 else state.memory @ A
            m = m + x_t.unsqueeze(-1) * B
        return m.to(x_t.dtype) * self.scale.to(x_t.dtype), LegendreMemoryState(m)

    def last(
        self,
        u: Float[Tensor, "B T C"],
        initial: Float[Tensor, "B C N"] | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B C N"]:
        """m after the last step that counts, form (25): one matrix product, no other memory is computed. Not scaled.

        ``u`` must be finite and ``reset`` False from ``lengths`` on.
        """
        kernels = self.kernels(u.shape[1], last_only=True)
        if lengths is None:
            return apply(u, kernels, initial, reset=reset)[1]
        memory = self._last_of_each(u, kernels, lengths, reset)
        if initial is None:
            return memory
        if reset is not None:
            initial = torch.where(reset.any(1)[:, None, None], 0, initial)
        # A^length by the binary digits of each length: powers holds A, A^2, A^4, ..., transposed.
        carried = initial.transpose(0, 1)  # (C, B, N)
        for digit in range(kernels.powers.shape[-3]):
            taken = (lengths >> digit) % 2 == 1
            with without_autocast(u):
                carried = torch.where(taken[:, None], carried @ kernels.powers[..., digit, :, :], carried)
        return memory + carried.transpose(0, 1)

    def response(
        self, lengths: Int[Tensor, "B"], steps: int, *, reset: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T N"]:
        """w, m = sum_t w_t u_t after the last step that counts, from an empty memory; one theta for all channels.

        Row b is A^(L - 1 - t) B for t below its length L, zero from there on, and zero before the last reset.
        """
        kernels = self.kernels(steps, last_only=True)
        ahead = lengths[:, None] - 1 - torch.arange(steps, device=lengths.device)  # steps that follow, (B, T)
        counts = ahead >= 0
        if reset is not None:
            since = reset.cumsum(1)
            counts = counts & (since == since[:, -1:])  # no reset from the length on
        return kernels.inputs.flip(0)[ahead.clamp(min=0)].masked_fill(~counts[..., None], 0)

    def _last_of_each(self, u: Tensor, kernels: Kernels, lengths: Tensor, reset: Tensor | None) -> Tensor:
        """(25) where each row ends at its own length, from an empty memory."""
        batch, steps, channels = u.shape
        if kernels.inputs.ndim == 2 and self.order <= channels:
            # A row of H for each length is smaller than u: shift H.
            w = self.response(lengths, steps, reset=reset)
            if reset is not None:
                u = torch.where((w != 0).any(-1, keepdim=True), u, 0)  # 0 times NaN is NaN
            with without_autocast(u):  # in this order the gradient of u is laid out as u is
                return (w.mT @ u.to(w.dtype)).mT
        # Moved to the right end, each row stops at its length; zeros before its start leave an empty memory empty.
        source = torch.arange(steps, device=u.device) + (lengths - steps)[:, None]  # (B, T)
        rows = torch.arange(batch, device=u.device)[:, None]
        moved = torch.where((source >= 0)[..., None], u[rows, source.clamp(min=0)], 0)
        reset = None if reset is None else reset[rows, source.clamp(min=0)] & (source >= 0)
        return apply(moved, kernels, None, reset=reset)[1]

    def _weight(self) -> Tensor:
        return self.scale

    # Kept kernels. They follow from theta, so they are never saved, copied or moved, only made again.

    def _keep(self, use: str, steps: int, **options) -> Kernels:
        if self.trainable_theta and not self._kept_are_of_this_theta():
            return self._prepare(steps, options)
        kept = self._kept.get(use)
        if kept is not None:
            if steps <= kept.steps:
                return kept
            steps = max(steps, 2 * kept.steps)
        # Kernels made under inference_mode could not be used for training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            kernels = self._prepare(steps, options)
        if type(kernels.inputs) is Tensor:  # not fake, not meta
            self._kept[use] = kernels
        return kernels

    def _kept_are_of_this_theta(self) -> bool:
        """Whether kernels may be kept for a trained theta, after those of an earlier theta are dropped.

        They may not where theta gets a gradient, nor where a change of theta could not be noticed.
        """
        theta = self.log_theta
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or theta.is_inference():
            return False
        version = (theta, theta._version)
        if self._kept_version is None or self._kept_version[0] is not theta or self._kept_version[1] != version[1]:
            self._kept.clear()
            self._kept_version = version
        return True

    def _prepare(self, steps: int, options: dict[str, Any]) -> Kernels:
        A, B = delay_network(self.order, self.window(), discretizer=self.discretizer)
        return prepare(A, B, steps, dtype=self._carry_dtype(), **options)

    def _apply(self, fn, recurse=True):
        before = self.log_theta.detach() if self.trainable_theta else None
        super()._apply(fn, recurse)
        # A window of 784 steps does not fit into 16 bits: a trained theta moves with the layer but is never narrowed.
        if before is not None and self.log_theta.dtype.itemsize < 4:
            self.log_theta.data = before.to(self.log_theta.device)
        self._kept.clear()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._kept.clear()

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}, "_kept_version": None}


def refuse_method_without_sequences(method: str | None, return_sequences: bool) -> None:
    """Raise where a method is named for memories that are not computed."""
    if method is not None and not return_sequences:
        raise ValueError(
            f"expected method=None with return_sequences=False, got {method!r}: the last output needs no sequence "
            "of memories"
        )
