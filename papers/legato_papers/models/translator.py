"""A recurrent encoder and a recurrent decoder joined by attention: parallel over time in training, by step in use.

``Translator.loss`` trains it, ``greedy`` and ``beam`` translate. Whole sentences go in and come out as numbers of
words; ``legato_papers.recipes.iwslt15`` has the text around it.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from legato._checks import dropout_rate, positive_int, real_number, whole_number
from legato._dtypes import carry_dtype
from legato._modes import evaluating
from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._states import register_state
from legato.layers.base import RecurrentLayer
from legato.models.embedding import indices, without_padding
from legato.models.sequence import check_embedding


@register_state
class Encoded(NamedTuple):
    """A batch of source sentences as the decoder sees them; ``summary`` is W_s mean(h)."""

    outputs: Float[Tensor, "B S C"]
    mask: Bool[Tensor, "B S"]
    summary: Float[Tensor, "B D"]


@register_state
class Decoded(NamedTuple):
    """Translations: words without start and end, padded; how many; log P(words, end | source)."""

    words: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    log_probability: Float[Tensor, "B"]


class Translator(nn.Module):
    """p(y_t | y_<t, x) = softmax(W a_t + b), a_t = tanh(W_c [c_t, d_t] + b_c), c_t = sum_s softmax_s(d_t W_a h_s) h_s,
    d = decoder(y_{t-1} + W_s mean(h)), h = encoder(x): x and y are vectors of words here.

    The attention looks from the decoder's outputs, and nothing of it is fed back into the decoder: so all d_t, c_t and
    a_t of a known sentence come at once, whatever the layers, and a new sentence comes step by step from the decoder's
    state and the encoder's outputs. In place of an initial state, which each kind of layer has of another form, the
    decoder is given the mean of the encoder's outputs with every word.

    Args:
        encoder: any recurrent layer, a ``Bidirectional`` or a ``Stack`` too; it reads ``source``'s vectors.
        decoder: any recurrent layer that reads forward; it reads ``target``'s vectors.
        source, target: the words' vectors, such as ``Embedding(words, encoder.input_size)``: any module with a
            ``weight`` of a row a word.
        tied: W is the target words' vectors. Draw them from N(0, 1 / channels), as ``Embedding`` does.
        scaled: the vectors enter times sqrt(channels), with a variance of one where they have one of 1 / channels.
        dropout: share of the words' vectors, of h and of a_t dropped in training.
        padding, start, end: the target's words that mark no word, the start and the end of a sentence.

    Shapes: source (B, S) and target (B, T), numbers of words; log-probabilities (B, T, words of the target).

    Raises:
        ValueError: the parts do not go together.

    Example:
        >>> from legato import GILRLSTM, Bidirectional
        >>> from legato.models import Embedding
        >>> encoder = Bidirectional(GILRLSTM(16, 16), GILRLSTM(16, 16))
        >>> model = Translator(encoder, GILRLSTM(16, 16), Embedding(50, 16), Embedding(60, 16))
        >>> source, lengths = torch.randint(4, 50, (2, 9)), torch.tensor([9, 5])
        >>> model.loss(source, torch.randint(4, 60, (2, 7)), lengths, torch.tensor([7, 4])).shape
        torch.Size([])
        >>> model.eval().beam(source, lengths, width=4, longest=12).words.shape
        torch.Size([2, 12])

    Source: Luong, Pham & Manning 2015: (5), the "general" score of (8), here over sqrt(channels of h), and no input
    feeding; the mean with every word is as c in Cho et al. 2014, the scale of the vectors as in Vaswani et al. 2017.
    """

    def __init__(
        self,
        encoder: RecurrentLayer,
        decoder: RecurrentLayer,
        source: nn.Module,
        target: nn.Module,
        *,
        tied: bool = False,
        scaled: bool = False,
        dropout: float = 0.0,
        padding: int = 0,
        start: int = 2,
        end: int = 3,
    ):
        super().__init__()
        _check_layers(encoder, decoder)
        check_embedding(source, encoder)
        check_embedding(target, decoder)
        dropout = dropout_rate(dropout)
        padding, start = whole_number(padding, "padding"), whole_number(start, "start")
        end = whole_number(end, "end")
        self.words = len(cast(Tensor, target.weight))
        marks = {padding, start, end}
        if len(marks) < 3 or max(marks) >= self.words:
            raise ValueError(
                f"expected padding, start and end as three of the target's {self.words} words, got {padding}, {start} "
                f"and {end}"
            )
        self.encoder, self.decoder, self.source, self.target = encoder, decoder, source, target
        self.dropout, self.padding, self.start, self.end = dropout, padding, start, end
        self.scales = [layer.input_size**0.5 if scaled else 1.0 for layer in (encoder, decoder)]
        h, d, y = cast(int, encoder.output_size), cast(int, decoder.output_size), decoder.input_size
        like = cast(Tensor, target.weight)
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.summary = nn.Linear(h, y, bias=False, **where)  # W_s
        self.query = nn.Linear(d, h, bias=False, **where)  # W_a
        self.combine = nn.Linear(h + d, y, **where)  # W_c, b_c
        self.head = nn.Linear(y, self.words, **where)  # W, b
        self.tied = bool(tied)
        self._tie()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b to zero; the parts have a ``reset_parameters`` of their own, which draws it, and are reset first."""
        nn.init.zeros_(self.head.bias)

    def _tie(self) -> None:
        if self.tied:
            self.head.weight = cast(nn.Parameter, self.target.weight)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tie()  # leaving the meta device makes two parameters of one
        return self

    def forward(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        source_lengths: Int[Tensor, "B"] | None = None,
        target_lengths: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B T words"]:
        """log p(. | target_0 .. target_t, source) for every t at once.

        Args:
            source: sentences to translate.
            target: their translations as far as known, from ``start`` on.
            source_lengths, target_lengths: how many words of each row count, padded on the right; None: all.
        """
        encoded = self.encode(source, source_lengths)
        target = without_padding("target", indices("target", target), target_lengths)
        return self._scores(self._read(target, target_lengths, encoded)).log_softmax(dim=-1)

    def loss(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        source_lengths: Int[Tensor, "B"] | None = None,
        target_lengths: Int[Tensor, "B"] | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """-log p(target_t | target_<t, source), the mean over all words and the ends of the sentences.

        Args:
            source, source_lengths: as in ``forward``.
            target, target_lengths: whole translations, without start and end; either may be of no words.
            label_smoothing: probability taken from the true word and spread over all.
        """
        target = without_padding("target", indices("target", target), target_lengths).to(torch.int64)
        rows, steps = target.shape
        if target_lengths is None:
            target_lengths = torch.full((rows,), steps, device=target.device)
        target_lengths = target_lengths.to(target.device, torch.int64)
        given = torch.cat([target.new_full((rows, 1), self.start), target], dim=1)
        wanted = torch.cat([target, target.new_full((rows, 1), self.padding)], dim=1)
        wanted = wanted.scatter(1, target_lengths[:, None], self.end)
        counts = torch.arange(steps + 1, device=target.device) <= target_lengths[:, None]
        a = self._read(given, target_lengths + 1, self.encode(source, source_lengths))
        return F.cross_entropy(self._scores(a[counts]), wanted[counts], label_smoothing=label_smoothing)

    def encode(self, source: Int[Tensor, "B S"], lengths: Int[Tensor, "B"] | None = None) -> Encoded:
        """What the decoder needs of the source: h, which of it counts, and W_s mean(h)."""
        source = without_padding("source", indices("source", source), lengths)
        if lengths is None:
            lengths = torch.full((len(source),), source.shape[1], device=source.device)
        lengths = lengths.to(source.device, torch.int64)
        if source.shape[1] == 0:
            source = F.pad(source, (0, 1))
        x = F.dropout(self.source(source) * self.scales[0], self.dropout, self.training)
        h = self.encoder(x, lengths=lengths)[0]  # zero from lengths on
        # A sentence of no words still has one place to look at, where h is zero.
        some = lengths.clamp(min=1)
        summary = self.summary(h.sum(1) / some[:, None])
        return Encoded(
            F.dropout(h, self.dropout, self.training),
            torch.arange(h.shape[1], device=h.device) < some[:, None],
            summary,
        )

    def step(self, word: Int[Tensor, "B"], state: Any, encoded: Encoded) -> tuple[Float[Tensor, "B words"], Any]:
        """(log p(. | words so far, source), state) after one more word: ``start`` at first.

        Args:
            word: the last word of each translation.
            state: what the step before returned; at first ``initial_state(B)``.
            encoded: what ``encode`` returned.
        """
        log_p, state = self._step(word[:, None], state, encoded)
        return log_p[:, 0], state

    def initial_state(self, batch_size: int, **options: Any) -> Any:
        """The decoder's state before the first word."""
        return self.decoder.initial_state(batch_size, **options)

    @torch.no_grad()
    def greedy(
        self, source: Int[Tensor, "B S"], lengths: Int[Tensor, "B"] | None = None, *, longest: int = 100
    ) -> Decoded:
        """y_t = argmax p(. | y_<t, source) until the end, which comes after ``longest`` words at the latest.

        Nothing is dropped, whatever the mode. Padding and start are never given as words.
        """
        longest = positive_int(longest, "longest")
        with evaluating(self):
            return self._greedy(indices("source", source).to(torch.int64), lengths, longest)

    def _greedy(self, source: Tensor, lengths: Tensor | None, longest: int) -> Decoded:
        encoded = self.encode(source, lengths)
        state, word = self.initial_state(len(source)), source.new_full((len(source),), self.start)
        going = torch.ones_like(word, dtype=torch.bool)
        total, words = torch.zeros(len(source), device=source.device, dtype=carry_dtype(encoded.summary.dtype)), []
        for length in range(longest + 1):
            log_p, state = self.step(word, state, encoded)
            best, word = self._allowed(log_p, ends=length == longest).max(dim=-1)
            total += torch.where(going, best, 0)
            going &= word != self.end
            if not going.any():
                break
            words.append(torch.where(going, word, self.padding))
        words = torch.stack(words, 1) if words else source.new_zeros(len(source), 0)
        return Decoded(words, (words != self.padding).sum(1), total)

    @torch.no_grad()
    def beam(
        self,
        source: Int[Tensor, "B S"],
        lengths: Int[Tensor, "B"] | None = None,
        *,
        width: int = 10,
        length_penalty: float = 1.0,
        longest: int = 100,
    ) -> Decoded:
        """argmax_y log p(y | source) / ((5 + n) / 6)^length_penalty among sentences of n - 1 words and an end.

        At each step the ``width`` best unfinished sentences of each row are kept, with a decoder's state each; a row is
        done when ``width`` sentences have ended, or when no unfinished one can become better. Width 1 is ``greedy``.

        Args:
            source, lengths: as in ``forward``. Nothing is dropped, whatever the mode.
            width: sentences kept.
            length_penalty: 0 prefers short sentences, 1 compares by the mean over words, nearly.
            longest: words in a translation at most.

        Source: Wu et al. 2016, (14), without its coverage penalty.
        """
        width, longest = positive_int(width, "width"), positive_int(longest, "longest")
        length_penalty = real_number(length_penalty, "length_penalty")
        if length_penalty < 0:
            raise ValueError(f"expected length_penalty of at least 0, got {length_penalty}")
        with evaluating(self):
            return self._beam(indices("source", source).to(torch.int64), lengths, width, length_penalty, longest)

    def _beam(self, source: Tensor, lengths: Tensor | None, width: int, length_penalty: float, longest: int) -> Decoded:
        encoded, rows = self.encode(source, lengths), len(source)
        device = source.device
        zeros = torch.zeros(rows, device=device, dtype=carry_dtype(encoded.summary.dtype))
        found = Decoded(
            source.new_full((rows, longest), self.padding), source.new_zeros(rows), torch.full_like(zeros, -torch.inf)
        )
        best, ended = torch.full_like(zeros, -torch.inf), source.new_zeros(rows)
        going = torch.arange(rows, device=device)  # rows that are not done; all below has only these
        state, words = self.initial_state(rows * width), source.new_zeros(rows, width, 0)
        word = source.new_full((rows, width), self.start)
        total = torch.full((rows, width), -torch.inf, device=device, dtype=zeros.dtype)
        total[:, 0] = 0
        for length in range(1, longest + 2):  # of the sentences that end here, with the end
            log_p, state = self._step(word, state, encoded)
            log_p = total[..., None] + self._allowed(log_p, ends=length > longest)
            total, index = log_p.flatten(1).topk(min(2 * width, width * self.words))
            origin, word = index // self.words, index % self.words

            ends = (word == self.end) & total.isfinite()
            score = torch.where(ends, total, -torch.inf)[:, :width] / ((5 + length) / 6) ** length_penalty
            top, place = score.max(1)
            better = top > best[going]
            row = going[better]
            best[row] = top[better]
            found.log_probability[row] = total.gather(1, place[:, None])[better, 0]
            found.words[row, : length - 1] = _pick(words, origin.gather(1, place[:, None]))[better, 0]
            found.lengths[row] = length - 1
            ended[going] += ends[:, :width].sum(1)

            # The best that did not end, in their order: of 2 * width candidates no more than width can have ended.
            keep = ends.int().argsort(dim=1, stable=True)[:, :width]
            total = total.masked_fill(ends, -torch.inf).gather(1, keep)
            origin, word = origin.gather(1, keep), word.gather(1, keep)
            hope = total.max(1).values / ((6 + longest) / 6) ** length_penalty
            goes_on = (ended[going] < width) & (hope > best[going])
            if not goes_on.any():
                break
            words = torch.cat([_pick(words, origin), word[..., None]], dim=-1)[goes_on]
            chosen = (origin + width * torch.arange(len(going), device=device)[:, None])[goes_on].flatten()
            state = tree_map(lambda s, chosen=chosen: s[chosen], state)
            encoded = Encoded(*(part[goes_on] for part in encoded))
            total, word, going = total[goes_on], word[goes_on], going[goes_on]
        return found

    def _read(self, words: Tensor, lengths: Tensor | None, encoded: Encoded) -> Tensor:
        """a for known words, all steps at once: (B, T, target channels)."""
        y = F.dropout(self.target(words) * self.scales[1], self.dropout, self.training)
        return self._attend(self.decoder(y + encoded.summary[:, None], lengths=lengths)[0], encoded)

    def _step(self, words: Tensor, state: Any, encoded: Encoded) -> tuple[Tensor, Any]:
        """log p for one more word of each of W sentences a row, (B, W, words); the state has B W rows."""
        y = self.target(words) * self.scales[1] + encoded.summary[:, None]
        d, state = self.decoder.step(y.flatten(0, 1), state)
        # The W sentences stand in the place of time: the encoder's outputs are there once for all of them.
        a = self._attend(d.unflatten(0, words.shape), encoded)
        return self._scores(a).log_softmax(dim=-1), state

    def _attend(self, d: Tensor, encoded: Encoded) -> Tensor:
        """a = tanh(W_c [c, d] + b_c) for d (B, T, channels)."""
        h = encoded.outputs
        scores = self.query(d) @ h.mT * h.shape[-1] ** -0.5  # (B, T, S)
        scores = scores.masked_fill(~encoded.mask[:, None], -torch.inf)
        c = scores.softmax(dim=-1) @ h
        a = self.combine(torch.cat([c, d], dim=-1)).tanh()
        return F.dropout(a, self.dropout, self.training)

    def _scores(self, a: Tensor) -> Tensor:
        """W a + b, in float32 or wider: a sentence's log p is a sum of many."""
        scores = self.head(a)
        return scores.to(carry_dtype(scores.dtype))

    def _allowed(self, log_p: Tensor, ends: bool) -> Tensor:
        """log p, and -inf for what may not come next: padding, start, and where a sentence must end, all else."""
        words = torch.arange(self.words, device=log_p.device)
        never = (words != self.end) if ends else (words == self.padding) | (words == self.start)
        return log_p.masked_fill(never, -torch.inf)


def _pick(words: Int[Tensor, "B W T"], which: Int[Tensor, "B K"]) -> Int[Tensor, "B K T"]:
    """words[b, which[b, k]]."""
    return words[torch.arange(len(words), device=words.device)[:, None], which]


def _check_layers(encoder: RecurrentLayer, decoder: RecurrentLayer) -> None:
    for name, layer in (("encoder", encoder), ("decoder", decoder)):
        if not isinstance(layer, RecurrentLayer):
            raise ValueError(f"expected {name} to be a RecurrentLayer, got {type(layer).__name__}: give a layer")
        if not layer.return_sequences or not isinstance(layer.output_size, int):
            raise ValueError(
                f"expected {name} to give (B, T, channels), got a {type(layer).__name__} that does not: build it with "
                "return_sequences=True, and flatten channels that have several axes"
            )
    if decoder.bidirectional:
        raise ValueError(
            f"expected decoder to read forward, got a bidirectional {type(decoder).__name__}: what it would read is "
            "what it has to write"
        )
