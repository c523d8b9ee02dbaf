"""A real ComfyUI in this process, on the CPU, and the pack imported as ComfyUI imports it.

Whoever imports this module enters ComfyUI: conftest.py of the folders whose tests need it does.
"""

import importlib
import sys
import types
from pathlib import Path

import pytest

from scripts.setup_env import find_comfyui

ROOT = Path(__file__).resolve().parents[1]
PACK = "prefgen_pack"


def _enter_comfyui() -> None:
    """Put ComfyUI on the path with --cpu, before anything of it is imported."""
    sys.path.insert(0, str(find_comfyui()))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = arguments
    # ComfyUI names a pack's package after its folder: relative imports are all that works in it.
    package = types.ModuleType(PACK)
    package.__path__ = [str(ROOT)]
    sys.modules[PACK] = package


_enter_comfyui()


@pytest.fixture(scope="session")
def pack():
    """pack("prefgen.comfy.patcher") -> that module of the pack."""
    return lambda name: importlib.import_module(f"{PACK}.{name}")
