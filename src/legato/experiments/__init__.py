"""The papers' experiments as commands: ``task.py`` says what one is, ``recipes/`` holds them, ``run.py`` runs them."""
