"""Embedding of tokens as vectors, with word dropout, and dropout that is constant over time."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import INTEGER_DTYPES, check_plain, checked_lengths, dropout_rate, positive_int, whole_number
from legato._shapes import Float, Int, Shaped, Tensor
from legato.layers._repr import constructor_arguments
from legato.layers.base import full_parameter, zero_padding


class Embedding(nn.Module):
    """u_t = E[x_t]: one vector per token, learned or given.

    Args:
        num_embeddings: number of tokens in the vocabulary.
        embedding_dim: channels of a vector.
        vectors: initial E, (num_embeddings, embedding_dim), such as pre-trained word vectors; None
            draws it from a normal distribution of variance 1 / embedding_dim. With given vectors,
            ``reset_parameters`` leaves E unchanged. On the meta device the vectors are stored until
            E is materialised and reset.
        trainable: learn E; False leaves the vectors fixed.
        padding_idx: the token whose vector stays zero, or None.
        dropout: fraction of the vocabulary whose vectors are zero in a training pass, 0 to below 1;
            the others are multiplied by 1 / (1 - dropout). A dropped word is dropped everywhere in
            the batch.
        device, dtype: of E.

    Shapes: tokens of any shape, integers from 0 to num_embeddings - 1; output (*tokens, embedding_dim).

    Raises:
        TypeError: tokens are not integers.
        ValueError: vectors of another shape, or a number out of range; in the forward pass, a token
            outside the vocabulary (on a GPU, the error is torch's).

    Example:
        >>> embedding = Embedding(1000, 300, dropout=0.3)
        >>> embedding(torch.randint(1000, (2, 20))).shape
        torch.Size([2, 20, 300])

    Source: the dropout is that of Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent
    neural networks".
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        vectors: np.ndarray | Tensor | None = None,
        trainable: bool = True,
        padding_idx: int | None = 0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings = positive_int(num_embeddings, "num_embeddings")
        self.embedding_dim = positive_int(embedding_dim, "embedding_dim")
        self.padding_idx = None if padding_idx is None else whole_number(padding_idx, "padding_idx")
        if self.padding_idx is not None and self.padding_idx >= self.num_embeddings:
            raise ValueError(
                f"expected padding_idx as a token from 0 to {self.num_embeddings - 1}, or None, got {self.padding_idx}"
            )
        self.dropout = dropout_rate(dropout)
        self.trainable = bool(trainable)
        shape = (self.num_embeddings, self.embedding_dim)
        if vectors is not None and tuple(vectors.shape) != shape:
            raise ValueError(
                f"expected vectors of shape (num_embeddings, embedding_dim) = {shape}, got {tuple(vectors.shape)}: "
                "pass one row per token, and the width of the vectors as embedding_dim"
            )
        weight = torch.empty(shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=self.trainable)
        self._draws = vectors is None
        self._vectors = None if vectors is None else torch.as_tensor(vectors, device=_device_of(vectors))
        self.reset_parameters()
        if not weight.is_meta:
            self._vectors = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw E again, with zeros for the padding; for given vectors, see ``vectors``."""
        if not self._draws and self._vectors is None:
            return
        with full_parameter(self.weight) as weight:
            if self._vectors is None:
                weight.normal_(std=self.embedding_dim**-0.5)
            else:
                weight.copy_(self._vectors)
            if self.padding_idx is not None:
                weight[self.padding_idx] = 0

    def forward(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape C"]:
        """The vectors of these tokens."""
        tokens = indices("tokens", tokens)
        try:
            output = F.embedding(tokens, self.weight, self.padding_idx)
        except IndexError as error:
            raise self._vocabulary_error(tokens) from error
        factors = self._factors()
        return output if factors is None else output.mul_(F.embedding(tokens, factors))

    def weighted_sum(self, tokens: Int[Tensor, "B T"], weights: Float[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """sum_t weights_t E[tokens_t] per row: a bag of words, without a tensor of all vectors."""
        tokens = indices("tokens", tokens)
        factors = self._factors()
        if factors is not None:
            weights = weights * F.embedding(tokens, factors)[..., 0]
        try:
            return F.embedding_bag(
                tokens, self.weight, mode="sum", per_sample_weights=weights, padding_idx=self.padding_idx
            )
        except (IndexError, RuntimeError) as error:
            if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.num_embeddings):
                raise self._vocabulary_error(tokens) from error
            raise

    def _factors(self) -> Tensor | None:
        """(num_embeddings, 1): 0 for a dropped word, else 1 / (1 - dropout); None for no dropout."""
        if not self.training or not self.dropout:
            return None
        remaining = 1 - self.dropout
        return self.weight.new_empty(self.num_embeddings, 1).bernoulli_(remaining).div_(remaining)

    def _vocabulary_error(self, tokens: Tensor) -> ValueError:
        return ValueError(
            f"expected tokens from 0 to {self.num_embeddings - 1}, got {tokens.min().item()} to {tokens.max().item()}: "
            "encode the text with the vocabulary of this embedding"
        )

    def extra_repr(self) -> str:
        """The arguments of the constructor that are not defaults."""
        return constructor_arguments(self, {"vectors": None})


class LockedDropout(nn.Module):
    """y[b, t, c] = x[b, t, c] * z[b, c] / (1 - p): dropout of channels per row, at all time steps.

    Args:
        p: fraction of the channels that is dropped in training, 0 to below 1.

    Shapes: input (B, T, C), output the same. In ``eval`` mode, and with p = 0, the output is the
    input.

    Example:
        >>> LockedDropout(0.5)(torch.ones(2, 20, 8)).shape
        torch.Size([2, 20, 8])

    Source: Gal & Ghahramani 2016; the name is that of Merity, Keskar & Socher 2018, "Regularizing and optimizing LSTM
    language models".
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = dropout_rate(p)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """x with some of its channels dropped."""
        if not self.training or not self.p:
            return x
        remaining = 1 - self.p
        return x * torch.empty_like(x[:, :1]).bernoulli_(remaining).div_(remaining)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _device_of(vectors: Any) -> torch.device:
    """The device of a tensor; the CPU, not the default device, for an array."""
    return vectors.device if isinstance(vectors, Tensor) else torch.device("cpu")


def indices(name: str, tokens: Tensor) -> Int[Tensor, "*shape"]:
    """``tokens`` of any integer dtype as int32 or int64 indices; TypeError for other dtypes."""
    check_plain(name, tokens)
    if tokens.dtype not in INTEGER_DTYPES:
        raise TypeError(f"expected {name} in an integer dtype, got {tokens.dtype}: encode the text first")
    return tokens if tokens.dtype == torch.int32 else tokens.to(torch.int64)


def without_padding(
    name: str, x: Shaped[Tensor, "B T *C"], lengths: Int[Tensor, "B"] | None
) -> Shaped[Tensor, "B T *C"]:
    """x with zeros from ``lengths`` on, so that values in the padding (-1, NaN) are never used."""
    check_plain(name, x)
    if x.ndim == 2 and x.dtype in INTEGER_DTYPES:
        x = indices(name, x)
    if lengths is None:
        return x
    if x.ndim < 2:
        raise ValueError(f"expected {name} of shape (B, T, ...) with lengths, got {tuple(x.shape)}: add the axes")
    return zero_padding(x, checked_lengths(lengths, x))
