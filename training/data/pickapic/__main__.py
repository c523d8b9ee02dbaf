"""Real users from Pick-a-Pic, cleaned, in the layout of every other set.

    python -m training.data.pickapic pickapic_v2/data data/pickapic
    python -m training.data.pickapic s3://bucket/pickapic_v2_no_images data/pickapic --files 'data/train-*.parquet'

SOURCE holds Pick-a-Pic v1 or v2 Parquet as published, with or without pictures: a folder, one file, or any fsspec path.
The same command goes on where it was stopped. `docs/pickapic.md` describes the rules.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from prefgen.files import TextError, read_text

from ...common.arguments import natural, positive, ratio
from ...common.errors import exit_with_message
from ..cli import add_engine, engine_of
from ..errors import DataError
from .make import make
from .rules import Limits
from .source import find


def main() -> None:
    args = arguments()
    with exit_with_message():
        limits = Limits(args.min_liked, args.min_disliked, args.heldout, args.ratio, words(args.nsfw_words))
        source = find(args.source, args.files, args.unit_mb << 20)
        make(source, args.folder, limits, args.unit_mb, args.processes, args.memory, engine_of(args))


def words(file: Path | None) -> tuple[str, ...]:
    """The words or phrases of a list, one a line; lines that begin with # are left out."""
    if file is None:
        return ()
    try:
        lines = [line.strip() for line in read_text(file).splitlines()]
    except TextError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"Can't read the word list {file}: {error}.") from error
    listed = sorted({line for line in lines if line and not line.startswith("#")})
    if not listed:
        raise DataError(f"{file} holds no word, and so would drop no prompt: write one a line, or leave it out.")
    return tuple(listed)


def memory(text: str) -> str:
    """ "700MB" or "1.5GB", as DuckDB reads it."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a size such as 700MB or 2GB")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.pickapic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder, file or fsspec path of the published Parquet")
    parser.add_argument("folder", type=Path, help="the set's folder")
    parser.add_argument("--files", default="**/*.parquet", help="which files below SOURCE (default: %(default)s)")
    parser.add_argument("--min-liked", type=positive, default=4, help="pictures a user must like")
    parser.add_argument("--min-disliked", type=positive, default=4)
    parser.add_argument("--heldout", type=natural, default=1, help="pairs a user for evaluation")
    parser.add_argument("--ratio", type=ratio, default=1.8, help="larger to smaller side of a history; 0 for any")
    parser.add_argument("--nsfw-words", type=Path, metavar="FILE", help="drop prompts with a word of this list")
    parser.add_argument("--unit-mb", type=positive, default=512, help="of the source that become one shard")
    parser.add_argument("--memory", type=memory, default="700MB", help="DuckDB's share; more spills to disk")
    add_engine(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
