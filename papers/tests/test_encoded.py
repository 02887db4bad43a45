from typing import NamedTuple

import numpy as np
import pytest

from legato_papers.data.encoded import arrays, encoded, found
from legato_papers.data.files import File
from legato_papers.data.texts import Labelled, Pairs, Parallel
from legato_papers.task import ExperimentError


class Reviews(NamedTuple):
    train: Labelled
    test: Labelled
    unlabelled: list[str]
    source: str = "reviews"


class Questions(NamedTuple):
    train: Pairs
    test: Pairs
    source: str = "questions"


class Translation(NamedTuple):
    train: Parallel
    test: Parallel
    source: str = "lines"


REVIEWS = Reviews(
    Labelled(["a good film", "a bad film", "", "bad bad"], [1, 0, 1, 0]),
    Labelled(["good grief", "film"], [1, 0]),
    ["what grief"],
)
QUESTIONS = Questions(Pairs(["who", "why me"], ["who else", "me"], [1, 0]), Pairs(["else"], ["why"], [0]))


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """What finds the file of every data set here."""
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("one")
    return lambda: [tmp_path / "file"]


def counted(data):
    calls = []
    return calls, lambda: calls.append(0) or data


def text(data, name):
    return [data.vocabulary.decode(data.texts[name][i]) for i in range(len(data.texts[name]))]


def test_the_second_start_gives_the_same_and_does_not_load(files):
    calls, load = counted(REVIEWS)
    for _ in range(2):
        data = encoded("reviews", load, files)
        assert data.source == "reviews"
        assert text(data, "train") == ["a good film", "a bad film", "", "bad bad"]
        assert text(data, "test") == ["good <unk>", "film"]
        assert text(data, "unlabelled") == ["<unk> <unk>"]
        assert {name: labels.tolist() for name, labels in data.labels.items()} == {
            "train": [1, 0, 1, 0],
            "test": [1, 0],
        }
        assert data.labels["train"].flags.writeable
        assert isinstance(data.texts["train"].ids, np.memmap)
        assert data.vectors is data.found is None
    assert len(calls) == 1


def test_every_choice_is_another_entry_in_the_cache(files):
    calls, load = counted(REVIEWS)
    for choice in (
        {},
        {"vocabulary": {"least_count": 2}},
        {"vocabulary": {"bpe": 300}},
        {"learnt_from": ("train", "unlabelled")},
        {"only": ("train",)},
        {"examples": 2},
    ):
        encoded("reviews", load, files, **choice)
    files()[0].write_text("two")
    encoded("reviews", load, files)
    assert len(calls) == 7


def test_words_are_learnt_from_the_texts_that_are_named(files):
    data = encoded("reviews", lambda: REVIEWS, files, learnt_from=("train", "unlabelled"))
    assert text(data, "test") == ["good grief", "film"]
    with pytest.raises(ExperimentError, match="expected validation in one of train, test, unlabelled"):
        encoded("reviews", lambda: REVIEWS, files, learnt_from=("validation",))


def test_what_is_not_asked_for_is_left_out(files):
    data = encoded("reviews", lambda: REVIEWS, files, only=("train", "test"))
    assert list(data.texts) == list(data.labels) == ["train", "test"]


def test_pairs_have_one_vocabulary_and_two_names(files):
    data = encoded("questions", lambda: QUESTIONS, files)
    assert text(data, "train.first") == ["who", "why me"]
    assert text(data, "train.second") == ["who else", "me"]
    assert text(data, "test.first") == ["else"]
    assert data.labels["train"].tolist() == [1, 0]


def test_two_languages_have_two_vocabularies(files):
    lines = Translation(Parallel(["go !", "a dog"], ["va !", "un chien"]), Parallel(["dog"], ["chien"]))
    source = encoded("lines", lambda: lines, files, only=("source",), vocabulary={"largest": 7})
    target = encoded("lines", lambda: lines, files, only=("target",))
    assert list(source.texts) == ["train.source", "test.source"]
    assert source.vocabulary.size == 7
    assert text(target, "test.target") == ["chien"]


def test_a_sample_has_the_first_examples_of_each_class(files):
    train = Labelled([f"text {i}" for i in range(10)], [0, 0, 0, 0, 0, 1, 2, 1, 2, 1])
    data = Reviews(train, Labelled(["text"], [0]), [f"text {i}" for i in range(10)])
    sample = encoded("reviews", lambda: data, files, examples=5)
    assert text(sample, "train") == ["text 0", "text 5", "text 6", "text 7", "text 8"]
    assert sample.labels["train"].tolist() == [0, 1, 2, 1, 2]
    assert len(sample.texts["unlabelled"]) == 5
    assert len(sample.texts["test"]) == 1


def test_a_sample_of_pairs_keeps_them_together(files):
    pairs = Pairs([f"text {i}" for i in range(6)], [f"other {i}" for i in range(6)], [0, 0, 0, 1, 1, 1])
    sample = encoded("questions", lambda: Questions(pairs, pairs), files, examples=2)
    assert text(sample, "train.first") == ["text 0", "text 3"]
    assert text(sample, "train.second") == ["other 0", "other 3"]


@pytest.mark.parametrize("examples", [0, -1])
def test_a_sample_has_one_example_or_more(files, examples):
    with pytest.raises(ExperimentError, match=f"expected 1 example or more of each split, got {examples}"):
        encoded("reviews", lambda: REVIEWS, files, examples=examples)


def test_labels_that_are_not_one_to_a_text_are_refused(files):
    data = Questions(Pairs(["a"], ["b", "c"], [0]), QUESTIONS.test)
    with pytest.raises(ExperimentError, match=r"label for each text of train\.second, got 2 texts and 1 labels"):
        encoded("questions", lambda: data, files)


def test_vectors_belong_to_the_words_and_are_read_once(files, tmp_path, monkeypatch):
    vectors_path = tmp_path / "vectors.npz"
    words = np.array([b"film", b"good", b"what"])
    vectors = np.arange(3 * 300, dtype=np.float16).reshape(3, 300) / 64
    np.savez(vectors_path, words=words, vectors=vectors)
    for _ in range(2):
        data = encoded("reviews", lambda: REVIEWS, files, vectors=str(vectors_path), data_dir=tmp_path)
        assert data.vectors.shape == (data.vocabulary.size, 300)
        assert data.vectors.flags.writeable
        ids = data.vocabulary.encode(["film good"])[0]
        np.testing.assert_array_equal(data.vectors[ids], vectors[:2].astype(np.float32))
        assert data.found.sum() == 2
        assert not data.vectors[~data.found].any()
    vectors_path.unlink()
    with pytest.raises(ExperimentError, match=r"there are no vectors .*vectors\.npz"):
        encoded("reviews", lambda: REVIEWS, files, vectors=str(vectors_path), data_dir=tmp_path)


def test_files_that_the_loader_downloads_are_found_afterwards(tmp_path):
    calls, load = counted(REVIEWS)

    def download():
        (tmp_path / "set" / "downloaded").mkdir(parents=True)
        (tmp_path / "set" / "downloaded" / "reviews.jsonl").write_text("reviews")
        return load()

    def files():
        return found("downloaded", (File("reviews.jsonl"), File("other.jsonl")), tmp_path / "set")

    for loader in (download, load):
        assert text(encoded("reviews", loader, files), "test") == ["good <unk>", "film"]
    assert len(calls) == 1


def test_what_has_no_files_is_not_cached():
    calls, load = counted(REVIEWS)
    for _ in range(2):
        assert text(encoded("reviews", load, list), "test") == ["good <unk>", "film"]
    assert len(calls) == 2


def test_arrays_need_no_words(files):
    class Characters(NamedTuple):
        train: np.ndarray
        source: str = "characters"

    calls, load = counted(Characters(np.arange(5, dtype=np.uint8)))
    for _ in range(2):
        data = arrays("characters", load, files)
        assert data["train"].tolist() == [0, 1, 2, 3, 4]
        assert data["train"].dtype == np.uint8
        assert data["source"] == "characters"
    assert len(calls) == 1
