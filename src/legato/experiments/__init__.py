"""The papers' experiments as commands. ``task.py`` says what an experiment is, ``recipes/`` holds them, ``training.py`` trains them."""
