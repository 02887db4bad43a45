"""A data set of texts, ready to train on: words as numbers, labels and vectors, made once, then read from disk.

A recipe calls ``encoded`` and makes batches of what it returns::

    data = encoded(
        "imdb",
        lambda: imdb(data_dir),
        lambda: imdb_files(data_dir),
        only=("train", "validation", "test"),
        vocabulary={"least_count": 2},
        vectors="glove.840B.300d",
        data_dir=data_dir,
        examples=config.data.examples,
    )
    model = SequenceClassifier(layer, head, Embedding(data.vocabulary.size, 300, vectors=data.vectors))

    def examples(split: str) -> Bucketed:
        texts, labels = data.texts[split], torch.from_numpy(data.labels[split])
        lengths = torch.from_numpy(texts.lengths).clamp(max=longest)

        def take(indices: Tensor) -> Batch:
            words, lengths, _ = padded([texts[i] for i in indices.tolist()], longest, "front")
            return words, lengths, labels[indices]

        return Bucketed(len(texts), batch_size, take, lengths)

The names are those of the loader's fields, without "texts" and "labels" at the end: "train" of labelled texts,
"train.first" and "train.second" of pairs (labels "train"), "train.source" and "train.target" of parallel ones. Two
vocabularies are two calls, ``only=("source",)`` and ``only=("target",)``. How many texts are longer than ``longest`` is
``(texts.lengths > longest).sum()``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from legato._shapes import Bool, Float, Int

from ..task import ExperimentError
from .files import File, find
from .prepared import prepare
from .vectors import vectors_file, word_vectors
from .words import Texts, Vocabulary, bpe_vocabulary, word_vocabulary

#: Other loaders or other words from the same files are another entry in the cache.
_CODE = sorted(Path(__file__).parent.glob("*.py"))


@dataclass(frozen=True, eq=False)
class Encoded:
    """What ``encoded`` returns.

    Args:
        texts: the numbers of the words by name, memory-mapped.
        labels: int64, by name.
        vocabulary: of all texts.
        source: name of the data, as the loader gave it.
        vectors: float32, a row for each word of the vocabulary, zero where there is none; None if none were asked for.
        found: which rows are not zero.
    """

    texts: dict[str, Texts]
    labels: dict[str, Int[np.ndarray, " texts"]]
    vocabulary: Vocabulary
    source: str
    vectors: Float[np.ndarray, "words width"] | None = None
    found: Bool[np.ndarray, " words"] | None = None


def encoded(
    name: str,
    load: Callable[[], Any],
    files: Callable[[], Sequence[Path]],
    *,
    vocabulary: Mapping[str, Any] | None = None,
    learnt_from: Sequence[str] = ("train",),
    only: Sequence[str] | None = None,
    examples: int | None = None,
    vectors: str | None = None,
    data_dir: Path | None = None,
) -> Encoded:
    """A data set as numbers: the first time made of what ``load`` returns, later read from the cache in its place.

    Args:
        name: of the entry in the cache; another one for every other ``load``, such as "imdb-unlabelled".
        load: reads the data; called only if nothing is cached. It returns a tuple with named fields: lists of texts,
            lists of labels, such tuples again, and the name of the data in ``source``.
        files: finds the files that ``load`` reads, as the loader's own function does, or ``found``. Their content, not
            their names, decides what is read from the cache. If there is none even after ``load``, which may download
            it, nothing is cached.
        vocabulary: arguments of ``word_vocabulary``, or ``{"bpe": size}`` with those of ``bpe_vocabulary``; a list of
            ``words`` must be in it, not in a file.
        learnt_from: the words are counted in texts with one of these in their name.
        only: only what has one of these in its name is kept; None keeps all.
        examples: this many of each split, the classes in equal parts, those first in the data; None keeps all.
        vectors: name or file for ``word_vectors``.
        data_dir: where the vectors are looked for.

    Raises:
        ExperimentError: what the loader raises; nothing to learn a vocabulary from; a label for which there is no text;
            less than one example asked for.
    """
    import tokenizers

    if examples is not None and examples < 1:
        raise ExperimentError(f"expected 1 example or more of each split, got {examples}")
    asked = dict(vocabulary or {})
    settings = {
        "tokenizers": tokenizers.__version__,
        "vocabulary": asked,
        "learnt_from": list(learnt_from),
        "only": None if only is None else list(only),
        "examples": examples,
    }

    content = _kept(name, settings, load, files, lambda data: _numbers(data, asked, learnt_from, only, examples))
    made = Vocabulary.from_json(content["vocabulary"])
    texts = {
        key.removeprefix("ids "): Texts(ids, content[f"offsets {key.removeprefix('ids ')}"])
        for key, ids in content.items()
        if key.startswith("ids ")
    }
    # A copy: small, and torch takes only memory that can be written to.
    labels = {
        key.removeprefix("labels "): np.array(value) for key, value in content.items() if key.startswith("labels ")
    }
    if vectors is None:
        return Encoded(texts, labels, made, content["source"])
    rows = prepare(
        f"{name}-{Path(vectors).name}",
        {"words": made.words},
        [*_CODE, vectors_file(data_dir, vectors)],
        lambda: dict(zip(("matrix", "found"), word_vectors(made.words, data_dir, vectors), strict=False)),
    )
    return Encoded(texts, labels, made, content["source"], np.array(rows["matrix"]), np.array(rows["found"]))


def arrays(name: str, load: Callable[[], Any], files: Callable[[], Sequence[Path]]) -> dict[str, Any]:
    """The arrays and strings of a data set that needs no words, such as text8: as ``encoded``, from the cache.

    Args:
        name: as in ``encoded``.
        load: as in ``encoded``; it returns a tuple with named fields, arrays and strings.
        files: as in ``encoded``.
    """
    return _kept(name, {}, load, files, lambda data: data._asdict())


def found(folder: str, files: Iterable[File], data_dir: Path | None = None) -> list[Path]:
    """Where those of a data set's files lie that are there; ``files.find`` looks for each."""
    paths = (find(file, folder, data_dir) for file in files)
    return [path for path in paths if path is not None]


def _kept(
    name: str,
    settings: dict[str, Any],
    load: Callable[[], Any],
    files: Callable[[], Sequence[Path]],
    make: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """What ``make`` makes of what ``load`` returns, from the cache if the files are the same."""
    paths, data = files(), None
    if not paths:
        data = load()
        paths = files()

    def build() -> dict[str, Any]:
        return make(load() if data is None else data)

    return prepare(name, settings, [*_CODE, *paths], build) if paths else build()


def _numbers(
    data: Any, vocabulary: dict[str, Any], learnt_from: Sequence[str], only: Sequence[str] | None, examples: int | None
) -> dict[str, Any]:
    """The arrays and strings that are kept in the cache."""
    texts: dict[str, list[str]] = {}
    labels: dict[str, list[int]] = {}
    for path, values in _lists(data):
        if only is not None and not set(only) & set(path):
            continue
        key = ".".join(path[:-1] if path[-1] in ("texts", "labels") else path)
        (labels if path[-1] == "labels" else texts)[key] = values
    _check(texts, labels)
    if examples is not None:
        texts, labels = _some(texts, labels, examples)
    learnt = [key for key in texts if set(learnt_from) & set(key.split("."))]
    if not learnt:
        raise ExperimentError(
            f"no text to learn the words from: expected {' or '.join(learnt_from)} in one of {', '.join(texts)}"
        )
    training = (text for key in learnt for text in texts[key])
    if "bpe" in vocabulary:
        made = bpe_vocabulary(training, **{"size" if k == "bpe" else k: v for k, v in vocabulary.items()})
    else:
        made = word_vocabulary(training, **vocabulary)
    content: dict[str, np.ndarray | str] = {"vocabulary": made.to_json(), "source": getattr(data, "source", "")}
    for key, values in texts.items():
        numbers = made.encode(values)
        content |= {f"ids {key}": numbers.ids, f"offsets {key}": numbers.offsets}
    for key, values in labels.items():
        content[f"labels {key}"] = np.array(values, np.int64)
    return content


def _lists(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list]]:
    """Every list in a tuple with named fields, and in those inside it, with the names that lead to it."""
    for field, value in data._asdict().items():
        if hasattr(value, "_asdict"):
            yield from _lists(value, (*path, field))
        elif not isinstance(value, str):
            yield (*path, field), value


def _check(texts: dict[str, list[str]], labels: dict[str, list[int]]) -> None:
    """Texts that belong together, and their labels, are of one number."""
    for key, values in labels.items():
        for name in _under(key, texts):
            if len(texts[name]) != len(values):
                raise ExperimentError(
                    f"expected a label for each text of {name}, got {len(texts[name]):,} texts and "
                    f"{len(values):,} labels"
                )


def _some(
    texts: dict[str, list[str]], labels: dict[str, list[int]], count: int
) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """The first ``count`` examples of every split, of each class an equal part where there are labels."""
    chosen = {key: range(min(count, len(values))) for key, values in texts.items()}
    for key, values in labels.items():
        of_class: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(values):
            of_class[label].append(index)
        parts = [
            indices[: (count + turn) // len(of_class)] for turn, (_, indices) in enumerate(sorted(of_class.items()))
        ]
        balanced = sorted(index for part in parts for index in part)
        chosen |= dict.fromkeys((*_under(key, texts), f"labels {key}"), balanced)
    return (
        {key: [values[i] for i in chosen[key]] for key, values in texts.items()},
        {key: [values[i] for i in chosen[f"labels {key}"]] for key, values in labels.items()},
    )


def _under(key: str, texts: dict[str, list[str]]) -> list[str]:
    """The texts that the labels of this name are about."""
    return [name for name in texts if name == key or name.startswith(f"{key}.")]
