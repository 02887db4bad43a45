"""How a long text is read: every token counts once, and a reader goes on where it stopped."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import bounds
from legato.layers import LMU, Stack
from legato.models import Embedding, LanguageModel
from legato_papers.language import LanguageTask, Streams, Windows
from legato_papers.task import ExperimentError, Training
from legato_papers.training import Device, fit

TEXT = np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint8)


class NextToken(LanguageTask):
    metric = "bits_per_character"

    def __init__(self, text=TEXT, batch_size=3, window=10, count=4, updates=None):
        super().__init__()
        torch.manual_seed(0)
        self.train = Windows(text, batch_size, window, updates)
        self.validation = self.test = Streams(text[500:800], text[:500], count, 20)
        self.model = LanguageModel(
            Embedding(7, 8, padding_idx=None), lambda size: Stack(LMU(size, size, order=3, theta=5)), num_layers=2
        )


@pytest.mark.parametrize("warm_up", [0, 5, 300])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 4), (7, 3), (100, 8), (100, 100)])
def test_every_token_counts_once_and_follows_its_predecessor(size, count, warm_up):
    before, text = TEXT[:200], TEXT[200 : 200 + size]
    streams = Streams(text, before, count, warm_up)
    found, whole = [], np.concatenate([np.zeros(200, np.uint8), before, text])
    for indices in streams.in_order():
        tokens, targets, counted = streams.take(indices)
        assert tokens.shape == targets.shape == counted.shape
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        for row, stream in enumerate(indices.tolist()):
            first = 400 + stream * streams.length - warm_up
            steps = int(counted[row].nonzero().max()) + 1 if counted[row].any() else 0
            assert targets[row, :steps].tolist() == whole[first : first + steps].tolist()
            found += targets[row][counted[row]].tolist()
    assert found == text.tolist()


def test_one_stream_has_the_probability_of_the_whole_text():
    task = NextToken(count=1)
    task.model.eval()
    figure = task.metrics(task.total(task.model, task.test))["bits_per_character"]
    text = torch.from_numpy(TEXT[500 - 21 : 800].astype(np.int64))[None]
    log_p, _ = task.model.score(text[:, :-1], text[:, 1:])
    assert figure == pytest.approx(-log_p[0, 20:].mean().item() / math.log(2), rel=1e-6)


def test_metrics_do_not_depend_on_the_chunk_length():
    figures = []
    for steps in (7, 64, 1000):
        task = NextToken()
        task.steps_at_once = steps
        task.model.eval()
        figures.append(task.metrics(task.total(task.model, task.validation))["bits_per_character"])
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-6)


def test_figures_of_a_uniform_model():
    task = NextToken()
    torch.nn.init.zeros_(task.model.output.weight)
    totals = task.total(task.model, task.test)
    assert totals[1] == 300
    assert task.metrics(totals)["bits_per_character"] == pytest.approx(math.log2(7))
    task.metric = "perplexity"
    assert task.metrics(totals)["perplexity"] == pytest.approx(7, rel=1e-5)


def test_readers_read_on_and_start_anew_each_epoch():
    windows = Windows(TEXT, 3, 10)
    one, again, other = (list(windows.shuffled(1, epoch, 4)) for epoch in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    batches = [windows.take(positions) for positions in one]
    for (tokens, targets, _), (following, _, _) in pairwise(batches):
        assert torch.equal(targets[:, :-1], tokens[:, 1:])
        assert torch.equal(targets[:, -1], following[:, 0])
    ring, _, _ = windows.take(torch.tensor([995]))
    assert ring[0].tolist() == [*TEXT[995:], *TEXT[:5]]
    assert windows.updates_per_pass == 33
    assert Windows(TEXT, 3, 10, updates=5).updates_per_pass == 5


def test_no_reader_starts_where_one_stopped_the_epoch_before():
    # A run that is resumed has no state to go on from: it must start as one that was not stopped.
    windows = Windows(TEXT[:50], 20, 10)
    places = [set().union(*(p.tolist() for p in windows.shuffled(0, epoch, 7))) for epoch in range(4)]
    ends = [{p + 10 for p in epoch} for epoch in places]
    assert not any(end & start for end, start in zip(ends, places[1:], strict=False))


def test_the_state_is_carried_between_adjacent_windows_only():
    task = NextToken()
    first, second = (task.train.take(positions) for positions in list(task.train.shuffled(0, 0, 2)))
    task.loss(task.model, first)
    carried = task.loss(task.model, second)
    wide = copy.deepcopy(task.model).double()

    def after_the_first(second):
        return wide.loss(second[0], second[1], wide.loss(first[0], first[1])[1])[0]

    terms = 32 * first[0].numel()  # products a step, through the steps and over their mean
    bounds.assert_agrees(carried, after_the_first, second, terms=terms)
    anew = task.loss(task.model, first)
    bounds.assert_agrees(anew, lambda first: wide.loss(first[0], first[1])[0], first, terms=terms)
    assert not any(tensor.requires_grad for states in task.carried[1] for part in states for tensor in part)


@pytest.mark.parametrize(
    ("size", "count", "warm_up", "got"), [(0, 4, 5, "0, 4 and 5"), (9, 0, 5, "9, 0 and 5"), (9, 4, -1, "9, 4 and -1")]
)
def test_a_text_without_a_token_gets_a_clear_error(size, count, warm_up, got):
    with pytest.raises(ExperimentError, match=f"got {got}"):
        Streams(TEXT[:size], TEXT, count, warm_up)


@pytest.mark.parametrize(("size", "window"), [(0, 10), (9, 0)])
def test_nothing_to_read_gets_a_clear_error(size, window):
    with pytest.raises(ExperimentError, match=f"a window of 1 or more, got {size} and {window}"):
        Windows(TEXT[:size], 3, window)


def test_a_resumed_run_has_the_same_weights(tmp_path):
    training, cpu = Training(epochs=3, updates_per_epoch=4, batch_size=3), Device("cpu", 1, "32-true")
    whole, part = NextToken(), NextToken()
    fit(whole, training, 0, tmp_path / "whole", cpu, {})

    class Stop(Exception):
        pass

    def stop(figures):
        if part.epochs_left == 0:
            raise Stop
        part.epochs_left -= 1
        return False

    part.epochs_left = 1
    part.finished = stop
    with pytest.raises(Stop):
        fit(part, training, 0, tmp_path / "part", cpu, {})
    rest = NextToken()
    fit(rest, training, 0, tmp_path / "part", cpu, {})
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)
