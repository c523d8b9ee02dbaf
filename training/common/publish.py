"""An exported adapter for others: its model card, and its upload on request."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from prefgen.adapter import FAMILY_NAMES, AdapterHeader
from prefgen.errors import MendableError
from prefgen.files import read_text

from .config.schema import Config

CARD_IN_A_REPOSITORY = "README.md"
NOT_SAID = "not said in its folder: read it where it was published"


class PublishError(MendableError):
    """What can't be uploaded: one sentence."""


def card_path(adapter: Path) -> Path:
    """Where an adapter's model card lies."""
    return adapter.with_suffix(".md")


def card(adapter: Path, header: AdapterHeader, config: Config, runs: Path, words: list[str]) -> str:
    """The model card of an exported adapter, in Markdown. words: of the command line that exported it."""
    mllm = header.mllm or {}
    lora = f"sha256 {mllm['lora']}; it lies in `train_mllm/lora` of the run" if mllm.get("lora") else "none"
    training = ", ".join(f"{key} {value}" for key, value in header.training.items())
    parts = {"ĕ_sem": header.semantic_width, "e_core": header.core_width, "e_img": header.image_width}
    lines = [
        "---",
        "license: other",
        "library_name: diffusers",
        "tags: [prefgen, ip-adapter, personalization]",
        "---",
        "",
        f"# {adapter.stem}",
        "",
        f"A PrefGen adapter for {FAMILY_NAMES.get(header.base_family, header.base_family)} (arXiv 2512.06020, in an "
        "unofficial implementation). What it needs beside it is in its header, and refused when it is another.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_named(config.base.path, 'the atelier')} |",
        f"| MLLM | {mllm.get('name', 'none')}, revision {mllm.get('revision', 'none')} |",
        f"| its LoRA | {lora} |",
        f"| CLIP vision | {header.clip_vision.get('name', 'none')} |",
        f"| parts of the user vector | {', '.join(f'{name} {width}' for name, width in parts.items() if width)} |",
        f"| tokens | {header.tokens} |",
        f"| training | {training} |",
        f"| data | {_data(config)} |",
        "",
        "## Figures",
        "",
        "Of the training's own held-out users. What pictures look like says `python -m training.evaluation.compare`.",
        "",
        *_figures(runs),
        "",
        "## Licences",
        "",
        "The adapter comes of all of these, and may be used only as they allow together.",
        "",
        *(f"- {name}: {licence}" for name, licence in _licences(config)),
        "",
        "## How it was made",
        "",
        "```",
        f"python -m training.export {shlex.join(words)}",
        "```",
        "",
    ]
    return "\n".join(lines)


def push(repository: str, adapter: Path, lora: Path | None) -> str:
    """Upload adapter, card and LoRA as one commit of a model repository, made private where there is none yet. Returns
    its address. PublishError for whatever the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = {adapter.name: adapter, CARD_IN_A_REPOSITORY: card_path(adapter)}
    if lora is not None:
        files |= {f"lora/{file.name}": file for file in sorted(lora.iterdir()) if file.is_file()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()]
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=f"{adapter.name} and its card")
    except Exception as error:  # noqa: BLE001  of the hub's client and of whatever network library is below it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PublishError(
            f"{repository} can't be uploaded to ({reason}): {adapter} is written, push it again."
        ) from error
    return str(commit.commit_url)


def _named(path: Path | None, otherwise: str) -> str:
    return path.name if path is not None else otherwise


def _data(config: Config) -> str:
    if config.data.path is None:
        return "the atelier's simulated users"
    manifest = config.data.path / "manifest.json"
    try:
        of_set: Mapping = json.loads(read_text(manifest))["config"]
    except (OSError, ValueError, KeyError):
        return config.data.path.name
    return f"{config.data.path.name}, a set of kind {of_set.get('kind', 'unknown')}"


def _figures(runs: Path) -> list[str]:
    """A table of what the stages said when they had finished."""
    rows = []
    # The sections of the stages stand in their order.
    for stage in Config.model_fields:
        done = runs / stage / "done"
        try:
            figures = json.loads(read_text(done)) if done.is_file() else {}
        except ValueError:
            figures = {}
        numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
        rows += [f"| {stage} | {name} | {value:.4g} |" for name, value in numbers.items()]
    return ["| stage | figure | value |", "|---|---|---|", *rows] if rows else ["No stage wrote any."]


def _licences(config: Config) -> list[tuple[str, str]]:
    """(what, its licence as far as its folder says it)."""
    if config.base.path is None:
        return [("the atelier", "as PrefGen's repository")]
    folders = {"base": config.base.path, "MLLM": config.mllm.path, "CLIP vision": config.clip_vision.path}
    licences = [(f"{name} {path.name}", licence_of(path)) for name, path in folders.items() if path is not None]
    return [*licences, *([("data", _data_licence(config.data.path))] if config.data.path else [])]


def licence_of(folder: Path) -> str:
    """The licence that a model's README says at its head."""
    readme = folder / "README.md"
    if not readme.is_file():
        return NOT_SAID
    head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.S)
    said = re.search(r"^license: *(\S.*)$", head[1], re.M) if head else None
    return said[1].strip() if said else NOT_SAID


def _data_licence(folder: Path) -> str:
    """The licence notes of a set's data card, on one line."""
    path = folder / "card.md"
    notes = re.search(r"## Licence notes\n\n(.*?)\n\n## ", read_text(path), re.S) if path.is_file() else None
    return " ".join(notes[1].split()) if notes else NOT_SAID
