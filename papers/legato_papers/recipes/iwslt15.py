"""IWSLT'15: translate by a recurrent encoder and decoder with attention (Chilkuri & Eliasmith 2021).

The English-Vietnamese sentences are read as the paper's: words between spaces, 17,191 and 7,709 of them. Where the
files to train on are missing, two other sets stand in, in byte pairs: fra-eng (short sentences) and multi30k-en-de
(captions of pictures).

Figures: ``bleu`` is of greedy translations and chooses the weights, ``bleu_beam`` of a beam, on the test set alone. On
en-vi both are the older papers' BLEU, of the tokenised text as it is (sacrebleu with tokenize="none"), and
``bleu_detokenised`` is sacrebleu's own on plain text, which it is everywhere else. ``result.json`` has the signatures.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import nn

from legato._modes import evaluating
from legato._shapes import Int, Tensor
from legato.layers import LMU, Bidirectional, Stack
from legato.models import Embedding

from ..bleu import COUNTS, bleu, bleu_counts, detokenised, signature
from ..data.buckets import Bucketed, padded
from ..data.encoded import Encoded, encoded, found
from ..data.translation import (
    FRA_ENG,
    FRA_ENG_ARCHIVE,
    FRA_ENG_FOLDER,
    IWSLT15,
    IWSLT15_FOLDER,
    MULTI30K,
    MULTI30K_FOLDER,
    Pair,
    translation,
)
from ..data.translation import vocabulary as official_words
from ..data.words import SPACED, UNKNOWN
from ..kinds import Kind, layer_of
from ..models import Decoded, Translator
from ..ranges import Count, Depth, Fraction, FractionBelowOne, Order, Range, Width, Window
from ..task import Batch, Paper, Preset, Reported, Task, Training

PAPER = Paper(
    metric="bleu",
    reported=Reported(25.5, "Chilkuri & Eliasmith 2021", verified=False),
    parameters="-",
    digits=2,
    data="en-vi",
    baselines={"LSTM with attention": Reported(23.3, "Chilkuri & Eliasmith 2021", verified=True)},
    kinds={"lstm": "LSTM with attention"},
    labels={"bleu": "greedy, here", "bleu_beam": "beam, here"},
)
PRESETS = {
    "smoke": Preset(
        "a few real examples, in seconds",
        {
            "data.examples": 200,
            "data.pieces": 500,
            "model.channels": 16,
            "model.units": 16,
            "model.width": 2,
            "training.epochs": 1,
            "training.batch_size": 20,
        },
    ),
}
#: Sentences translated together.
TRANSLATED_AT_ONCE = 128
#: Sentences on which the memories of an LMU are scaled.
CALIBRATED_ON = 500
#: Units that give each kind the parameters of the LSTM, to 3 % with the defaults.
UNITS = {"lmu": 256, "gilr-lstm": 240, "sru": 464, "lstm": 256, "transformer": 224}
#: What the numbers in the cache are made of.
FILES = {
    "en-vi": (IWSLT15_FOLDER, tuple(IWSLT15.values())),
    "multi30k-en-de": (MULTI30K_FOLDER, tuple(MULTI30K.values())),
    "fra-eng": (FRA_ENG_FOLDER, (FRA_ENG, FRA_ENG_ARCHIVE)),
}
#: The figures that are read from counts of n-grams, in the order of ``totals``.
BLEUS = ("bleu", "bleu_beam", "bleu_detokenised", "bleu_detokenised_beam")


@dataclass
class Data:
    """The sentences.

    Args:
        pair: fra-eng (English to French), multi30k-en-de (English to German), or en-vi (English to Vietnamese), the
            paper's.
        examples: so many of each split only, the first ones; null is all.
        pieces: byte pairs in the vocabulary of each language; en-vi has words of its own.
        longest: words or pieces kept of a sentence, from its start, and written of a translation at most.
    """

    pair: Pair = "multi30k-en-de"
    examples: Count | None = None
    pieces: Annotated[int, Range(260, 10**6)] = 4000
    longest: Count = 100


@dataclass
class Model:
    """The network: word vectors, an encoder that reads both ways, a decoder, attention, the target's vectors again.

    Args:
        kind: of encoder and decoder: lmu, gilr-lstm, sru, lstm (PyTorch's) or transformer.
        channels: of the word vectors.
        units: of the decoder, and of both directions of the encoder together; null is the number that gives each kind
            the parameters of an LSTM of 256.
        layers: of each.
        order: of an LMU's memories.
        theta: window of an LMU's memories, in words.
        heads: of a transformer.
        dropout: share of word vectors, encoder outputs and what the vocabulary is scored from, dropped in training.
        tied: score the target's words by their own vectors.
        scaled: word vectors enter with a variance of one, not of 1 / channels.
        width: sentences kept by beam search.
        length_penalty: 0 prefers short translations, 1 long ones.
    """

    kind: Kind = "gilr-lstm"
    channels: Width = 128
    units: Annotated[int, Range(2, 2**16)] | None = None
    layers: Depth = 1
    order: Order = 5
    theta: Window = 15.0
    heads: Width = 4
    dropout: FractionBelowOne = 0.3
    tied: bool = True
    scaled: bool = True
    width: Annotated[int, Range(1, 1000)] = 10
    length_penalty: Annotated[float, Range(0, 10)] = 1.0


@dataclass
class Smoothed(Training):
    """How the translator is trained.

    Args:
        label_smoothing: probability taken from the true word and spread over all.
    """

    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup: float = 0.1
    max_norm: float | None = 1.0
    average: float = 0.998
    label_smoothing: Fraction = 0.1


@dataclass
class Config:
    """IWSLT'15: translate sentences by a recurrent encoder and decoder with attention."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Smoothed = field(default_factory=Smoothed)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "Translation":
    """The task of this configuration, its weights drawn by ``seed``.

    Raises:
        ExperimentError: files are missing or incomplete; the message names them.
    """
    task = Translation(config, seed, data_dir)
    console = Console(highlight=False, quiet=int(os.environ.get("RANK", 0)) != 0)
    for name, text in task.signatures.items():
        console.print(f"{name}: {text}", soft_wrap=True)
    return task


class Translation(Task):
    metric, higher_is_better = "bleu", True

    def __init__(self, config: Config, seed: int, data_dir: Path | None) -> None:
        self.config = config
        data = config.data
        texts = translation(data.pair, data_dir)
        self.source = texts.source
        self.words = data.pair == "en-vi"
        self.numbers = {side: self._numbers(side, texts, data_dir) for side in ("source", "target")}
        self.vocabulary = self.numbers["target"].vocabulary
        # Validation and test side by side: a batch says by its rows which texts it is of.
        self.references = [text for part in texts[1:3] for text in part.target[: data.examples]]
        self.train = self._examples("train", config.training.batch_size)
        self.validation = self._examples("validation", TRANSLATED_AT_ONCE)
        self.test = self._examples("test", TRANSLATED_AT_ONCE)
        torch.manual_seed(seed)
        self.model = network(config.model, *(self.numbers[side].vocabulary.size for side in ("source", "target")))
        calibrate(self.model, self.train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        source, source_lengths, target, target_lengths, _ = batch
        return cast(Translator, model).loss(
            source, target, source_lengths, target_lengths, label_smoothing=self.config.training.label_smoothing
        )

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        source, source_lengths, target, target_lengths, rows = batch
        translator, longest = cast(Translator, model), self.config.data.longest
        counts = torch.zeros(len(BLEUS), COUNTS, dtype=torch.float64)
        if not len(rows):
            return torch.cat([torch.zeros(4, dtype=torch.float64), counts.flatten()])
        words = target_lengths.sum() + len(rows)
        loss = translator.loss(source, target, source_lengths, target_lengths) * words
        greedy = translator.greedy(source, source_lengths, longest=longest)
        self._count(greedy, rows, counts[0::2])
        if rows[0] >= self.validation.size:
            model_config = self.config.model
            beam = translator.beam(
                source,
                source_lengths,
                width=model_config.width,
                length_penalty=model_config.length_penalty,
                longest=longest,
            )
            self._count(beam, rows, counts[1::2])
        sums = torch.stack([loss, words, (greedy.words == UNKNOWN).sum(), greedy.lengths.sum()])
        return torch.cat([sums.double().cpu(), counts.flatten()])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        sums, counts = totals[:4].tolist(), totals[4:].view(len(BLEUS), COUNTS)
        figures = {
            name: bleu(row, self._tokenize(name)) for name, row in zip(BLEUS, counts, strict=True) if row[-1] > 0
        }
        figures["loss"] = sums[0] / sums[1]
        return figures | ({"unknown_words": sums[2] / max(1.0, sums[3])} if self.words else {})

    def tokens(self, batch: Batch) -> int:
        return int(batch[1].sum() + batch[3].sum())

    def outcome(self) -> dict[str, Any]:
        longest = self.config.data.longest
        lengths = {
            f"{split} {side}": self.numbers[side].texts[f"{split}.{side}"].lengths
            for split in ("train", "validation", "test")
            for side in ("source", "target")
        }
        return {
            "signatures": self.signatures,
            "truncated": {name: int((part > longest).sum()) for name, part in lengths.items()},
            "empty": {name: int((part == 0).sum()) for name, part in lengths.items()},
        }

    @property
    def signatures(self) -> dict[str, str]:
        """How sacrebleu counts each figure, in its own words."""
        names = BLEUS[::2] if self.words else BLEUS[:1]
        return {name: signature(self._tokenize(name)) for name in names}

    def _tokenize(self, name: str) -> str:
        return "none" if self.words and "detokenised" not in name else "13a"

    def _count(self, decoded: Decoded, rows: Tensor, counts: Tensor) -> None:
        """The counts of a batch: as written, and of tokenised text detokenised too."""
        written = [self.vocabulary.decode(row) for row in decoded.words.tolist()]
        wanted = [self.references[row] for row in rows.tolist()]
        counts[0] = bleu_counts(written, wanted, self._tokenize("bleu"))
        if self.words:
            counts[1] = bleu_counts([detokenised(t) for t in written], [detokenised(t) for t in wanted])

    def _numbers(self, side: str, texts: Any, data_dir: Path | None) -> Encoded:
        data = self.config.data
        vocabulary: dict[str, Any] = {"bpe": data.pieces}
        if self.words:
            _, _, _, *words = official_words("en" if side == "source" else "vi", data_dir)  # less <unk>, <s> and </s>
            vocabulary = {"words": words, "pattern": SPACED, "lowercase": False}
        folder, files = FILES[data.pair]
        return encoded(
            data.pair,
            lambda: texts,
            lambda: found(folder, files, data_dir),
            vocabulary=vocabulary,
            only=(side,),
            examples=data.examples,
        )

    def _examples(self, split: str, batch_size: int) -> Bucketed:
        longest = self.config.data.longest
        sources, targets = (self.numbers[side].texts[f"{split}.{side}"] for side in ("source", "target"))
        first = self.validation.size if split == "test" else 0

        def take(indices: Int[Tensor, " B"]) -> Batch:
            source, source_lengths, _ = padded([sources[i] for i in indices.tolist()], longest)
            target, target_lengths, _ = padded([targets[i] for i in indices.tolist()], longest)
            return source, source_lengths, target, target_lengths, indices + first

        lengths = torch.from_numpy(np.minimum(sources.lengths, longest))
        return Bucketed(len(sources), batch_size, take, lengths)


def network(config: Model, source_words: int, target_words: int) -> Translator:
    """The translator of one kind between vocabularies of these sizes."""
    units = config.units or UNITS[config.kind]

    def layer(inputs: int, units: int) -> Any:
        options: dict[str, Any] = {}
        if config.kind == "lmu":
            options = {"order": config.order, "theta": config.theta, "activation": "tanh"}
        elif config.kind == "gilr-lstm":
            options = {"forget_bias": 1.0}  # 5, as for long sequences, is a time scale of 150 words
        elif config.kind == "transformer":
            options = {"heads": config.heads, "expansion": 2}
        return layer_of(config.kind, inputs, units, **options)

    sizes = [config.channels] + [units] * (config.layers - 1)
    stacks = (
        [Bidirectional(layer(size, units // 2), layer(size, units // 2)) for size in sizes],
        [layer(size, units) for size in sizes],
    )
    encoder, decoder = (stack[0] if config.layers == 1 else Stack(*stack, dropout=config.dropout) for stack in stacks)
    return Translator(
        encoder,
        decoder,
        Embedding(source_words, config.channels),
        Embedding(target_words, config.channels),
        tied=config.tied,
        scaled=config.scaled,
        dropout=config.dropout,
    )


@torch.no_grad()
def calibrate(model: Translator, train: Bucketed) -> None:
    """Scale each order of every Legendre memory to a standard deviation of one on the first training sentences."""
    inputs: dict[LMU, tuple[Tensor, Any]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, given, options: inputs.update({layer: (given[0], options.get("lengths"))}), with_kwargs=True
        )
        for layer in model.modules()
        if isinstance(layer, LMU)
    ]
    if not hooks:
        return
    source, source_lengths, target, target_lengths, _ = train.take(torch.arange(min(CALIBRATED_ON, train.size)))
    with evaluating(model):
        model.loss(source, target, source_lengths, target_lengths)
    for hook in hooks:
        hook.remove()
    for layer, (x, lengths) in inputs.items():
        layer.calibrate(x, lengths=lengths)
