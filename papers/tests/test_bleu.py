import math
from collections import Counter

import pytest

import real_data
from legato_papers.bleu import bleu, bleu_counts, detokenised, signature
from legato_papers.data.translation import translation

SENTENCES = ["The cat sat on the mat .", "A dog barks , loudly .", "Nobody knows why the bird sings ."]
CLOSE = ["The cat sat on a mat .", "The dog barks , loudly .", "Nobody knows why birds sing ."]


def test_a_text_against_itself_is_100_and_against_nothing_0():
    assert bleu(bleu_counts(SENTENCES, SENTENCES)) == pytest.approx(100)
    assert bleu(bleu_counts([""] * 3, SENTENCES)) == 0
    assert bleu(bleu_counts([], [])) == 0


def test_bleu_follows_from_its_formula():
    # n-grams found of 5 words, against 5 of the reference: 4 of 5, 3 of 4, 2 of 3, 1 of 2
    found = bleu_counts(["a b c d x"], ["a b c d e"], "none")
    assert found.tolist() == [4, 3, 2, 1, 5, 4, 3, 2, 5, 5]
    assert bleu(found, "none") == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


@pytest.mark.parametrize("tokenize", ["13a", "none"])
def test_counts_of_parts_add_up_to_those_of_the_whole(tokenize):
    from sacrebleu.metrics.bleu import BLEU

    parts = sum(bleu_counts(CLOSE[i : i + 1], SENTENCES[i : i + 1], tokenize) for i in range(3))
    whole = BLEU(tokenize=tokenize, force=True).corpus_score(CLOSE, [SENTENCES]).score
    assert bleu(parts, tokenize) == pytest.approx(whole)
    assert 10 < whole < 90


def test_the_signature_says_how_it_was_counted():
    assert signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signature("none").startswith("nrefs:1|case:mixed|eff:no|tok:none|smooth:none|version:")


def test_missing_translations_get_a_clear_error():
    with pytest.raises(ValueError, match="a reference for each translation, got 1 and 3"):
        bleu_counts(["a"], SENTENCES)


def test_detokenised_text_reads_as_it_was_written():
    tokenised = "&quot; I wouldn &apos;t &quot; , said Ann &apos;s friend ( the old one ) : &quot; why ? &quot;"
    assert detokenised(tokenised) == '"I wouldn\'t", said Ann\'s friend (the old one): "why?"'
    assert detokenised("") == ""


@real_data.needs("iwslt15-en-vi")
@pytest.mark.parametrize(("part", "sentences", "words"), [("validation", 1553, 34297), ("test", 1268, 33682)])
def test_official_references_score_100_against_themselves(part, sentences, words):
    references = getattr(translation("en-vi", real_data.DATA, train=False), part).target
    counts = bleu_counts(references, references, "none")
    assert (len(references), counts[-1]) == (sentences, words)
    assert bleu(counts, "none") == pytest.approx(100)
    plain = [detokenised(text) for text in references]
    assert bleu(bleu_counts(plain, plain)) == pytest.approx(100)
    # Every tenth word left out, and counted by hand as multi-bleu.perl does.
    fewer = [" ".join(word for i, word in enumerate(text.split()) if i % 10 != 9) for text in references]
    changed = bleu(bleu_counts(fewer, references, "none"), "none")
    assert changed == pytest.approx(by_hand(fewer, references))
    assert changed == pytest.approx({"validation": 79.0638, "test": 78.0705}[part], abs=1e-4)


def by_hand(translations, references):
    """100 * the brevity penalty * the geometric mean of the shares of n-grams found, over the whole text."""
    found, written = [0] * 4, [0] * 4
    for one, other in zip(translations, references, strict=True):
        for n in range(4):
            grams, wanted = (
                Counter(tuple(words[i : i + n + 1]) for i in range(len(words) - n))
                for words in (one.split(), other.split())
            )
            found[n] += (grams & wanted).total()
            written[n] += grams.total()
    short = min(0.0, 1 - sum(len(text.split()) for text in references) / written[0])
    return 100 * math.exp(short + sum(math.log(f / w) for f, w in zip(found, written, strict=True)) / 4)
