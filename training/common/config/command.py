"""The stages' command line: which configuration, what is changed in it, where the runs lie."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import yaml
from pydantic import ValidationError

from prefgen.errors import MendableError
from prefgen.files import TextError, read_text, visible_files

from ..errors import exit_with_message
from .schema import Config
from .sections import Section, StageSection

FOLDER = Path(__file__).parents[2] / "configs"

S = TypeVar("S", bound=StageSection)


class ConfigError(MendableError):
    """One sentence: which file or key, what is wrong with it, what would be right."""


@dataclass(frozen=True)
class StageArgs(Generic[S]):
    """What a stage was started with.

    section: the configuration's own section of the stage. fingerprint: all that its result depends on, as JSON values.
    runs: the folder that holds every stage's run. start_from: a folder with earlier weights. options: the command line
    as it was, with what the stage added to it.
    """

    stage: str
    section: S
    config: Config
    fingerprint: dict
    runs: Path
    start_from: Path | None = None
    options: argparse.Namespace = field(default_factory=argparse.Namespace)


def arguments(
    kind: type[S],
    description: str | None,
    command: str = "",
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> StageArgs[S]:
    """Read the command line of a stage. kind: its section's class.

    command: its name, where it isn't the stage's; more: adds options of its own, which are in `options`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m training.{command or kind.stage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if more:
        more(parser)
    parser.add_argument("--config", default="atelier", help="a name in training/configs, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value")
    parser.add_argument("--runs", type=Path, help="folder that holds every stage's run; runs/NAME by default")
    parser.add_argument("--start-from", type=Path, help="folder with earlier weights (such as the shipped ones)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    options = parser.parse_args()
    with exit_with_message():
        config = load(options.config, options.set)
    if not config.needs(kind.stage):
        parts = " and ".join(config.train_user_attention.parts)
        print(f"{kind.stage}: an adapter of {parts} alone doesn't need this stage; skipped.", flush=True)
        raise SystemExit(0)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    runs = options.runs or Path("runs") / Path(options.config).stem
    return stage_args(kind, config, runs, options.start_from, options)


def stage_args(
    kind: type[S],
    config: Config,
    runs: Path,
    start_from: Path | None = None,
    options: argparse.Namespace | None = None,
) -> StageArgs[S]:
    """The arguments of a stage for a configuration that is already loaded."""
    return StageArgs(
        stage=kind.stage,
        section=cast(S, section_of(config, kind.stage)),
        config=config,
        fingerprint=fingerprint(config, kind.stage),
        runs=runs,
        start_from=start_from,
        options=options or argparse.Namespace(),
    )


def load(name: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a configuration, one of ours by its name or any YAML file, with `a.b=value` changes in it."""
    path, content = _read(name, FOLDER)
    # The MLLM first, then what changes in it.
    mllm_changes = [change for change in changes if change.startswith("mllm=")]
    for change in mllm_changes:
        _set_value(content, change)
    _expand_mllm(content)
    for change in changes:
        if change not in mllm_changes:
            _set_value(content, change)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {'; '.join(_in_words(fault) for fault in error.errors())}.") from error


def section_of(config: Config, stage: str) -> StageSection:
    """The section of a stage: "train_mllm" or "atelier.vae"."""
    section: Any = config
    for name in stage.split("."):
        section = getattr(section, name)
    return section


def fingerprint(config: Config, stage: str) -> dict:
    """All that a stage's result depends on, as JSON values: a run folder belongs to one of these."""
    section = section_of(config, stage)
    others = {name: getattr(config, name).model_dump(mode="json") for name in section.reads}
    if stage == "extract":
        # What no part is made of isn't read.
        others |= {} if config.reads_mllm else {"mllm": None}
        others |= {} if "image" in config.train_user_attention.parts else {"clip_vision": None}
    return {"stage": stage, **section.model_dump(mode="json"), **others}


def default_fingerprint(stage: str) -> dict:
    """The fingerprint of a stage whose configuration says nothing, empty for a stage that no configuration has."""
    config = Config(hardware="")
    return fingerprint(config, stage) if hasattr(config, stage.split(".")[0]) else {}


def _read(name: str | Path, folder: Path) -> tuple[Path, dict]:
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    try:
        content = yaml.safe_load(read_text(path))
    except TextError as error:
        raise ConfigError(str(error)) from error
    except FileNotFoundError as error:
        names = ", ".join(file.stem for file in visible_files(folder, "*.yaml"))
        raise ConfigError(f"There is no configuration {name}: name one of {names}, or a YAML file.") from error
    except OSError as error:
        raise ConfigError(f"Can't read the configuration {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no configuration: it should hold sections such as train_mllm.")
    return path, content


def _expand_mllm(content: dict) -> None:
    """`mllm: NAME` stands for the sections of configs/mllm/NAME.yaml; what the file itself says goes before them."""
    if isinstance(content.get("mllm"), str):
        _, sections = _read(content.pop("mllm"), FOLDER / "mllm")
        for name, section in sections.items():
            content[name] = section | content.get(name, {}) if isinstance(section, dict) else section


def _set_value(content: dict, change: str) -> None:
    """Write one `a.b=value` into the nested mapping; the value is read as YAML."""
    key, sign, value = change.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"--set {change}: write it as section.key=value, such as train_mllm.steps=100.")
    *sections, last = key.split(".")
    for section in sections:
        inner = content.get(section)
        if not isinstance(inner, dict):
            inner = content[section] = {}
        content = inner
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: {value!r} can't be read as a value.") from error


def _in_words(fault: dict) -> str:
    """One of pydantic's faults in words: the key, then what is wrong."""
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"there is no key {key}{_suggestion(fault['loc'])}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message


def _suggestion(place: tuple) -> str:
    """ " (did you mean ...?)" with the key that was probably meant, or nothing."""
    model: type[Section] = Config
    for name in place[:-1]:
        entry = model.model_fields.get(name) if isinstance(name, str) else None
        # An optional section is a union: Lora | None.
        kinds = (entry.annotation, *get_args(entry.annotation)) if entry else ()
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        if section is None:
            return ""
        model = section
    nearest = get_close_matches(str(place[-1]), model.model_fields, 1)
    return f" (did you mean {'.'.join([*map(str, place[:-1]), nearest[0]])}?)" if nearest else ""
