"""What the recipes that draw their sequences have in common."""

import pytest
import torch

from legato_papers import curriculum
from legato_papers.recipes import adding, copy_memory, long_dependency
from legato_papers.task import ExperimentError


def task_of(recipe, seed):
    config = recipe.Config(60)
    config.model.units, config.training.first_length = 8, None
    return recipe.build(config, seed)


def sequences(examples, numbers):
    return examples.take(numbers)[0]


@pytest.mark.parametrize("recipe", [adding, copy_memory, long_dependency])
def test_a_sequence_is_a_function_of_stream_seed_and_number(recipe):
    task, again, other = task_of(recipe, 3), task_of(recipe, 3), task_of(recipe, 4)
    numbers = next(iter(task.train.shuffled(3, 5, 2)))
    assert torch.equal(sequences(task.train, numbers), sequences(again.train, numbers))
    assert torch.equal(sequences(task.train, numbers[2:4]), sequences(task.train, numbers)[2:4])
    assert not torch.equal(sequences(task.train, numbers), sequences(other.train, numbers))


@pytest.mark.parametrize("recipe", [adding, copy_memory])
def test_every_seed_is_tested_on_the_same_sequences(recipe):
    one, other = task_of(recipe, 3), task_of(recipe, 4)
    numbers = torch.arange(5)
    assert torch.equal(sequences(one.test, numbers), sequences(other.test, numbers))
    assert torch.equal(sequences(one.validation, numbers), sequences(other.validation, numbers))


@pytest.mark.parametrize("recipe", [adding, copy_memory, long_dependency])
def test_training_validation_and_test_share_no_sequence(recipe):
    task, numbers = task_of(recipe, 1), torch.arange(30)
    seen = torch.cat([sequences(part, numbers) for part in (task.train, task.validation, task.test)])
    assert len(seen.flatten(1).unique(dim=0)) == 90


@pytest.mark.parametrize("recipe", [adding, copy_memory, long_dependency])
def test_no_update_of_a_run_sees_a_sequence_again(recipe):
    train = task_of(recipe, 0).train
    numbers = torch.cat([batch for epoch in range(4) for batch in train.shuffled(0, epoch, 5)])
    assert len(numbers.unique()) == len(numbers) == 4 * 5 * train.batch_size


@pytest.mark.parametrize("kind", ["gilr-lstm", "lstm"])
@pytest.mark.parametrize("recipe", [adding, copy_memory, long_dependency])
def test_a_length_that_does_not_fit_raises_and_names_one(recipe, kind, monkeypatch):
    monkeypatch.setattr(curriculum, "free_memory", lambda device: 2**30)
    config = recipe.Config(10**9)
    config.model.units, config.model.kind = 8, kind
    with pytest.raises(
        ExperimentError, match=r"--length 1,000,000,000 needs about .* GiB and 1.0 GiB are free"
    ) as error:
        recipe.build(config, 0)
    config.length = int(str(error.value).split("about ")[-1].split(" steps fit")[0].replace(",", ""))
    recipe.build(config, 0)
    assert recipe.needed_bytes(config, 2 * config.length) > 0.9 * 2**30
