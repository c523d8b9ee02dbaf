"""Simulated users and their judged pictures, at any number.

    python -m training.data.agents data/agents
    python -m training.data.agents data/real --renderer diffusers --pipeline models/sdxl --config sdxl_24gb \\
        --device cuda:0

agents -> histories -> pictures -> sharded Parquet, in the layout of `training.data.schema`. A shard is a pure function
of its users, so the same command goes on where it was stopped, several machines can share a folder (--part), and one
user can be made again alone (--user).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from ..cli import add_engine, engine_of
from ..errors import DataError
from . import renderers, vocabulary
from .make import Population, make, make_one

# The paper's (arXiv 2512.06020).
USERS = 50_153
PICTURES = 990_998


def main() -> None:
    args = arguments()
    with exit_with_message():
        population = population_of(args)
        if args.user is None:
            make(population, args.folder, args.processes, args.part, engine_of(args))
        else:
            make_one(population, args.folder, args.user)


def population_of(args: argparse.Namespace) -> Population:
    """The population that a command line names. DataError when it names none."""
    pictures = args.pictures or round(args.users * PICTURES / USERS)
    if pictures < 2 * args.users:
        raise DataError("--pictures must be at least twice --users: everyone likes one and dislikes one.")
    if args.engine == "ray" and args.renderer == "diffusers":
        raise DataError("--engine ray draws the atelier. For a pipeline start one command a device, with --part.")
    if args.renderer == "diffusers":
        renderer: renderers.Renderer = pipeline_of(args)
        words = args.vocabulary or vocabulary.REAL_WORLD
        shard_users = args.shard_users or 64
        return Population(args.users, pictures, args.seed, shard_users, renderer, words)
    renderer = renderers.Atelier(size_of(args, 128))
    population = Population(args.users, pictures, args.seed, args.shard_users or 256, renderer, args.vocabulary)
    renderers.check_atelier(population.vocabulary)
    return population


def pipeline_of(args: argparse.Namespace) -> renderers.Diffusers:
    """The text-to-image pipeline that a command line names."""
    if not args.pipeline:
        raise DataError("--renderer diffusers needs --pipeline: a folder that diffusers can load.")
    from ...common.devices import checked_device  # torch, which the atelier's workers needn't wait for

    checked_device(args.device)
    return renderers.Diffusers(
        args.pipeline,
        size_of(args, 512),
        steps=args.steps,
        guidance=args.guidance,
        batch=args.batch,
        device=args.device,
        dtype=args.dtype,
        jpeg=args.jpeg,
        download=args.allow_download,
    )


def size_of(args: argparse.Namespace, default: int) -> int:
    """Pixels a side: of --size, or of the configuration that will train on the set. DataError when they differ."""
    if args.config is None:
        return args.size or default
    from ...common.config.command import load

    pixels = load(args.config).base.pixels
    if args.size not in (None, pixels):
        raise DataError(f"--size {args.size}: {args.config} trains on {pixels} pixels (base.pixels); leave --size out.")
    return pixels


def part(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write N/COUNT with N from 0 to COUNT - 1, such as 0/4")
    return int(number), int(count)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.agents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the set's folder")
    parser.add_argument("--users", type=positive, default=USERS)
    parser.add_argument(
        "--pictures", type=positive, help=f"of all users together; {PICTURES:,} for {USERS:,} users, in proportion else"
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--renderer", choices=("atelier", "diffusers"), default="atelier")
    parser.add_argument("--size", type=int, help="pixels a side; 128 in the atelier, 512 from a pipeline")
    parser.add_argument("--config", help="a configuration of training, whose base.pixels is the --size")
    parser.add_argument("--vocabulary", type=Path, help="a vocabulary file; by default the one of the renderer's world")
    parser.add_argument("--shard-users", type=positive, help="users a shard; 256 in the atelier, 64 with diffusers")
    add_engine(parser)
    parser.add_argument("--part", type=part, default=(0, 1), metavar="N/COUNT", help="make every COUNT-th shard only")
    parser.add_argument("--user", type=int, help="make this user alone, into a file of its own")
    pipeline = parser.add_argument_group("diffusers")
    pipeline.add_argument("--pipeline", help="folder of a text-to-image pipeline")
    pipeline.add_argument("--allow-download", action="store_true", help="--pipeline may be a name on the model hub")
    pipeline.add_argument("--device", default="cpu")
    pipeline.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    pipeline.add_argument("--steps", type=positive, default=28)
    pipeline.add_argument("--guidance", type=float, default=5.0)
    pipeline.add_argument("--jpeg", type=positive, metavar="QUALITY", help="keep JPEG of this quality instead of PNG")
    pipeline.add_argument("--batch", type=positive, default=8, help="pictures at once, of one user")
    args = parser.parse_args()
    if args.renderer == "diffusers":
        args.processes = 1  # one pipeline a device; more devices are more parts
    return args


if __name__ == "__main__":
    main()
