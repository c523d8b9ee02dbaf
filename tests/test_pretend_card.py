"""The pack on a pretend graphics card (tests/pretend_card), in processes of their own: a device, once registered with
torch, stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pretend_card

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(pretend_card.missing()),
        reason=f"the pretend card is built with {pretend_card.missing()}, which isn't here",
    ),
]


@pytest.mark.parametrize("place", ["backend", "comfyui", "training"])
def test_on_the_pretend_card(place):
    file = ROOT / f"tests/pretend_card/on_{place}.py"
    plugins = ["-p", "no:cacheprovider", *(("-p", "tests.comfyui") if place == "comfyui" else ())]
    line = [sys.executable, "-m", "pytest", "-q", *plugins, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    ran = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
