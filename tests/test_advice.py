"""What is given in place of a padded tensor gets an error that says what to do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import legato
from legato.layers import GILR
from legato.models import Embedding, LanguageModel, SequenceClassifier, SequenceRegressor
from test_contract import build, every_layer

# The shape checker of the test run would stop these by their type.
pytestmark = pytest.mark.bad_input

x = torch.randn(2, 7, 3)
rows = [torch.randn(7, 3), torch.randn(5, 3)]
WRONG = {
    "packed": (
        lambda: pack_padded_sequence(x, torch.tensor([7, 5]), batch_first=True),
        "pad_packed_sequence.*lengths=",
    ),
    "tuple": (lambda: tuple(rows), "pad_sequence.*lengths="),
    "list": (lambda: rows, "pad_sequence.*lengths="),
    "layer's result": (lambda: GILR(3, 3)(x), "pass the output, or join layers with legato.Stack"),
    "array": (lambda: x.numpy(), r"torch.as_tensor\(\)"),
    "numbers": (lambda: x.tolist(), r"torch.as_tensor\(\)"),
    "none": (lambda: None, "expected x to be a tensor, got NoneType"),
    "nested": (lambda: torch.nested.nested_tensor(rows), "to_padded_tensor.*lengths="),
    "jagged": (lambda: torch.nested.nested_tensor(rows, layout=torch.jagged), "to_padded_tensor.*lengths="),
    "sparse": (lambda: x.to_sparse(), r"\.to_dense\(\)"),
}
TENSORS = {"nested", "jagged", "sparse"}  # of these the value is wrong, of all others the type
every_kind = pytest.mark.parametrize(
    ("make", "error", "message"),
    [(make, ValueError if kind in TENSORS else TypeError, message) for kind, (make, message) in WRONG.items()],
    ids=WRONG,
)


@every_layer
@every_kind
def test_a_layer_says_how_a_padded_tensor_is_made(case, make, error, message):
    with pytest.raises(error, match=message):
        build(case, torch.float32)(make())


@every_kind
def test_a_model_says_how_a_padded_tensor_is_made(make, error, message):
    layer, head = GILR(3, 4), nn.Linear(4, 2)
    for model in (SequenceClassifier(layer, head), SequenceRegressor(layer, head)):
        with pytest.raises(error, match=message):
            model(make())


TOKENS = {
    "packed": lambda: pack_padded_sequence(torch.ones(2, 7), torch.tensor([7, 5]), batch_first=True),
    "list": lambda: [torch.ones(7, dtype=torch.int64), torch.ones(5, dtype=torch.int64)],
    "nested": lambda: torch.nested.nested_tensor([torch.ones(7).long(), torch.ones(5).long()]),
    "array": lambda: np.ones((2, 7), np.int64),
}


@pytest.mark.parametrize(
    ("make", "error"),
    [(make, ValueError if kind in TENSORS else TypeError) for kind, make in TOKENS.items()],
    ids=TOKENS,
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 5])])
def test_tokens_that_are_no_tensor_get_advice(make, error, lengths):
    layer, embedding = GILR(3, 3), Embedding(9, 3)
    language = LanguageModel(embedding, lambda size: GILR(size, size), num_layers=1)
    for call in (
        lambda: embedding(make()),
        lambda: SequenceClassifier(layer, nn.Linear(3, 2), embedding)(make(), lengths=lengths),
        lambda: SequenceClassifier(layer, nn.Linear(3, 2), nn.Embedding(9, 3))(make(), lengths=lengths),
        lambda: language(make(), lengths=lengths),
        lambda: language.generate(make(), 2),
    ):
        with pytest.raises(error, match=r"pad_packed_sequence|pad_sequence|to_padded_tensor|as_tensor"):
            call()


@pytest.mark.parametrize("make", [WRONG["packed"][0], WRONG["tuple"][0]], ids=["packed", "tuple"])
def test_an_op_says_how_a_padded_tensor_is_made(make):
    A, B = legato.delay_network(3, 6.0)
    for call in (
        lambda: legato.linear_recurrence(torch.tensor(0.5), make()),
        lambda: legato.matrix_recurrence(torch.eye(3), make()),
        lambda: legato.lti(make(), A, B),
    ):
        with pytest.raises((TypeError, ValueError), match=r"pad_(packed_)?sequence") as raised:
            call()
        assert "lengths=" not in str(raised.value)  # an op has no such argument
