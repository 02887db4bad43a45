import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from legato_papers import checkpoint
from legato_papers.task import Examples, Task, Training
from legato_papers.training import Device, fit, learning_rate

CPU = Device("cpu", 1, "32-true")


class Killed(BaseException):
    """As final as a signal: nothing in between catches it."""


@dataclass
class Noisy(Task):
    """A line through points, with dropout, so that data order and random numbers both matter."""

    killed_at: int | None = None
    metric = "error"
    higher_is_better = False

    def __post_init__(self):
        torch.manual_seed(0)
        x = torch.randn(50, 4)
        y = x.sum(1, keepdim=True)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.train = Examples(50, 8, lambda i: (x[i], y[i]))
        self.validation = self.test = Examples(20, 7, lambda i: (x[i], y[i]))
        self.updates = 0

    def loss(self, model, batch):
        self.updates += 1
        if self.updates == self.killed_at:
            raise Killed
        return (model(batch[0]) - batch[1]).square().mean()

    def totals(self, model, batch):
        return torch.stack([(model(batch[0]) - batch[1]).square().sum(), torch.tensor(float(len(batch[0])))])

    def metrics(self, totals):
        return {"error": (totals[0] / totals[1]).item()}


TRAINING = Training(epochs=5, batch_size=8, learning_rate=0.05, weight_decay=0.01, max_norm=1.0, average=0.9)


def train(folder, killed_at=None, training=TRAINING, device=CPU):
    folder.mkdir(exist_ok=True)
    return fit(Noisy(killed_at), training, 3, folder, device, {})


def weights(folder):
    content = checkpoint.load(folder / "last.ckpt")
    return content["state_dict"] | {
        f"{n}.{key}": value for n, row in content["optimizer_states"][0]["state"].items() for key, value in row.items()
    }


def without_seconds(outcome):
    return {key: value for key, value in outcome.items() if key != "seconds"}


@pytest.mark.parametrize("killed_at", [3, 7, 14, 17, 30])
def test_a_killed_and_resumed_run_ends_as_an_undisturbed_one(tmp_path, killed_at):
    undisturbed = train(tmp_path / "a")
    with pytest.raises(Killed):
        train(tmp_path / "b", killed_at)
    resumed = train(tmp_path / "b")
    assert without_seconds(resumed) == without_seconds(undisturbed)
    expected, found = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_a_finished_run_is_not_trained_further_when_resumed(tmp_path):
    first = train(tmp_path)
    assert without_seconds(train(tmp_path, killed_at=1)) == without_seconds(first)


def test_each_epoch_has_every_example_once_in_its_own_order():
    examples = Examples(48, 8, lambda i: (i,))
    orders = [torch.cat(list(examples.shuffled(seed, epoch, 6))) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(torch.equal(order.sort().values, torch.arange(48)) for order in orders)
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_the_tested_weights_have_the_best_validation_metric(tmp_path):
    outcome = train(tmp_path, training=Training(epochs=6, batch_size=8, learning_rate=0.3, schedule="constant"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["validation_error"])
    assert outcome["epoch"] == best["epoch"]
    assert outcome["validation"]["error"] == outcome["test"]["error"] == best["validation_error"]


def test_nothing_in_a_checkpoint_needs_more_than_plain_types(tmp_path):
    train(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        assert torch.load(tmp_path / name, weights_only=True)["format"] == checkpoint.FORMAT


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower --training.learning_rate"):
        train(tmp_path, training=Training(epochs=5, batch_size=8, learning_rate=1e30, schedule="constant"))


@pytest.mark.parametrize("schedule", ["one-cycle", "linear"])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(schedule):
    config = Training(schedule=schedule, warmup=0.25)
    factors = [learning_rate(config, update, 100) for update in range(101)]
    assert max(factors) == factors[25] == 1.0
    assert factors[:26] == sorted(factors[:26])
    assert factors[25:] == sorted(factors[25:], reverse=True)
    assert factors[100] == pytest.approx(0, abs=1e-12)


def test_half_precision_trains_and_is_finite(tmp_path):
    outcome = train(tmp_path, device=Device("cpu", 1, "bf16-mixed"))
    assert outcome["test"]["error"] < 10


def test_a_parameter_learns_at_the_rate_that_its_task_gives_it(tmp_path):
    task = Noisy()
    task.rate = lambda name: 0.0 if name.startswith("2.") else 1.0
    before = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    fit(task, Training(epochs=1, batch_size=8, learning_rate=0.05), 0, tmp_path, CPU, {})
    same = {name: torch.equal(parameter, before[name]) for name, parameter in task.model.named_parameters()}
    assert same == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}


def test_tokens_and_time_are_counted_across_a_resumption(tmp_path):
    def run(epochs):
        task = Noisy()
        task.tokens = lambda batch: len(batch[0])
        return fit(task, Training(epochs=epochs, batch_size=8), 0, tmp_path, CPU, {})

    first, both = run(1), run(3)
    assert first["tokens_per_second"] > 0
    kept = checkpoint.load(tmp_path / "last.ckpt")["callbacks"]["RunFolder"]
    assert kept["tokens"] == 3 * 48
    assert both["tokens_per_second"] == round(kept["tokens"] / kept["training_seconds"])
    rows = [json.loads(line) for line in (tmp_path / "seconds.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [6, 12, 18]
    assert rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"]
