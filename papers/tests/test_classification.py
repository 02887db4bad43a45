"""What the recipes that classify texts share: the paper's network and the task, on invented sentences."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import bounds
from legato_papers.data.encoded import encoded
from legato_papers.data.texts import Labelled, Pairs
from legato_papers.kinds import KINDS
from legato_papers.recipes._classification import Classification, Config, Data, FineTuning, Model
from legato_papers.task import ExperimentError

TEXTS = ["a warm and funny film", "", "dull dull dull and far too long", "I liked it?", "no", "warm"]
LABELS = [1, 0, 0, 1, 0, 1]


class Invented(NamedTuple):
    train: Labelled | Pairs
    validation: Labelled | Pairs
    test: Labelled | Pairs
    source: str


@pytest.fixture(autouse=True)
def _own_cache_and_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    yield
    torch.set_flush_denormal(False)


def texts(split, **vocabulary):
    return encoded("invented", lambda: Invented(split, split, split, "invented"), list, vocabulary=vocabulary)


def task(data=None, classes=2, longest=6, seed=0, **model):
    config = Config(
        Data(longest=longest),
        Model(channels=8, units=8, heads=2, **model),
        FineTuning(batch_size=3, vector_rate=5.0),
    )
    torch.manual_seed(seed)
    return Classification(config, data or texts(Labelled(TEXTS, LABELS)), classes)


def test_networks_have_301_1201_and_3603_parameters():
    single, pairs = texts(Labelled(TEXTS, LABELS)), texts(Pairs(TEXTS, TEXTS[::-1], LABELS))
    for data, classes, expected in ((single, 2, 301), (pairs, 2, 1201), (pairs, 3, 3603)):
        model = Classification(Config(), data, classes).model
        assert sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel() == expected


def test_the_memory_is_a_fading_sum_of_word_vectors():
    made = task(theta=3.0)
    model = made.model.eval()
    words, lengths, _ = made.test.take(torch.arange(len(TEXTS)))
    wide = copy.deepcopy(model).double()

    def faded(words):
        ago = (lengths[:, None] - 1 - torch.arange(words.shape[1])).double()
        fade = torch.where(ago >= 0, torch.exp(-ago / 3), 0) * -math.expm1(-1 / 3)
        bag = (fade[..., None] * wide.embedding(words)).sum(1) * wide.layer.scale[0]
        return wide.head(bag)

    # Sums over the words, and then over at most 300 channels.
    bounds.assert_agrees(model(words, lengths=lengths)[0], faded, words, terms=words.shape[1] + 300)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [False, True])
def test_every_kind_learns_a_few_texts(kind, pairs):
    split = Pairs(TEXTS, TEXTS[::-1], [0, 2, 1, 1, 2, 0]) if pairs else Labelled(TEXTS, LABELS)
    made = task(texts(split), classes=3 if pairs else 2, kind=kind, longest=10)
    batch = made.train.take(torch.arange(len(TEXTS)))
    optimizer = torch.optim.Adam(made.model.parameters(), 0.05)
    for _ in range(60):
        loss = made.loss(made.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert made.metrics(made.total(made.model.eval(), made.train)) == {"accuracy": 1.0}


def test_long_and_empty_texts_are_cut_as_asked_and_counted():
    made = task(longest=4)
    words, lengths, _ = made.train.take(torch.tensor([2, 1]))
    assert lengths.tolist() == [4, 0]
    assert [made.data.vocabulary.words[i] for i in words[0]] == ["and", "far", "too", "long"]
    assert made.tokens(made.train.take(torch.tensor([2, 1]))) == 4
    outcome = made.outcome()
    assert outcome["truncated"] == {"train": 2, "validation": 2, "test": 2}
    assert outcome["empty"]["test"] == 1
    made.config.data.truncate = "back"
    assert [made.data.vocabulary.words[i] for i in made.train.take(torch.tensor([2]))[0][0]][:2] == ["dull", "dull"]


def test_validation_texts_can_be_trained_on():
    data = encoded(
        "invented",
        lambda: Invented(Labelled(TEXTS, LABELS), Labelled(["a film too far"], [1]), Labelled(["no"], [0]), ""),
        list,
    )
    config = Config(Data(vectors=None, train_on_validation=True), Model(channels=8))
    made = Classification(config, data, 2)
    words, lengths, labels = made.train.take(torch.tensor([6, 4]))
    assert (made.train.size, made.validation.size, made.keeps_last) == (7, 1, True)
    assert ([made.data.vocabulary.words[i] for i in words[0]], lengths.tolist()) == (
        ["a", "film", "too", "far"],
        [4, 1],
    )
    assert labels.tolist() == [1, 0]
    assert not task().keeps_last


def test_vectors_learn_at_their_own_rate_or_not_at_all():
    made = task()
    names = [name for name, _ in made.model.named_parameters()]
    assert {name: made.rate(name) for name in names} == {
        "embedding.weight": 5.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    assert not task(train_vectors=False).model.embedding.weight.requires_grad


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ExperimentError, match="invented, train: expected labels from 0 to 1, got 2 in example 1"):
        task(texts(Labelled(TEXTS, [0, 2, 1, 1, 0, 1])))


def test_vectors_of_another_width_are_refused():
    data = texts(Labelled(TEXTS, LABELS))
    wide = replace(data, vectors=np.zeros((data.vocabulary.size, 12), np.float32))
    with pytest.raises(ExperimentError, match=r"300d are 12 wide, .* reads 8 channels: set --model.channels 12"):
        task(wide)


def test_weights_are_refused_with_another_vocabulary():
    made, other = task(), task(texts(Labelled([t.replace("warm", "cold") for t in TEXTS], LABELS)))
    assert made.data.vocabulary.size == other.data.vocabulary.size
    weights = made.model.state_dict()
    copy.deepcopy(task(seed=1).model).load_state_dict(weights)
    with pytest.raises(ExperimentError, match="weights belong to another vocabulary"):
        other.model.load_state_dict(weights)
