"""text8: the next of 27 characters of Wikipedia, in bits per character (Chilkuri & Eliasmith 2021).

``--model.kind lstm`` and the others train a network of as many parameters for about as long: 20 minutes on one thread
of a CPU that multiplies bfloat16 in hardware, by ``--precision bf16-mixed``; float32 takes twice as long. The states of
all layers are carried from window to window, in training and through the whole of the test text.
``--preset large`` is a size for a GPU: five times the text in windows of 180, as in the paper.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from legato._shapes import Int, Tensor
from legato.layers.base import RecurrentLayer
from legato.models import Embedding, LanguageModel

from ..data.text8 import Text8, text8
from ..kinds import Kind, layer_of
from ..language import LanguageTask, Reading, Streams, Windows
from ..ranges import Count, CountOrZero, Depth, DepthOrZero, FractionBelowOne, Order, Positive, Width, Window
from ..task import Paper, Preset, Reported

PAPER = Paper(
    metric="bits_per_character",
    reported=Reported(1.61, "Chilkuri & Eliasmith 2021", verified=True),
    parameters="",
    data="text8",
    digits=3,
    baselines={"LSTM": Reported(1.65, "Chilkuri & Eliasmith 2021", verified=False)},
    kinds={"lmu": "", "lstm": "LSTM"},
)
PRESETS = {
    "large": Preset(
        "18.7 million parameters, in the paper's arrangement, for one GPU; not measured",
        {
            "model.kind": "lmu",
            "model.channels": 512,
            "model.units": 512,
            "model.blocks": 5,
            "model.highways": 3,
            "model.order": 5,
            "training.epochs": 20,
            "training.updates_per_epoch": 500,
            "training.batch_size": 256,
            "training.learning_rate": 4e-3,
            "training.window": 180,
        },
    ),
    "smoke": Preset(
        "a few real examples, in seconds",
        {
            "data.examples": 3000,
            "data.streams": 4,
            "data.warm_up": 50,
            "model.channels": 16,
            "model.units": 16,
            "training.batch_size": 4,
            "training.window": 32,
            "training.epochs": 2,
            "training.updates_per_epoch": 3,
        },
    ),
}
CHARACTERS = 27


@dataclass
class Data:
    """The text: 90 million characters to train on, 5 million to validate, 5 million to test.

    Args:
        examples: the first so many characters of each; null is all.
        validation_characters: of the validation text, those that choose the best weights.
        streams: parts of the validation and of the test text that are read side by side.
        warm_up: characters before each part that are read first and do not count.
    """

    examples: Count | None = None
    validation_characters: Count = 100_000
    streams: Count = 128
    warm_up: CountOrZero = 500


@dataclass
class Model:
    """The network: blocks of memory, dense and highway layers, and a learned weighted sum of all depths.

    Args:
        kind: of the layer in the memory's place: lmu, gilr-lstm, sru, lstm or transformer.
        channels: of the embedding and of every block; null, here and below, is what ``SIZES`` has for the kind.
        units: of the layer in the memory's place, read by a dense layer unless they are as many as the channels; of an
            LMU the channels of its memory.
        blocks: of memory, dense and highways.
        highways: in each block and above the sum.
        order: numbers that the memory keeps for each channel.
        theta: window of the memory in the lowest block, in characters.
        growth: window of a block's memory, in windows of the block below.
        activation: of the dense and the highway layers.
        dropout: share of the channels dropped in training.
    """

    kind: Kind = "gilr-lstm"
    channels: Width | None = None
    units: Width | None = None
    blocks: Depth | None = None
    highways: DepthOrZero | None = None
    order: Order = 4
    theta: Window = 4.0
    growth: Positive = 2.0
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    dropout: FractionBelowOne = 0.0


class Size(NamedTuple):
    """Of a kind: its network, the updates of an epoch, and its learning rate in ``training.learning_rate``."""

    channels: int
    units: int
    blocks: int
    highways: int
    updates: int
    rate: float


#: 1.23 million parameters each, within 2 %; ten epochs are about 20 minutes of one thread of a CPU in bfloat16. The
#: LSTM is alone between embedding and softmax, as usual: a dense layer or a narrower embedding made it worse.
SIZES = {
    "lmu": Size(256, 128, 3, 1, 1100, 0.5),
    "gilr-lstm": Size(192, 256, 2, 0, 900, 1.0),
    "sru": Size(192, 320, 3, 1, 750, 1.0),
    "lstm": Size(388, 388, 1, 0, 850, 1.0),
    "transformer": Size(192, 208, 2, 0, 600, 0.5),
}


@dataclass
class Config:
    """text8: the next of 27 characters of Wikipedia.

    Null as ``training.updates_per_epoch`` is the number that suits the kind. ``training.learning_rate`` is that of
    gilr-lstm, sru and lstm; lmu and transformer take half of it.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Reading = field(default_factory=lambda: Reading(epochs=10))


def build(config: Config, seed: int, data_dir: Path | None = None) -> "NextCharacter":
    """The task of this configuration, its weights drawn by ``seed``."""
    text = text8(data_dir)
    torch.manual_seed(seed)
    return NextCharacter(config, text)


class NextCharacter(LanguageTask):
    metric = "bits_per_character"

    def __init__(self, config: Config, text: Text8) -> None:
        super().__init__()
        data, training = config.data, config.training
        self.source, self.kind = text.source, config.model.kind
        train, validation, test = (part[: data.examples] for part in text[:3])
        updates = SIZES[config.model.kind].updates
        self.train = Windows(train, training.batch_size, training.window, updates)
        chosen = validation[: data.validation_characters]
        self.validation = Streams(chosen, train, data.streams, data.warm_up)
        self.test = Streams(test, validation, data.streams, data.warm_up)
        self.model = network(config.model)
        if config.model.kind == "lmu":
            self.model.calibrate(self.train.spread())

    def rate(self, name: str) -> float:
        return SIZES[self.kind].rate

    def plot(self, model: nn.Module, folder: Path) -> None:
        """A sample of what the network writes, drawn from its probabilities, in ``sample.txt``."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.zeros(1, 1, dtype=torch.int64)
        written = cast(LanguageModel, model).generate(prompt, 500, generator=generator)
        (folder / "sample.txt").write_text(as_text(written[0]) + "\n")


def network(config: Model) -> LanguageModel:
    """The network of one kind; where nothing else is said, of 1.23 million parameters."""
    size = SIZES[config.kind]
    channels, units = config.channels or size.channels, config.units or size.units

    def layer(block: int) -> RecurrentLayer:
        if config.kind != "lmu":
            # 5, the layer's own bias, is a time scale of 150 characters.
            options: dict[str, Any] = {"forget_bias": 1.0} if config.kind == "gilr-lstm" else {}
            return layer_of(config.kind, channels, units, **options)
        memory = {"memory_size": units, "order": config.order, "theta": config.theta * config.growth**block}
        return layer_of("lmu", channels, channels, **memory, activation=config.activation)

    # Of variance one, which those that are parallel over time learn from sooner; the LSTM ends no better by them.
    vectors = None if config.kind == "lstm" else torch.randn(CHARACTERS, channels)
    return LanguageModel(
        Embedding(CHARACTERS, channels, vectors=vectors, padding_idx=None),
        [layer(block) for block in range(config.blocks or size.blocks)],
        # An LMU reads its memory with a dense layer of its own.
        dense=config.kind != "lmu" and units != channels,
        activation=config.activation,
        highways=size.highways if config.highways is None else config.highways,
        dropout=config.dropout,
    )


def as_text(characters: Int[Tensor, " characters"]) -> str:
    """0 is a space, 1 to 26 are a to z."""
    return "".join(" " if code == 0 else chr(96 + code) for code in characters.tolist())
