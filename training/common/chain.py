"""What every stage was made from, so that nothing stale is mixed into what comes after it.

A stage's `config.json` holds digests of all that it read: the data set, the MLLM and its LoRA, the CLIP vision model,
the extracted users, the layers, the aligner, the base. The same digests are taken again by every later stage and by the
export: where one differs, the stage between is stale, and is named.

A digest is of content, sampled for files of gigabytes (`prefgen.mllm.files.weights_digest`). No file's time or path
counts, so runs may be moved.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from prefgen.atelier.models import MLLM_FOLDER, WEIGHTS
from prefgen.files import file_sha256, read_text
from prefgen.mllm.files import weights_digest

from .captioning import captioning_folder
from .checkpoints import listed
from .config.schema import STAGES, Config
from .stage_outputs import chosen_layers

NAMES = {
    "data": "data set",
    "questions": "set of questions",
    "words": "set of traits",
    "mllm": "MLLM",
    "lora": "LoRA",
    "clip_vision": "CLIP vision model",
    "extract": "extraction of users",
    "layers": "choice of layers",
    "aligner": "aligner",
    "text_encoders": "text encoder",
    "unet": "UNet",
    "trait_tokens": "set of trait tokens",
}


def made_of(config: Config, runs: Path, stage: str, data: str) -> dict[str, str]:
    """{input: its digest}, as all that a stage reads is now. data: digest of the world's pictures and users.

    SystemExit with one sentence for an earlier stage that is stale, or isn't finished.
    """
    inputs = {"data": data} | _inputs(config, runs, stage)
    for earlier in STAGES[: STAGES.index(stage)]:
        if config.needs(earlier):
            _check(config, runs, earlier, data)
    return inputs


def check_chain(config: Config, runs: Path, data: str) -> None:
    """SystemExit with one sentence for the first stage that was made from something else than there is now."""
    for stage in STAGES:
        if config.needs(stage):
            _check(config, runs, stage, data)


def stale(folder: Path, recorded: dict, now: dict) -> str | None:
    """A sentence where a stage's folder was made from something else than there is now. recorded: empty for one that
    holds no record."""
    changed = [NAMES.get(name, name) for name, digest in now.items() if recorded and recorded.get(name) != digest]
    if not changed:
        return None
    return (
        f"{folder} was made from another {' and another '.join(changed)} than there is now: delete that folder and run "
        f"`python -m training.{folder.name}` again."
    )


def recorded(folder: Path) -> dict[str, str]:
    """What a stage's folder says that it was made from, empty without a record."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(read_text(path)).get("made_of", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise SystemExit(f"{path} is damaged: use another --runs folder, or put a copy back.") from error


def _check(config: Config, runs: Path, stage: str, data: str) -> None:
    folder = runs / stage
    if record := recorded(folder):
        sentence = stale(folder, record, {"data": data} | _inputs(config, runs, stage))
        if sentence:
            raise SystemExit(sentence)


def _inputs(config: Config, runs: Path, stage: str) -> dict[str, str]:
    """What a stage reads besides the data set."""
    parts = config.train_user_attention.parts
    if stage == "train_mllm":
        return _base_mllm(config, runs) | _questions(config)
    if stage == "extract":
        read = _mllm(config, runs) if config.reads_mllm else {}
        return read | (_clip_vision(config) if "image" in parts else {})
    if stage == "probe_layers":
        return _mllm(config, runs)
    if stage == "train_alignment":
        layers = chosen_layers(runs)["sem_layers"]
        texts = _text_encoders(config)
        return {"extract": _extracted(runs), "layers": f"e_sem {layers}"} | texts | _words(config)
    inputs = {"extract": _extracted(runs)} | _unet(config) | _words(config)
    if config.reads_mllm:
        layers = chosen_layers(runs)
        named = [f"e_sem {layers['sem_layers']}"] * ("semantic" in parts) + [f"e_core {layers['core_layer']}"]
        inputs["layers"] = ", ".join(named[: None if "core" in parts else 1])
    if "semantic" in parts:
        inputs["aligner"] = _aligner(runs)
    return inputs


def _base_mllm(config: Config, runs: Path) -> dict[str, str]:
    """The MLLM before `train_mllm`."""
    if config.mllm.path is None and config.data.path is not None:
        return {"mllm": weights_digest(captioning_folder(runs))}
    # Of the first edition's, whose decoder starts at random, the vision tower.
    return {"mllm": weights_digest(config.mllm.path or runs / "atelier.mllm_vision")}


def _mllm(config: Config, runs: Path) -> dict[str, str]:
    """The MLLM after it."""
    digests = {"mllm": weights_digest(config.mllm.path or MLLM_FOLDER)}
    if config.mllm.lora is not None:
        digests["lora"] = weights_digest(runs / "train_mllm" / "lora")
    return digests


def _questions(config: Config) -> dict[str, str]:
    path = config.data.questions and config.data.questions / "train.parquet"
    return {"questions": file_sha256(path)} if path and path.is_file() else {}


def _words(config: Config) -> dict[str, str]:
    path = config.data.path and config.data.path / "traits" / "report.json"
    return {"words": file_sha256(path)} if path and path.is_file() else {}


def _clip_vision(config: Config) -> dict[str, str]:
    if config.clip_vision.path is not None:
        return {"clip_vision": weights_digest(config.clip_vision.path)}
    return {"clip_vision": file_sha256(WEIGHTS / "clip.safetensors")}


def _text_encoders(config: Config) -> dict[str, str]:
    if config.clip_text.path is not None:
        return {"text_encoders": weights_digest(config.clip_text.path)}
    if config.base.path is None:
        return {"text_encoders": file_sha256(WEIGHTS / "clip.safetensors")}
    folders = sorted(config.base.path.glob("text_encoder*"))
    return {"text_encoders": hashlib.sha256("".join(map(weights_digest, folders)).encode()).hexdigest()}


def _unet(config: Config) -> dict[str, str]:
    if config.base.path is None:
        digests = {"unet": file_sha256(WEIGHTS / "unet.safetensors")}
        if config.train_user_attention.teacher == "traits":
            digests["trait_tokens"] = file_sha256(WEIGHTS / "trait_tokens.safetensors")
        return digests
    return {"unet": weights_digest(config.base.path / "unet")}


def _extracted(runs: Path) -> str:
    """Of `extract`'s index, which holds its settings and what it was made from; its arrays follow from them."""
    path = runs / "extract" / "index.json"
    if not (runs / "extract" / "done").exists() or not path.exists():
        raise SystemExit("No extracted users yet: run `python -m training.extract` first.")
    return file_sha256(path)


def _aligner(runs: Path) -> str:
    """Of the last checkpoint of `train_alignment`."""
    folder = runs / "train_alignment"
    checkpoints = listed(folder / "checkpoints")
    if not checkpoints:
        raise SystemExit(f"{folder} has no checkpoint: run `python -m training.train_alignment` first.")
    if not (folder / "done").exists():
        raise SystemExit(f"{folder} isn't finished: run `python -m training.train_alignment` again, it goes on.")
    return str(json.loads(read_text(checkpoints[0].with_suffix(".json")))["sha256"])
