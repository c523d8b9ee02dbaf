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

from ...common.errors import exit_with_message
from ..cli import add_engine, engine_of, natural, positive
from ..errors import DataError
from . import renderers, vocabulary
from .make import World, make, make_one

USERS, PICTURES = 50_153, 990_998  # the paper's


def main() -> None:
    args = arguments()
    with exit_with_message():
        world = world_of(args)
        if args.user is None:
            make(world, args.folder, args.processes, args.part, engine_of(args))
        else:
            make_one(world, args.folder, args.user)


def world_of(args: argparse.Namespace) -> World:
    """The world that a command line names. DataError when it names none."""
    pictures = args.pictures or round(args.users * PICTURES / USERS)
    if pictures < 2 * args.users:
        raise DataError("--pictures must be at least twice --users: everyone likes one and dislikes one.")
    if args.engine == "ray" and args.renderer == "diffusers":
        raise DataError("--engine ray draws the atelier. For a pipeline start one command a device, with --part.")
    if args.renderer == "atelier":
        renderer: renderers.Renderer = renderers.Atelier(size_of(args, 128))
    elif args.pipeline:
        from ...common.devices import checked_device  # torch, which the atelier's workers needn't wait for

        checked_device(args.device)
        options = {"steps": args.steps, "guidance": args.guidance, "batch": args.batch}
        where = {"device": args.device, "dtype": args.dtype, "jpeg": args.jpeg, "download": args.allow_download}
        renderer = renderers.Diffusers(args.pipeline, size_of(args, 512), **options, **where)
    else:
        raise DataError("--renderer diffusers needs --pipeline: a folder that diffusers can load.")
    file = args.vocabulary or (vocabulary.REAL_WORLD if args.renderer == "diffusers" else None)
    shard_users = args.shard_users or (64 if args.renderer == "diffusers" else 256)
    world = World(args.users, pictures, args.seed, shard_users, renderer, file)
    if args.renderer == "atelier":
        renderers.check_atelier(world.vocabulary)
    return world


def size_of(args: argparse.Namespace, otherwise: int) -> int:
    """Pixels a side: of --size, or of the configuration that will train on the set. DataError when they differ."""
    if args.config is None:
        return args.size or otherwise
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
