"""IMDB after pre-training: the weights that are taken over, and the runs that are refused."""

import copy
import json
import os
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch

import bounds
import configs
from legato_papers.checkpoint import CheckpointError
from legato_papers.data.texts import Labelled
from legato_papers.data.words import END, Texts
from legato_papers.recipes import imdb_language_model, imdb_pretrained, recipe
from legato_papers.recipes.imdb_language_model import end_to_end
from legato_papers.run import Options, evaluate, train
from legato_papers.task import ExperimentError

GOOD, BAD = ["bright", "warm", "funny", "rich"], ["dull", "cold", "flat", "thin"]
COMMON = ["the", "film", "was", "a", "story", "and", "its", "cast", ",", "."]


class Reviews(NamedTuple):
    train: Labelled
    validation: Labelled
    test: Labelled
    unlabelled: list[str]
    source: str = "our own reviews"


def reviews(seed=0):
    """Texts of our own, whose class shows in their words."""
    random = np.random.default_rng(seed)

    def text(label):
        return " ".join(random.choice(COMMON + 2 * (GOOD if label else BAD), random.integers(5, 25)))

    def labelled(count):
        labels = [i % 2 for i in range(count)]
        return Labelled([text(label) for label in labels], labels)

    return Reviews(labelled(48), labelled(20), labelled(20), [text(i % 2) for i in range(60)])


@pytest.fixture(autouse=True)
def own_reviews(monkeypatch, tmp_path):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    use_reviews(monkeypatch, 0)


def use_reviews(monkeypatch, seed):
    use(monkeypatch, reviews(seed))


def use(monkeypatch, data):
    """These reviews in the place of IMDB's; without a file, nothing is cached."""
    monkeypatch.setattr(imdb_language_model, "imdb", lambda data_dir=None, unlabelled=False: data)
    monkeypatch.setattr(imdb_language_model, "imdb_files", lambda data_dir=None, unlabelled=False: [])


def smoke(module, *presets, **fields):
    return configs.preset(module, *presets, "smoke", **{"data__examples": None} | fields)


def run(name, config, folder=None, precision="32-true", **options):
    chosen = {"seeds": [], "seed": 0, "run_dir": folder, "resume": False, "overwrite": False, "data_dir": None}
    chosen |= {"accelerator": "cpu", "devices": 1, "precision": precision}
    return train(recipe(name), config, Options(**(chosen | options)))[0]


def started(config):
    """The task as its first update finds it."""
    task = imdb_pretrained.build(config, 0)
    task.start()
    return task


@pytest.fixture
def language_model(tmp_path):
    folder = tmp_path / "runs" / "imdb-language-model" / "one"
    run("imdb-language-model", smoke(imdb_language_model), folder)
    return folder


def test_reviews_stand_end_to_end_with_an_end_symbol_behind_each():
    texts = Texts(np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 2, 2, 5]))
    assert end_to_end(texts).tolist() == [5, 6, END, END, 7, 8, 9, END]
    assert end_to_end(texts, slice(1, 3)).tolist() == [END, 7, 8, 9, END]
    assert end_to_end(texts, slice(2)).tolist() == [5, 6, END, END]


def test_the_language_model_reads_no_test_text(monkeypatch):
    task = imdb_language_model.build(smoke(imdb_language_model), 0)
    other = reviews(0)._replace(test=Labelled(["never seen words"] * 20, [0, 1] * 10))
    use(monkeypatch, other)
    again = imdb_language_model.build(smoke(imdb_language_model), 0)
    for mine, theirs in ((task.train, again.train), (task.validation, again.validation), (task.test, again.test)):
        assert np.array_equal(mine.text, theirs.text)
    data = reviews(0)
    words = sum(len(text.split()) + 1 for text in (*data.train.texts, *data.unlabelled[:50]))
    assert len(task.train.text) == words
    assert task.test.tokens == sum(len(text.split()) + 1 for text in data.unlabelled[50:])


def test_fine_tuning_starts_from_pre_trained_weights(language_model):
    config = smoke(imdb_pretrained, pretrained=True, training__body_rate=0.3, training__vector_rate=5.0)
    task = started(config)
    saved = torch.load(language_model / "seed-0" / "best.ckpt", weights_only=True)["model"]
    for name, parameter in task.model.body.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    assert config.language_model == str(next(language_model.rglob("best.ckpt")).relative_to(language_model.parents[2]))
    rates = [task.rate(name) for name in ("body.depths", "body.embedding.weight", "head.weight")]
    assert rates == [0.3, 1.5, 1]
    drawn = imdb_pretrained.build(smoke(imdb_pretrained, training__body_rate=0.3, training__vector_rate=5.0), 0)
    assert [drawn.rate(name) for name in ("body.depths", "body.embedding.weight", "head.weight")] == [1, 5, 1]
    assert not torch.equal(drawn.model.body.depths, task.model.body.depths)


def test_a_whole_run_is_trained_tested_and_evaluated_again(language_model, tmp_path):
    result = run("imdb-pretrained", smoke(imdb_pretrained, pretrained=True), tmp_path / "tuned")
    assert result["data"] == "our own reviews"
    assert 0 <= result["test"]["accuracy"] <= 1
    assert result["truncated"] == {"train": 0, "validation": 0, "test": 0}
    assert result["config"]["language_model"].endswith("best.ckpt")
    assert "--language_model" in result["command"]
    run("imdb-language-model", smoke(imdb_language_model, model__channels=12))  # newer, of another size
    shutil.rmtree(language_model)
    assert evaluate(tmp_path / "tuned")[0]["test"] == result["test"]


def test_the_newest_run_is_taken(language_model):
    newer = language_model.with_name("two")
    shutil.copytree(language_model, newer)
    os.utime(newer, (later := language_model.stat().st_mtime + 10, later))
    assert newer in imdb_pretrained.language_model(smoke(imdb_pretrained)).resolve().parents
    named = smoke(imdb_pretrained, language_model=str(language_model))
    assert language_model in imdb_pretrained.language_model(named).parents


def test_the_classifier_learns_a_class_that_shows_in_the_words():
    config = smoke(imdb_pretrained, training__epochs=12, training__learning_rate=0.02, training__dropout=0.0)
    result = run("imdb-pretrained", config)
    assert result["test"]["accuracy"] == 1


def test_padding_and_texts_without_a_word_do_not_change_a_score():
    model = imdb_pretrained.build(smoke(imdb_pretrained), 0).model.eval()
    tokens = torch.randint(4, 20, (2, 9))
    alone = model(tokens[:, :6], torch.tensor([6, 6]))
    padded = model(torch.cat([tokens[:, :6], tokens[:, :3]], 1), torch.tensor([6, 6]))
    wide = copy.deepcopy(model).double()
    for found in (padded, alone):
        # Sums over the channels of a step, at most 64, and through 6 steps.
        bounds.assert_agrees(found, lambda tokens: wide(tokens, torch.tensor([6, 6])), tokens[:, :6], terms=64 * 6)
    assert torch.equal(model(tokens, torch.tensor([9, 0]))[1], model.head.bias)


def test_cut_reviews_are_counted_and_keep_their_end():
    task = imdb_pretrained.build(smoke(imdb_pretrained, data__longest=6), 0)
    data = reviews(0)
    assert task.outcome()["truncated"]["test"] == sum(len(text.split()) > 6 for text in data.test.texts)
    tokens, lengths, _ = task.test.take(torch.tensor([0]))
    assert tokens.shape == (1, 6)
    assert tokens[0].tolist() == task.reviews.texts["test"][0][-6:].tolist()
    assert lengths.tolist() == [6]


@pytest.mark.parametrize("large", [False, True])
def test_the_recipes_run_in_mixed_precision(large, tmp_path):
    if large:
        assert run("imdb-language-model", smoke(imdb_language_model, "large"), precision="bf16-mixed")
        config = smoke(imdb_pretrained, "large", pretrained=True)
        result = run("imdb-pretrained", config, tmp_path / "tuned", precision="bf16-mixed")
        assert result["config"]["language_model"].startswith("runs/imdb-language-model/")
        assert result["config"]["model"]["highways"] == 3
    else:
        assert run("imdb-pretrained", smoke(imdb_pretrained), precision="bf16-mixed")


@pytest.mark.bad_input
def test_the_large_size_has_34_million_parameters():
    class Words(NamedTuple):
        size: int = 30_000
        digest: str = "00"

    class Sizes(NamedTuple):
        vocabulary: Words = Words()
        vectors: None = None

    model = imdb_language_model.network(configs.preset(imdb_language_model, "large").model, Sizes())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(34e6, rel=0.02)


def test_a_missing_language_model_gets_a_clear_error(tmp_path):
    with pytest.raises(
        ExperimentError, match="train imdb-language-model and the same --preset, name one with --language_model"
    ):
        started(smoke(imdb_pretrained, pretrained=True))
    named = smoke(imdb_pretrained, pretrained=True, language_model="nowhere")
    with pytest.raises(ExperimentError, match="found none in nowhere"):
        started(named)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    named.language_model = "text.ckpt"
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        started(named)


def test_a_run_of_another_recipe_gets_a_clear_error(tmp_path):
    run("imdb-pretrained", smoke(imdb_pretrained), tmp_path / "other")
    config = smoke(imdb_pretrained, pretrained=True, language_model=str(tmp_path / "other"))
    with pytest.raises(ExperimentError, match="is of recipe imdb-pretrained: expected the"):
        started(config)


def test_large_and_default_networks_do_not_mix(language_model):
    with pytest.raises(ExperimentError, match=r"model\.highways 1 \(here 3\).*give the same --preset"):
        started(smoke(imdb_pretrained, "large", pretrained=True))


def test_a_language_model_that_does_not_fit_raises(language_model, monkeypatch):
    wide = smoke(imdb_pretrained, pretrained=True, model__channels=12, data__vocabulary=30)
    with pytest.raises(ExperimentError, match=r"--data.vocabulary 500 \(here 30\), --model.channels 16 \(here 12\)"):
        started(wide)
    use_reviews(monkeypatch, 1)  # as many words, most likely, in another order
    with pytest.raises(ExperimentError, match=r"another vocabulary|do not fit this network"):
        started(smoke(imdb_pretrained, pretrained=True))


@pytest.mark.bad_input
def test_wrong_vectors_or_too_large_a_validation_set_raise(monkeypatch):
    config = smoke(imdb_language_model, data__held_out=60)
    with pytest.raises(ExperimentError, match="than the 60 unlabelled ones, got 60"):
        imdb_language_model.build(config, 0)
    data = imdb_language_model.encoded_reviews(config.data, None)
    wide = type("Wide", (), {"vectors": np.zeros((data.vocabulary.size, 300)), "vocabulary": data.vocabulary})
    with pytest.raises(ExperimentError, match=r"300 wide, and the network reads 8: set --model\.width 300"):
        imdb_language_model.network(config.model, wide)


def test_the_words_of_a_run_are_saved_with_its_figures(language_model):
    result = json.loads((language_model / "seed-0" / "result.json").read_text())
    assert result["test"]["perplexity"] > 1
    assert result["tokens_per_second"] > 0
