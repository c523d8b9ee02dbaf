"""The world that a configuration names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import edition
from prefgen.files import read_text

from .errors import DataError
from .people_world import PeopleWorld
from .worlds import AtelierWorld, DataSetWorld, World

# What `training.atelier.world.people` calls its sets.
PEOPLE = "world"


def open_world(config, runs: Path) -> World:
    """The world that a configuration names. Says at once, hours before it is refused, where the branch can't be trained
    on its pictures."""
    world = _world_of(config, runs)
    world.drop_prompts = config.data.drop_prompts
    return world


def _world_of(config, runs: Path) -> World:
    embedded = config.base.family == "atelier"
    if config.data.path is None:
        if edition() is SECOND:
            raise DataError(
                "The embedded models are of the second edition, whose users are a data set: make it by `python -m "
                "training.atelier.world.people FOLDER`, and set data.path=FOLDER."
            )
        return AtelierWorld(runs, config.data.attributes)
    if set_config(config.data.path).get("kind") == PEOPLE:
        if embedded and edition() is not SECOND:
            raise DataError(
                f"{config.data.path} holds users of the atelier's second edition, and the embedded models are of the "
                "first: run `sh training/runs/world.sh` first, with its PREFGEN_ATELIER_WEIGHTS."
            )
        return PeopleWorld(config.data.path, config.data.attributes)
    if embedded:
        raise DataError(
            f"{config.data.path} is no set of the atelier's users: the embedded models paint their world alone. Name a "
            "set of `python -m training.atelier.world.people`, or a configuration of another base."
        )
    world = DataSetWorld(config.data.path, config.data.attributes)
    if fault := painted_smaller(world.folder, config.base.pixels):
        print(f"train_user_attention will refuse this: {fault}", file=sys.stderr, flush=True)
    return world


def set_config(folder: Path) -> dict:
    """What a set was made with, {} for a folder that isn't finished. DataError for a damaged manifest."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(read_text(path))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: make the set again.") from error


def painted_smaller(folder: Path, pixels: int) -> str | None:
    """A sentence for a set that was painted smaller than base.pixels: the branch would learn off enlarged ones that
    blur is liked. None for any other; real people's sets have pictures of many sizes, which no manifest names."""
    painted = set_config(folder).get("size")
    if not isinstance(painted, int) or painted >= pixels:
        return None
    lower = f", or set base.pixels={painted // 64 * 64}" if painted >= 64 else ""
    return f"{folder} was painted at {painted} pixels, base.pixels is {pixels}: paint it with --size {pixels}{lower}."
