"""What every test shares: the repository's root on the path, and CPUs that this one isn't."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# One for all tests of a process: Playwright starts once.
from tests.browser import chromium  # noqa: E402, F401

# Modules that compare numbers: those of these folders but for what only reads and refuses, and some of training's.
# They pass on any CPU: scripts/any_cpu.py. Subprocesses of a whole pipeline are too slow for its eleven variants.
NUMBERS = {"nodes", "prefgen"}
NO_NUMBERS = {f"test_{name}" for name in "adapter_damage bad_input download history_input imports mllm_files".split()}
TRAINING = {f"test_{name}" for name in "core mmd evaluate extract probe_layers readers scores".split()}
TRAINING |= {f"test_{name}" for name in "train_mllm user_attention".split()}

# A minute and more each, though some have few tests: first, so that no worker ends long after the other.
LONG = """test_stages test_user_attention test_world_pipeline test_pipeline test_benchmarks test_nodes test_walks
    test_pretend_card test_pickapic test_agents test_workflows test_train_mllm test_extract test_panel
    test_world_stages test_first_picture""".split()


def pytest_addoption(parser):
    parser.addoption("--perturb", type=int, metavar="SEED", help="round as another CPU might: see tests/perturb.py")
    parser.addoption("--no-onednn", action="store_true", help="without oneDNN's kernels, as beside other CPUs")


def pytest_configure(config):
    if config.getoption("--perturb") is not None:
        from tests.perturb import OtherCpu, in_children

        in_children(config.getoption("--perturb"))
        OtherCpu(config.getoption("--perturb")).__enter__()  # to the end, and before any module makes its constants
    if config.getoption("--no-onednn"):
        import torch

        torch.backends.mkldnn.set_flags(False)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        room, module = item.path.relative_to(Path(ROOT) / "tests").parts[0], item.path.stem
        if room in NUMBERS and module not in NO_NUMBERS or room == "training" and module in TRAINING:
            item.add_marker(pytest.mark.numbers)
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter):
    """One line that says how many tests were skipped for which reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        said = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not run here: {said}")


@pytest.fixture
def one_sentence():
    """A function that gives an error's text, after checking that an artist can read it."""

    def read(raised) -> str:
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".") and 20 < len(text) < 260, text
        assert not re.search(r"\w+Error\b|Traceback|<class", text), text
        return text

    return read
