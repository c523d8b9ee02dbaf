"""The second edition's MLLM before it read histories: what `training.atelier.world.captioning` left.

That stage writes the MLLM's folder, which preference tuning writes again. A copy stays in the runs folder: preference
tuning starts from it, and the row of an MLLM that was never tuned on preference is painted with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prefgen.atelier.models import MLLM_FOLDER


def captioning_folder(runs: Path) -> Path:
    """The copy, made before preference tuning has written anything. SystemExit where there is nothing to copy."""
    folder = runs / "atelier.world.captioning" / "mllm"
    if folder.exists():
        return folder
    if not (folder.parent / "done").exists():
        raise SystemExit("The MLLM can't caption yet: run `python -m training.atelier.world.captioning` first.")
    if (runs / "train_mllm" / "done").exists():
        raise SystemExit(
            f"{folder} is gone, and {MLLM_FOLDER} holds what came of it: delete {folder.parent} and run `python -m "
            "training.atelier.world.captioning` again."
        )
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(MLLM_FOLDER, unfinished)
    os.replace(unfinished, folder)
    return folder
