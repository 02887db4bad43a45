"""The recipe iwslt15: figures of whole runs on sentences of our own, and on a few real ones."""

import json

import numpy as np
import pytest
import torch

import configs
import real_data
from legato_papers.bleu import bleu, bleu_counts
from legato_papers.checkpoint import load
from legato_papers.cli import main
from legato_papers.data.texts import Parallel
from legato_papers.data.translation import Translation as Sentences
from legato_papers.data.translation import translation
from legato_papers.data.words import UNKNOWN
from legato_papers.kinds import KINDS
from legato_papers.recipes import iwslt15, recipe
from legato_papers.run import Options, evaluate, train
from legato_papers.task import ExperimentError

# A language of our own: word by word, and the other way round.
WORDS = {"river": "vau", "stone": "mok", "green": "sil", "old": "tar", "finds": "ep", "a": "u", "lamp": "nodi"}


def sentences(count, seed):
    draw = np.random.default_rng(seed)
    source = [list(draw.choice(list(WORDS), draw.integers(1, 6))) for _ in range(count)]
    return Parallel([" ".join(s) for s in source], [" ".join(WORDS[w] for w in reversed(s)) for s in source])


@pytest.fixture
def invented(monkeypatch, tmp_path):
    """All three pairs are 200 / 40 / 40 sentences of our own; those of en-vi have words that its lists have not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    parts = [sentences(count, seed) for seed, count in enumerate((200, 40, 40))]
    monkeypatch.setattr(iwslt15, "translation", lambda pair, data_dir=None: Sentences(*parts, pair))
    monkeypatch.setattr(iwslt15, "found", lambda *_: [])
    known = {"en": [*WORDS][1:], "vi": [*WORDS.values()][1:]}
    monkeypatch.setattr(iwslt15, "official_words", lambda side, data_dir: ["<unk>", "<s>", "</s>", *known[side]])
    return parts


def smoke(**fields):
    return configs.preset(iwslt15, "smoke", **fields)


def run(config, folder):
    options = Options([], 0, folder, False, False, None, "cpu", 1, "32-true")
    return train(recipe("iwslt15"), config, options)[0]


@pytest.mark.parametrize(("kind", "layers"), [("lmu", 2), ("lstm", 1)])
def test_a_run_is_tested_greedily_and_by_a_beam(invented, kind, layers, tmp_path):
    result = run(smoke(model__kind=kind, model__layers=layers), tmp_path / "run")
    assert result["data"] == "multi30k-en-de"
    assert result["test"].keys() == {"bleu", "bleu_beam", "loss"}
    assert result["validation"].keys() == {"bleu", "loss"}
    assert result["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert set(result["truncated"].values()) == set(result["empty"].values()) == {0}
    assert result["tokens_per_second"] > 0
    assert evaluate(tmp_path / "run")[0]["test"] == result["test"]


def test_every_kind_has_as_many_parameters_as_the_lstm():
    sizes = {
        kind: sum(p.numel() for p in iwslt15.network(iwslt15.Model(kind=kind), 4000, 4000).parameters())
        for kind in KINDS
    }
    assert all(abs(size / sizes["lstm"] - 1) < 0.03 for size in sizes.values()), sizes


def test_the_papers_pair_is_scored_tokenised_and_not(invented, tmp_path):
    fields = {"training__updates_per_epoch": 100, "training__learning_rate": 0.01, "training__average": 0.0}
    config = smoke(data__pair="en-vi", **fields)
    result = run(config, tmp_path / "run")
    figures = {"bleu", "bleu_detokenised", "loss", "unknown_words"}
    assert result["validation"].keys() == figures
    assert result["test"].keys() == figures | {"bleu_beam", "bleu_detokenised_beam"}
    assert "tok:none|smooth:none" in result["signatures"]["bleu"]
    assert "tok:13a" in result["signatures"]["bleu_detokenised"]
    assert 0 < result["test"]["unknown_words"] < 1  # "vau" is in every fifth sentence and in no list
    task = iwslt15.build(config, 0)
    assert task.vocabulary.size == 4 + len(WORDS) - 1


def test_the_figures_do_not_depend_on_the_batches(invented, monkeypatch):
    config = smoke(model__width=3)
    task = iwslt15.build(config, 0)
    with torch.no_grad():
        task.model.head.weight.mul_(10)
    whole = task.metrics(task.total(task.model.eval(), task.test))
    halves = [task.total(task.model, task.test, rank, 2) for rank in range(2)]
    assert task.metrics(halves[0] + halves[1]) == pytest.approx(whole)
    monkeypatch.setattr(iwslt15, "TRANSLATED_AT_ONCE", 7)
    other = iwslt15.build(config, 0)
    other.model.load_state_dict(task.model.state_dict())
    assert other.metrics(other.total(other.model.eval(), other.test)) == pytest.approx(whole, rel=1e-5)


def test_a_perfect_translator_scores_100_on_both_splits(invented, monkeypatch):
    task = iwslt15.build(smoke(), 0)
    model = task.model.eval()
    targets = {}
    for examples in (task.validation, task.test):
        for indices in examples.in_order():
            source, _, target, lengths, rows = examples.take(indices)
            targets[source.shape, int(rows[0])] = iwslt15.Decoded(target, lengths, torch.zeros(len(rows)))
    answers = iter(targets.values())
    monkeypatch.setattr(type(model), "greedy", lambda *_, **__: next(answers))
    monkeypatch.setattr(type(model), "beam", lambda *_, **__: targets[next(reversed(targets))])
    assert task.metrics(task.total(model, task.validation))["bleu"] == pytest.approx(100)
    figures = task.metrics(task.total(model, task.test))
    assert (figures["bleu"], figures["bleu_beam"]) == pytest.approx((100, 100))


def test_long_and_empty_sentences_are_counted(invented, tmp_path):
    invented[0].source[:3] = ["", "river " * 60, "a"]
    invented[2].source[0] = ""
    invented[2].target[1] = "mok " * 70
    result = run(smoke(data__longest=50, data__pair="en-vi"), tmp_path / "run")
    nothing = {f"{split} {side}": 0 for split in ("train", "validation", "test") for side in ("source", "target")}
    assert result["truncated"] == nothing | {"train source": 1, "test target": 1}
    assert result["empty"] == nothing | {"train source": 1, "test source": 1}
    assert all(np.isfinite(value) for value in result["test"].values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_has_the_same_metrics_and_weights(invented, tmp_path, monkeypatch, precision):
    config = smoke(data__longest=10, training__epochs=3)

    class Stop(Exception):
        pass

    def stop(task, figures):
        raise Stop

    def run_in(name, resume=False):
        options = Options([], 0, tmp_path / name, resume, False, None, "cpu", 1, precision)
        return train(recipe("iwslt15"), config, options)[0]

    whole = run_in("whole")
    with monkeypatch.context() as patch:
        patch.setattr(iwslt15.Translation, "finished", stop)
        with pytest.raises(Stop):
            run_in("part")
    assert run_in("part", resume=True)["test"] == whole["test"]
    logs, weights = zip(
        *(
            ((home / "metrics.jsonl").read_text(), load(home / "best.ckpt")["model"])
            for home in (tmp_path / "whole/seed-0", tmp_path / "part/seed-0")
        ),
        strict=True,
    )
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_missing_files_to_train_on_are_named(tmp_path):
    (tmp_path / "iwslt15-en-vi").mkdir()
    with pytest.raises(ExperimentError, match=r"tst2012\.en|train\.en"):
        iwslt15.build(smoke(data__pair="en-vi"), 0, tmp_path)


@real_data.needs("iwslt15-en-vi")
@pytest.mark.skipif((real_data.DATA / "iwslt15-en-vi" / "train.en.xz").exists(), reason="nothing is missing here")
def test_the_official_files_lack_those_to_train_on():
    with pytest.raises(ExperimentError, match=r"train\.en"):
        iwslt15.build(smoke(data__pair="en-vi"), 0, real_data.DATA)


@real_data.needs("iwslt15-en-vi")
def test_official_words_cover_99_percent_of_the_references(monkeypatch):
    official = translation("en-vi", real_data.DATA, train=False)
    monkeypatch.setattr(iwslt15, "translation", lambda *_: official._replace(train=official.validation))
    monkeypatch.setattr(iwslt15, "found", lambda *_: [])
    task = iwslt15.build(smoke(data__pair="en-vi", data__examples=None), 0, real_data.DATA)
    assert {side: of_side.vocabulary.size for side, of_side in task.numbers.items()} == {
        "source": 17192,
        "target": 7710,
    }
    for split, figure in (("validation", 97.6526), ("test", 97.5309)):
        numbers, texts = task.numbers["target"].texts[f"{split}.target"], getattr(official, split).target
        assert (numbers.ids == UNKNOWN).mean() == pytest.approx(0.0105, abs=0.0002)
        written = [task.vocabulary.decode(numbers[i]) for i in range(len(numbers))]
        assert bleu(bleu_counts(written, texts, "none"), "none") == pytest.approx(figure, abs=1e-4)


@pytest.mark.parametrize("pair", ["fra-eng", "multi30k-en-de"])
def test_a_few_real_sentences_go_all_the_way(pair, tmp_path, monkeypatch, capsys):
    folder = pair.removesuffix("-en-de")
    if not real_data.there(folder):
        pytest.skip(f"needs {folder} in the folder of LEGATO_DATA")
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    where = tmp_path / "run"
    command = ["train", "iwslt15", "--preset", "smoke", "--data.pair", pair, "--data-dir", str(real_data.DATA)]
    assert main([*command, "--run-dir", str(where), "--accelerator", "cpu"]) == 0
    result = json.loads((where / "seed-0" / "result.json").read_text())
    assert result["data"] == pair
    assert result["signatures"]["bleu"] in capsys.readouterr().out
