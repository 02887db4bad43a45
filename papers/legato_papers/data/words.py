"""Words and numbers: a vocabulary made from texts, texts as flat arrays of its numbers, and numbers as text again.

Characters of text8 need none of this: that data set is an array of bytes. Next: ``encoded.py`` does all of it once, for
every split of a data set, and keeps the arrays on disk.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np

from legato._shapes import Int

from ..task import ExperimentError

PADDING, UNKNOWN, START, END = range(4)
#: Names of these ids. No text splits into a word with a space in it, so no text can hold padding, a start or an end.
SYMBOLS = ("padding symbol", "<unk>", "start symbol", "end symbol")
#: Runs of letters, one apostrophe inside, runs of digits, single marks.
WORDS = r"""[a-z]+(?:'[a-z]+)?|[0-9]+|[.,!?;:()"$%&/-]"""
#: What stands between spaces: for texts that are split into words already.
SPACED = r"\S+"
# A treebank writes "do n't" and "it 's".
_SPLIT_OFF = r" (?=(?:n't|'(?:s|re|ve|ll|d|m))(?![a-zA-Z]))"
_TEXTS_AT_A_TIME = 1000  # between a list of encodings and our arrays; more only needs more memory
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts end to end: text i is ``ids[offsets[i] : offsets[i + 1]]``, which is what ``texts[i]`` gives.

    A text without a word is there with a length of 0.

    Args:
        ids: the numbers of all words, int32; it may lie on disk (memory-mapped), then it cannot be written to.
        offsets: where each text begins, and the end of the last.
    """

    ids: Int[np.ndarray, " words"]
    offsets: Int[np.ndarray, " texts_and_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " words"]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected the number of one of {len(self):,} texts, got {index}")
        index %= len(self)
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]:
        """Words in each text."""
        return np.diff(self.offsets)


class Vocabulary:
    """Words and their numbers, from 0: padding, unknown word, start, end, then the words.

    Made by ``word_vocabulary`` or ``bpe_vocabulary``, on a tokenizer of Hugging Face tokenizers.

    Example:
        >>> vocabulary = word_vocabulary(["A good film.", "A bad film!"])
        >>> vocabulary.encode(["A film?"])[0].tolist(), vocabulary.words[4:]
        ([4, 5, 1], ['a', 'film', '!', '.', 'bad', 'good'])
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=False)
        self.words: list[str] = sorted(ids, key=ids.__getitem__)
        if tuple(self.words[: len(SYMBOLS)]) != SYMBOLS or ids[self.words[-1]] != len(ids) - 1:
            raise ExperimentError(
                f"not a vocabulary of legato: expected words numbered without a gap from {', '.join(SYMBOLS)} on, "
                f"got {', '.join(self.words[:4])} first: build it with word_vocabulary or bpe_vocabulary"
            )

    @property
    def size(self) -> int:
        """Words, the four symbols included."""
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> Texts:
        """The numbers of the words of each text, without start and end; a word that is not in the vocabulary is 1.

        An empty text, or one without a word, has a length of 0. All cores are used; TOKENIZERS_PARALLELISM=false or
        RAYON_NUM_THREADS limits them.
        """
        parts, lengths = [np.empty(0, np.int32)], np.zeros(len(texts) + 1, np.int64)
        for begin in range(0, len(texts), _TEXTS_AT_A_TIME):
            some = list(texts[begin : begin + _TEXTS_AT_A_TIME])
            ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False)]
            counts = [len(text) for text in ids]
            lengths[begin + 1 : begin + 1 + len(some)] = counts
            parts.append(np.fromiter(chain.from_iterable(ids), np.int32, sum(counts)))
        return Texts(np.concatenate(parts), lengths.cumsum())

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of these numbers up to the first end symbol; padding and start are left out.

        Words are joined by spaces; a vocabulary of byte pairs gives back the text it encoded, character by character.
        """
        kept: list[int] = []
        for id in map(int, ids):
            if id == END:
                break
            if id not in (PADDING, START):
                kept.append(id)
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides how texts become numbers: equal for equal vocabularies, and for no others."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def check(self, digest: str) -> None:
        """Refuse weights that were trained with another vocabulary, whose ``digest`` is given.

        Raises:
            ExperimentError: the digests differ.
        """
        if digest != self.digest:
            raise ExperimentError(
                f"these weights belong to another vocabulary: expected one with SHA-256 {digest}, got {self.digest} "
                f"with {self.size:,} words: use the data and the options of the run that trained them"
            )

    def save(self, path: Path) -> None:
        """Write the vocabulary to ``path`` as Hugging Face tokenizers does, in JSON."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """The vocabulary that ``save`` wrote.

        Raises:
            ExperimentError: the file is missing, cut short or not one of ours.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ExperimentError) as error:
            raise ExperimentError(
                f"{path} cannot be read as a vocabulary: {error}: put the file there that Vocabulary.save wrote"
            ) from error

    def to_json(self) -> str:
        """What ``save`` writes."""
        return self._tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """The vocabulary that ``to_json`` wrote."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ExperimentError(f"expected a tokenizer in JSON, got {len(text):,} characters: {error}") from error
        return cls(tokenizer)


def word_vocabulary(
    texts: Iterable[str],
    *,
    largest: int | None = None,
    least_count: int = 1,
    words: Sequence[str] | None = None,
    pattern: str = WORDS,
    lowercase: bool = True,
    join_contractions: bool = False,
) -> Vocabulary:
    """The words of the texts, the most frequent first; words of one count in alphabetical order.

    ``<br />`` counts as a space and U+2019 as an apostrophe.

    Args:
        texts: what the words are counted in; not read if ``words`` are given.
        largest: words kept at most, the four symbols included; None keeps all.
        least_count: words that occur more rarely are unknown.
        words: the vocabulary itself, in this order, such as the list that belongs to a data set.
        pattern: regular expression of a word: ``WORDS``, or ``SPACED`` for texts that are split already. What it does
            not match is left out.
        lowercase: before the words are looked for. ``WORDS`` knows no capitals.
        join_contractions: "do n't" and "it 's", as a treebank splits them, become "don't" and "it's" first.

    Raises:
        ExperimentError: no word is left.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    steps = [normalizers.Replace("<br />", " "), normalizers.Replace("\u2019", "'")]
    steps += [normalizers.Lowercase()] if lowercase else []
    steps += [normalizers.Replace(Regex(_SPLIT_OFF), "")] if join_contractions else []
    normalizer = normalizers.Sequence(steps)
    splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)

    def tokenizer(model: Any) -> Tokenizer:
        whole = Tokenizer(model)
        whole.normalizer, whole.pre_tokenizer = normalizer, splitter
        return whole

    if words is None:
        counter = tokenizer(models.WordLevel(unk_token=SYMBOLS[UNKNOWN]))
        trainer = trainers.WordLevelTrainer(
            vocab_size=_NO_LIMIT, min_frequency=least_count, special_tokens=[], show_progress=False
        )
        counter.train_from_iterator(texts, trainer)
        ids = counter.get_vocab()
        words = sorted(ids, key=ids.__getitem__)
    ids = _numbered(words, largest)
    if len(ids) <= len(SYMBOLS):
        raise ExperimentError(
            f"no word is left for a vocabulary: expected words that match {pattern} and occur {least_count} times or "
            f"more, at most {largest} with the {len(SYMBOLS)} symbols: give more text or another least_count or largest"
        )
    return Vocabulary(tokenizer(models.WordLevel(ids, unk_token=SYMBOLS[UNKNOWN])))


def bpe_vocabulary(texts: Iterable[str], *, size: int, lowercase: bool = False) -> Vocabulary:
    """Pieces of words: bytes, and the pairs of pieces that occurred most often, joined until there are ``size`` pieces.

    No text has an unknown piece, and ``decode`` gives every text back.

    Args:
        texts: what the pairs are counted in.
        size: pieces at most, the four symbols and the 256 bytes included; fewer if no pair occurs twice.
        lowercase: first; ``decode`` then gives back the lower-cased text.

    Raises:
        ExperimentError: ``size`` has no room for the bytes.

    Source: Sennrich, Haddow & Birch 2016, Neural machine translation of rare words with subword units; on bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if size < len(SYMBOLS) + 256:
        raise ExperimentError(
            f"a vocabulary of byte pairs needs a size of {len(SYMBOLS) + 256} or more, for {len(SYMBOLS)} symbols and "
            f"256 bytes, got {size}"
        )

    def tokenizer(model: Any) -> Tokenizer:
        whole = Tokenizer(model)
        if lowercase:
            whole.normalizer = normalizers.Lowercase()
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole.decoder = decoders.ByteLevel()
        return whole

    counter = tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SYMBOLS),
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counter.train_from_iterator(texts, trainer)
    # Symbols handed to the trainer would be found in texts; so the pieces are numbered anew, behind ours.
    learnt = json.loads(counter.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    merges = [tuple(pair) for pair in learnt["merges"]]
    return Vocabulary(tokenizer(models.BPE(_numbered(pieces, None), merges)))


def _numbered(words: Sequence[str], largest: int | None) -> dict[str, int]:
    """The symbols and the words in order, each once, numbered from 0."""
    every = dict.fromkeys(chain(SYMBOLS, words))
    return {word: id for id, word in zip(range(len(every) if largest is None else largest), every, strict=False)}
