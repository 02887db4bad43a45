"""Problem 2b of Hochreiter & Schmidhuber 1997: the first symbol decides, all others say nothing. Made on the fly."""

import numpy as np
import torch

from legato._shapes import Int, Tensor


def long_dependency(indices: Int[Tensor, "B"], length: int, symbols: int, seed: int) -> tuple[Tensor, Tensor]:
    """x_1 = +e_0 or -e_0, equally often; x_t = e_k with k uniform over 1 .. symbols - 1. The class is the sign of x_1.

    Args:
        indices: which sequences; a sequence is a pure function of its index, the length, the symbols and the seed.
        length: T, steps.
        symbols: p, dimensions of the one-hot vectors, 2 or more.
        seed: of this stream of sequences, 0 or more; other streams share none with it but by chance.

    Returns:
        tokens: (B, T) int32: k for e_k, and ``symbols`` for -e_0. The one-hot vectors themselves are never made.
        classes: (B,) float32: 1 for +e_0, 0 for -e_0.

    Source: Martin & Cundy 2018, section 4.3: p = 128.
    """
    tokens = torch.empty(len(indices), length, dtype=torch.int32)
    classes = torch.empty(len(indices))
    for row, index in enumerate(indices.tolist()):
        # torch's generator on the CPU reads 32 bits of its seed, too few for stream and index.
        generator = np.random.default_rng([seed, index])
        classes[row] = int(generator.integers(2))
        tokens[row] = torch.from_numpy(generator.integers(1, symbols, length, dtype=np.int32))
        tokens[row, 0] = 0 if classes[row] else symbols
    return tokens, classes
