"""Methods side by side on a real base: held-out users, held-out prompts, the same noise in every row.

    python -m training.evaluation.compare --config sdxl_24gb --adapter prefgen.safetensors \
        --clip models/clip-vit-large --out runs/compare

Paints with stock diffusers, scores with published judges whose weights are given by path. Rows: no preference, another
user's, the taste in the MLLM's words, PrefGen, an image-only adapter (--image-only), the true taste where it is known,
PrefGen at other weights (--weights).
What is read, painted or scored is kept in --out: the same command goes on where it was stopped. Writes compare.md and
compare.json there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from prefgen.adapter_file import load_adapter
from prefgen.errors import AdapterError
from prefgen.files import file_sha256, read_text, visible_files, write_atomic

from ...common.arguments import positive
from ...common.config.command import ConfigError, load
from ...common.devices import checked_device, default_device
from ...common.errors import exit_with_message
from ...data.store import MANIFEST
from ...data.worlds import DataSetWorld
from ..rows import ON_REAL_BASES, ROWS, WEIGHTS
from ..scores import Clip, Csd, ViperProxy
from ..store import Store
from .page import page
from .painter import PipelinePainter, jobs_of, paint_rows
from .people import HistoryReadings, people_of
from .score import Judges, score_row, summary


def main() -> None:
    args = arguments()
    config = load(args.config, args.set)
    if config.data.path is None:
        raise ConfigError(
            f"{args.config} is the atelier: `python -m training.evaluation.evaluate` compares its methods."
        )
    checked_device(args.device)
    adapters = checked_adapters(args, config)
    # The small judges are opened first, so that a wrong path is known before hours of painting.
    judges = small_judges(args)
    world = DataSetWorld(config.data.path)
    people = people_of(world, args.users, args.prompts, args.history, args.seed)
    jobs = jobs_of(people, args.seeds)
    # Everything that the pictures depend on names their folder, so that none is taken for another setting's.
    setting = settings(args, config)
    out = args.out / hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    readings = HistoryReadings(Store(out / "histories"), world, config, args.lora, args.device)
    readings.all(people)

    names = (*ON_REAL_BASES, *(f"weight_{weight:g}" for weight in sorted(set(args.weights)) if weight != 1))
    rows = {name: adapters.get(ROWS[name].adapter) for name in names if ROWS[name].adapter in ("", *adapters)}
    if not any(person.taste for person in people):
        del rows["oracle"]
    if any(not (out / name / job.name).exists() for name in rows for job in jobs):
        painter = PipelinePainter(config, args.device, args.guidance, args.steps, args.batch)
        paint_rows(painter, readings, people, jobs, rows, out)
        del painter

    judges = with_viper(judges, args)
    values = {name: score_row(out / name, jobs, people, readings, judges) for name in rows}
    result = {
        "command": f"python -m training.evaluation.compare {shlex.join(sys.argv[1:])}",
        **setting,
        "users": [person.user for person in people],
        "pictures": len(jobs),
        "rows": {
            name: {
                "label": ROWS[name].label,
                "seconds_a_picture": seconds(out / name),
                **summary(values[name], values["prefgen"], values["none"]),
            }
            for name in rows
        },
    }
    write_atomic(args.out / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(args.out / "compare.md", page(result, csd=args.csd is not None).encode())
    print(read_text(args.out / "compare.md"))


def checked_adapters(args: argparse.Namespace, config) -> dict[str, Path]:
    """{"main", and "image_only" where it is given: file}. AdapterError for a file that the base can't wear."""
    adapters = {"main": args.adapter} | ({"image_only": args.image_only} if args.image_only else {})
    for path in adapters.values():
        family = load_adapter(path).header.base_family
        if family != config.base.family:
            raise AdapterError(f"The adapter is for {family}, the configuration's base is {config.base.family}.")
    return adapters


def small_judges(args: argparse.Namespace) -> Judges:
    return Judges(
        clip=Clip(args.clip, args.device, architecture=args.clip_architecture),
        pickscore=args.pickscore and Clip(args.pickscore, args.device),
        csd=args.csd and Csd(args.csd, args.device),
    )


def with_viper(judges: Judges, args: argparse.Namespace) -> Judges:
    """The judges and the ViPer proxy, if it was asked for: 8B of weights, opened when the base is no longer needed."""
    if not args.viper:
        return judges
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return replace(judges, viper=ViperProxy(args.viper, args.viper_lora, args.device, dtype))


def settings(args: argparse.Namespace, config) -> dict:
    """All that the pictures depend on; weights and data by their content."""

    def digest(path: Path | None) -> str | None:
        files = [] if path is None else [path] if path.is_file() else visible_files(path, "**/*.safetensors")
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None

    plain = ("prompts", "seeds", "history", "guidance", "steps", "seed")
    return {name: getattr(args, name) for name in plain} | {
        "count": args.users,
        "base": config.base.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "mllm": config.mllm.model_dump(mode="json"),
        "clip_vision": config.clip_vision.model_dump(mode="json"),
        "adapter": digest(args.adapter),
        "image_only_adapter": digest(args.image_only),
        "lora": digest(args.lora),
        "base_weights": digest(config.base.path),
        "mllm_weights": digest(config.mllm.path),
        "clip_vision_weights": digest(config.clip_vision.path),
        "data_sha256": file_sha256(config.data.path / MANIFEST),
    }


def seconds(folder: Path) -> float:
    """Of a picture, over all batches that were painted into the folder."""
    rows = [json.loads(line) for line in read_text(folder / "time.jsonl").splitlines()]
    return round(sum(row["seconds"] for row in rows) / sum(row["pictures"] for row in rows), 3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a name in training/configs, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value")
    parser.add_argument("--adapter", type=Path, required=True, help="what `python -m training.export` wrote")
    parser.add_argument(
        "--weights", type=float, nargs="*", default=[], choices=WEIGHTS, help="PrefGen at these weights as well"
    )
    parser.add_argument("--image-only", type=Path, help="an adapter trained on e_img alone")
    parser.add_argument("--lora", type=Path, help="the preference MLLM's LoRA")
    parser.add_argument(
        "--clip", type=Path, required=True, help="CLIP of transformers or open_clip, for CLIP-T, CLIP-I and CMMD"
    )
    parser.add_argument("--clip-architecture", metavar="NAME", help="of open_clip, where --clip is a file of weights")
    parser.add_argument("--pickscore", type=Path, help="PickScore's folder")
    parser.add_argument("--csd", type=Path, help="CSD's weights as safetensors")
    parser.add_argument("--viper", type=Path, help="Idefics2 folder of the ViPer proxy")
    parser.add_argument("--viper-lora", type=Path, help="the ViPer proxy's LoRA folder")
    parser.add_argument("--users", type=positive, default=48)
    parser.add_argument("--prompts", type=positive, default=4, help="held-out prompts a user")
    parser.add_argument("--seeds", type=positive, default=2, help="pictures of a prompt")
    parser.add_argument("--history", type=positive, default=8, help="liked and as many disliked pictures a user")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=positive, default=30)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.users < 2:
        parser.error("at least 2 users are needed: one user's preference is tried on another")
    return args


if __name__ == "__main__":
    with exit_with_message():
        main()
