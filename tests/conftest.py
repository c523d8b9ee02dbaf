"""What every test shares: the repository's root on the path, and CPUs that this one isn't."""

import re
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# Tests of numbers: they must pass on any CPU (scripts/any_cpu.py).
NUMBERS = ("engine", "comfy")


def pytest_addoption(parser):
    parser.addoption("--perturb", type=int, metavar="SEED", help="round as another CPU might: see tests/perturb.py")


def pytest_configure(config):
    if config.getoption("--perturb") is not None:
        from tests.perturb import in_children

        in_children(config.getoption("--perturb"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """From the set-up of a test's fixtures to their end."""
    seed = item.config.getoption("--perturb")
    if seed is None:
        yield
        return
    from tests.perturb import OtherCpu

    with OtherCpu(seed):
        yield


@pytest.fixture
def one_sentence():
    """A function that gives an error's text, after checking that an artist can read it."""

    def read(raised) -> str:
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".") and 20 < len(text) < 260, text
        assert not re.search(r"\w+Error\b|Traceback|<class", text), text
        return text

    return read
