"""Python runs this file first in every process that a perturbed test starts: see tests/perturb.py."""

import sys
from pathlib import Path

_tests = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, _tests)
import perturb  # noqa: E402

sys.path.remove(_tests)
perturb.enter_here()
