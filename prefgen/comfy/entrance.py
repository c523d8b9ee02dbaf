"""ComfyUI in a process that it didn't start itself: a command of ours."""

from __future__ import annotations

import sys
from pathlib import Path


def enter(folder: Path, flags: list[str]) -> None:
    """Put ComfyUI on the path, with these command line flags and the model folders of its extra_model_paths.yaml."""
    if not (folder / "main.py").is_file():
        raise SystemExit(f"{folder} holds no ComfyUI: name the folder with its main.py.")
    # ComfyUI's folder has packages of names that others use as well.
    sys.path.insert(0, str(folder.resolve()))
    ours = sys.argv
    sys.argv = ["main.py", *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = ours
    paths = folder / "extra_model_paths.yaml"
    if paths.is_file():
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(paths))
