"""Tests on real files, which LEGATO_DATA names the folder of; without it they are skipped."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LEGATO_DATA") or os.devnull).absolute()


def there(*folders: str) -> bool:
    """Whether the folder of LEGATO_DATA has these."""
    return all((DATA / folder).is_dir() for folder in folders)


def needs(*folders: str) -> pytest.MarkDecorator:
    """A mark that skips a test unless ``there``."""
    return pytest.mark.skipif(not there(*folders), reason=f"needs {' and '.join(folders)} in the folder of LEGATO_DATA")
