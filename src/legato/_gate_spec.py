"""The options of a gated unit, used by the gated layers, ``ops/gated.py`` and its kernel."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GateSpec:
    """z_t = products of the inputs, in blocks; f_t = sigmoid(forget_t); w_t = sigmoid(write_t) or 1 - f_t;
    c_t = f_t c_{t-1} + w_t g(candidate_t); h_t = o_t activation(c_t) + (1 - o_t) skip_t, o_t = sigmoid(output_t).

    Raises:
        ValueError: fields that exclude each other.
    """

    #: The blocks of C rows of z, in order: "forget" and "candidate"; "write", without which
    #: w_t = 1 - f_t; "output", without which h_t = c_t; "skip", without which skip_t = 0.
    blocks: tuple[str, ...]
    #: Whether g is tanh; else g is the identity.
    candidate_tanh: bool = False
    #: Whether c_{t-1} is returned in place of c_t; it is zero at a reset.
    delayed: bool = False
    #: Whether skip_t is the first input, which must have C channels.
    skips_input: bool = False

    def __post_init__(self):
        if self.delayed and "output" in self.blocks:
            raise ValueError("delayed=True cannot be combined with an 'output' block: drop one of them")
        if self.skips_input and "skip" in self.blocks:
            raise ValueError("skips_input=True cannot be combined with a 'skip' block: drop one of them")


# Layers have a GateSpec as an attribute, so torch.load(weights_only=True) must accept the class.
torch.serialization.add_safe_globals([GateSpec])
