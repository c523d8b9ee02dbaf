"""What every test shares: the repository's root on the path, however pytest was started."""

import re
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture
def one_sentence():
    """A function that gives an error's text, after checking that an artist can read it."""

    def read(raised) -> str:
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".") and 20 < len(text) < 260, text
        assert not re.search(r"\w+Error\b|Traceback|<class", text), text
        return text

    return read
