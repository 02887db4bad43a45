import itertools

import numpy as np
import pytest
import torch

import real_data
from legato_papers.data.buckets import Bucketed, padded
from legato_papers.data.words import word_vocabulary
from legato_papers.task import ExperimentError


def drawn(count, seed=0):
    """Lengths drawn log-normal, about as those of film reviews, with empty texts among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(count, generator=generator) * 0.65 + 5.3).exp().long()
    lengths[::97] = 0
    return lengths


def bucketed(lengths, batch_size):
    return Bucketed(len(lengths), batch_size, lambda indices: (lengths[indices],), lengths)


def padding_share(batches, lengths):
    """Share of padding among all steps of these batches, each as long as its longest example."""
    words = steps = 0
    for indices in batches:
        of_batch = lengths[indices]
        words += int(of_batch.sum())
        steps += len(of_batch) * int(of_batch.max())
    return 1 - words / steps


def test_padding_is_a_small_share():
    examples = bucketed(drawn(20_000), 32)
    assert padding_share(examples.shuffled(0, 0, examples.updates_per_pass), examples.lengths) < 0.15
    assert padding_share(examples.in_order(), examples.lengths) < 0.05


def test_padding_is_a_large_share_without_buckets():
    lengths = drawn(20_000)
    assert padding_share(torch.randperm(20_000, generator=torch.Generator().manual_seed(0)).split(32), lengths) > 0.5


@pytest.mark.parametrize(("count", "batch_size"), [(1000, 7), (63, 64), (65, 1), (1, 1)])
def test_in_order_has_every_example_once_the_longest_first(count, batch_size):
    examples = bucketed(drawn(count), batch_size)
    batches = list(examples.in_order())
    assert torch.cat(batches).sort().values.tolist() == list(range(count))
    longest = [int(examples.lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_results_are_put_back_in_the_order_of_the_data():
    examples = bucketed(drawn(100), 8)
    results = torch.empty(100, dtype=torch.long)
    for indices in examples.in_order():
        results[indices] = examples.take(indices)[0]
    assert torch.equal(results, examples.lengths)


def test_a_pass_has_no_example_twice_and_full_batches_only():
    examples = bucketed(drawn(1003), 10)
    batches = list(examples.shuffled(0, 3, examples.updates_per_pass))
    assert [len(batch) for batch in batches] == [10] * 100
    assert len(torch.cat(batches).unique()) == 1000


def test_batches_are_a_function_of_seed_and_epoch():
    examples = bucketed(drawn(500), 8)

    def batches(seed, epoch, updates=62):
        return torch.stack(list(examples.shuffled(seed, epoch, updates)))

    assert torch.equal(batches(1, 2), batches(1, 2))
    assert torch.equal(batches(1, 2, 20), batches(1, 2)[:20])
    assert not torch.equal(batches(1, 2), batches(1, 3))
    assert not torch.equal(batches(1, 2), batches(2, 2))


def test_the_order_of_batches_says_nothing_about_their_lengths():
    examples = bucketed(drawn(20_000), 32)
    longest = torch.tensor([float(examples.lengths[batch].max()) for batch in examples.shuffled(0, 0, 625)])
    # Independent batches correlate from one to the next with a standard deviation of 1 / sqrt(625).
    assert abs(torch.corrcoef(torch.stack([longest[:-1], longest[1:]]))[0, 1]) < 4 / 625**0.5


def test_an_epoch_of_other_sizes_than_a_pass_or_a_batch():
    examples = bucketed(drawn(30), 8)
    assert len(list(examples.shuffled(0, 0, 10))) == 10
    tiny = bucketed(drawn(3), 8)
    assert [sorted(batch.tolist()) for batch in tiny.shuffled(0, 0, 2)] == [[0, 1, 2]] * 2


def test_texts_become_one_tensor_with_padding_at_the_end():
    texts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [], [8])]
    words, lengths, cut = padded(texts)
    assert words.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert words.dtype == lengths.dtype == torch.long
    assert lengths.tolist() == [3, 0, 1]
    assert cut == 0


def test_a_longer_text_is_cut_at_the_named_end_and_counted():
    texts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8, 9], [10])]
    for where, rows in (("front", [[6, 7], [8, 9], [10, 0]]), ("back", [[5, 6], [8, 9], [10, 0]])):
        words, lengths, cut = padded(texts, 2, where)
        assert words.tolist() == rows
        assert lengths.tolist() == [2, 2, 1]
        assert cut == 1


def test_a_batch_of_empty_texts_has_one_step_of_padding():
    words, lengths, cut = padded([np.array([], np.int32)] * 2, 5)
    assert words.tolist() == [[0], [0]]
    assert lengths.tolist() == [0, 0]
    assert cut == 0


def test_texts_cannot_be_cut_to_nothing():
    with pytest.raises(ExperimentError, match="1 word or more, got longest=0"):
        padded([np.array([5], np.int32)], 0)


@pytest.mark.bad_input
def test_the_end_to_cut_at_must_be_named_rightly():
    with pytest.raises(ExperimentError, match='"front" or "back", got \'middle\''):
        padded([np.array([5], np.int32)], 2, "middle")


@real_data.needs("imdb")
def test_padding_is_a_small_share_on_film_reviews():
    import json
    import lzma

    with lzma.open(real_data.DATA / "imdb" / "test.jsonl.xz", "rt", encoding="utf-8") as file:
        reviews = [json.loads(line)["text"] for line in itertools.islice(file, 3200)]
    examples = bucketed(torch.from_numpy(word_vocabulary(reviews).encode(reviews).lengths), 32)
    assert padding_share(examples.shuffled(0, 0, examples.updates_per_pass), examples.lengths) < 0.15
