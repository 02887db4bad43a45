"""psMNIST."""

from .mackey_glass import Config, PAPER, build
