"""Linear recurrent networks: trained in parallel over time, run one step at a time."""

__version__ = "0.1.0"
