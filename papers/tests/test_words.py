import re

import numpy as np
import pytest

from legato_papers.data.words import (
    END,
    PADDING,
    SPACED,
    START,
    WORDS,
    Vocabulary,
    bpe_vocabulary,
    word_vocabulary,
)
from legato_papers.task import ExperimentError

REVIEWS = [
    "A slow, slow film.<br /><br />It isn\u2019t bad!",
    "THE FILM was bad; we'll give it 3/10 (at most).",
    "na\u00efve & caf\u00e9-like: \u201cquoted\u201d $5",
]


def words_of(vocabulary, text):
    return [vocabulary.words[id] for id in vocabulary.encode([text])[0]]


def test_words_are_those_that_the_vectors_were_trained_on():
    vocabulary = word_vocabulary(REVIEWS)
    for text in REVIEWS:
        plain = text.replace("<br />", " ").replace("\u2019", "'").lower()
        assert words_of(vocabulary, text) == re.findall(WORDS, plain)


def test_words_are_sorted_by_frequency_then_alphabet():
    vocabulary = word_vocabulary(["b a c c", "c b a d"])
    assert vocabulary.words[4:] == ["c", "a", "b", "d"]
    assert word_vocabulary(["b a c c", "c b a d"], largest=6).words[4:] == ["c", "a"]
    assert word_vocabulary(["b a c c", "c b a d"], least_count=2).words[4:] == ["c", "a", "b"]


def test_a_vocabulary_has_the_requested_size_with_symbols():
    assert word_vocabulary(REVIEWS, largest=10).size == 10
    assert len(word_vocabulary(REVIEWS, largest=10).words) == 10


def test_an_unknown_word_is_one():
    vocabulary = word_vocabulary(["a good film"])
    assert vocabulary.encode(["a poor film"])[0].tolist() == [4, 1, 5]


def test_no_text_holds_padding_a_start_or_an_end():
    for vocabulary in (word_vocabulary(["a b"], pattern=SPACED), bpe_vocabulary(["a b"], size=300)):
        for symbol in vocabulary.words[:4]:
            assert not set(vocabulary.encode([f"a {symbol} <s> </s> <pad> b"])[0].tolist()) & {PADDING, START, END}


def test_an_empty_text_has_a_length_of_zero():
    vocabulary = word_vocabulary(["a good film"])
    texts = vocabulary.encode(["", "a film", "\u3042 \n", "good"])
    assert texts.lengths.tolist() == [0, 2, 0, 1]
    assert [texts[i].tolist() for i in range(4)] == [[], [4, 5], [], [6]]
    assert len(vocabulary.encode([])) == 0


def test_texts_are_flat_arrays_of_one_type():
    vocabulary = word_vocabulary(["a b c"])
    texts = vocabulary.encode(["a b", "c"] * 1500 + [""])
    assert texts.ids.dtype == np.int32
    assert texts.offsets.dtype == np.int64
    assert len(texts) == 3001
    assert texts[-2].tolist() == [6]
    assert texts[2998].tolist() == [4, 5]
    with pytest.raises(IndexError, match="one of 3,001 texts, got 3001"):
        texts[3001]


def test_words_of_tokenised_texts_are_split_at_spaces():
    vocabulary = word_vocabulary(["Xin ch\u00e0o , &apos;s A.B."], pattern=SPACED, lowercase=False)
    assert words_of(vocabulary, "A.B. &apos;s Xin xin") == ["A.B.", "&apos;s", "Xin", "<unk>"]


def test_split_contractions_are_joined_on_request():
    text = "They do n't know what it 's , ca n't they ? 'Such' 'so"
    assert words_of(word_vocabulary([text], join_contractions=True), text) == [
        *("they", "don't", "know", "what", "it's", ",", "can't", "they", "?", "such", "so")
    ]
    assert "n't" in words_of(word_vocabulary([text]), text)


def test_given_words_are_the_vocabulary_in_their_order():
    vocabulary = word_vocabulary([], words=["<unk>", "zebra", "a", "zebra", "b"])
    assert vocabulary.words[4:] == ["zebra", "a", "b"]
    assert vocabulary.encode(["b zebra"])[0].tolist() == [6, 4]


def test_decoding_stops_at_the_end_and_leaves_padding_out():
    vocabulary = word_vocabulary(["a good film"])
    assert vocabulary.decode([START, 4, 1, PADDING, 5, END, 6]) == "a <unk> film"
    assert vocabulary.decode(np.array([], np.int32)) == ""


def test_byte_pairs_give_every_text_back():
    vocabulary = bpe_vocabulary(REVIEWS * 5, size=300)
    assert 260 < vocabulary.size <= 300
    for text in [*REVIEWS, "never seen: \u3042\U0001f600 <unk>\n\tx", "", " a  b "]:
        ids = vocabulary.encode([text])[0]
        assert vocabulary.decode(ids) == text
        assert not (ids < 4).any()
    assert vocabulary.encode(REVIEWS).lengths.sum() < bpe_vocabulary(REVIEWS, size=260).encode(REVIEWS).lengths.sum()


def test_byte_pairs_need_room_for_the_bytes():
    with pytest.raises(ExperimentError, match=r"needs a size of 260 or more.* got 100"):
        bpe_vocabulary(REVIEWS, size=100)


@pytest.mark.parametrize("make", [word_vocabulary, lambda texts: bpe_vocabulary(texts, size=290)])
def test_a_vocabulary_is_deterministic_and_survives_a_file(make, tmp_path, capfd):
    vocabulary, again = make(REVIEWS), make(REVIEWS)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded.digest == again.digest == vocabulary.digest
    assert loaded.words == vocabulary.words
    assert loaded.encode(REVIEWS).ids.tolist() == vocabulary.encode(REVIEWS).ids.tolist()
    assert capfd.readouterr().out == ""


def test_a_vocabulary_that_does_not_fit_a_checkpoint_is_refused():
    vocabulary, other = word_vocabulary(["a b"]), word_vocabulary(["a c"])
    vocabulary.check(vocabulary.digest)
    with pytest.raises(ExperimentError, match=f"{other.digest}, got {vocabulary.digest} with 6 words"):
        vocabulary.check(other.digest)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_file_that_is_no_vocabulary_is_named(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(ExperimentError, match=r"vocabulary\.json cannot be read as a vocabulary"):
        Vocabulary.load(path)
    with pytest.raises(ExperimentError, match=r"none\.json cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path / "none.json")


def test_a_tokenizer_of_another_program_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "vocabulary.json"
    Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ExperimentError, match=r"not a vocabulary of legato.* got \[PAD\], \[UNK\] first"):
        Vocabulary.load(path)


def test_texts_without_a_word_make_no_vocabulary():
    with pytest.raises(ExperimentError, match="no word is left"):
        word_vocabulary(["", "\u3042"])
    with pytest.raises(ExperimentError, match="no word is left"):
        word_vocabulary(["a b"], least_count=2)
    for largest in (4, 3, 0):
        with pytest.raises(ExperimentError, match=f"no word is left.*at most {largest} with the 4 symbols"):
            word_vocabulary(["a b"], largest=largest)
