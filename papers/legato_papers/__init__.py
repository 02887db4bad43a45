"""The papers' experiments as commands: ``recipes/`` defines them, ``run.py`` trains, tests and resumes them."""

__version__ = "0.1.0"
