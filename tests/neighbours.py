"""Other packs, which tests and benchmarks run beside ours.

Their code is not ours to ship: PREFGEN_NEIGHBOURS names a folder that has checkouts of them.
"""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

IPADAPTER_PLUS = "ComfyUI_IPAdapter_plus"


def checkout(name: str) -> Path | None:
    """The folder of a pack, if there is one."""
    folder = Path(os.environ.get("PREFGEN_NEIGHBOURS", ""), name)
    return folder if os.environ.get("PREFGEN_NEIGHBOURS") and folder.is_dir() else None


def why_not(*names: str) -> str:
    """Why a test that needs these packs is skipped."""
    return f"PREFGEN_NEIGHBOURS names no folder with a checkout of {' and '.join(names)}"


def needs(*names: str) -> pytest.MarkDecorator:
    """A mark for a test beside other packs."""
    return pytest.mark.skipif(None in map(checkout, names), reason=why_not(*names))


def whole_pack(name: str) -> types.ModuleType:
    """A pack, imported as ComfyUI imports it."""
    folder = checkout(name)
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules_of(name: str, *parts: str) -> list[types.ModuleType]:
    """Modules of a pack without its nodes, which may ask for packages that aren't needed."""
    package = types.ModuleType(name.replace("-", "_"))
    package.__path__ = [str(checkout(name))]
    sys.modules[package.__name__] = package
    return [importlib.import_module(f"{package.__name__}.{part}") for part in parts]


def ipadapter_plus() -> list[types.ModuleType]:
    """ComfyUI_IPAdapter_plus's nodes and what they share."""
    whole_pack(IPADAPTER_PLUS)
    return [importlib.import_module(f"{IPADAPTER_PLUS}.{part}") for part in ("IPAdapterPlus", "utils")]
