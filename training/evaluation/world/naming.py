"""Whether an eye names what was asked for: sheets of pictures without their prompts, and the key to mark answers with.

    python -m training.evaluation.world.naming --out runs/naming                       paints the sheets
    python -m training.evaluation.world.naming --out runs/naming --answers names.txt   counts what was named rightly

Every picture is of a closed prompt with five traits in words, no user; of any pair of class and setting, since the
pairs of the tests have no vehicle. Whoever names looks at the sheets alone and writes one subject a
line, in the order of the numbers; key.json is for the count. With --renders the renderer draws the same scenes: what an
eye can name at best.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from prefgen.atelier.world.render import render
from prefgen.atelier.world.subjects import SUBJECTS
from prefgen.files import read_text, write_atomic

from ...atelier.world.obedience import Request, closed_requests, draw
from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from ...common.files import save_image
from ...data.errors import DataError
from ...data.world_pool import as_tensor

# Pictures of a sheet, across and down.
ACROSS, DOWN = 4, 3
# Pixels above every picture, for its number.
CAPTION = 22


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.world.naming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/naming"))
    parser.add_argument("--pictures", type=positive, default=60)
    parser.add_argument("--seed", type=natural, default=60, help="of prompts and order")
    parser.add_argument("--renders", action="store_true", help="drawn by the renderer in place of the UNet")
    parser.add_argument("--answers", type=Path, help="a text file, one subject a line")
    args = parser.parse_args()
    with exit_with_message():
        if args.answers:
            print(json.dumps(marked(args.out, args.answers), indent=1))
        else:
            write_sheets(args.out, args.pictures, args.seed, args.renders)


def write_sheets(folder: Path, count: int, seed: int, renders: bool) -> None:
    """Paint `count` requests in an order of their own, as numbered sheets and a key."""
    requests = balanced(count, seed)
    if renders:
        pictures = as_tensor(np.stack([render(request.scene) for request in requests]))
    else:
        pictures = draw([request.text for request in requests])
    folder.mkdir(parents=True, exist_ok=True)
    at_once = ACROSS * DOWN
    for number, start in enumerate(range(0, count, at_once), 1):
        save_image(sheet(pictures[start : start + at_once], start + 1), folder / f"sheet-{number}.png")
    key = {"seed": seed, "renders": renders, "subjects": [request.prompt.subject for request in requests]}
    write_atomic(folder / "key.json", json.dumps(key, indent=1).encode())
    print(f"{folder}: {count} pictures. The subjects are among: {', '.join(SUBJECTS)}.")


def balanced(count: int, seed: int) -> list[Request]:
    """Requests that ask for every subject about as often, shuffled."""
    many = closed_requests(count * len(SUBJECTS), seed, heldout=None)
    rounds: dict[str, list[Request]] = {name: [] for name in SUBJECTS}
    for request in many:
        rounds[request.prompt.subject].append(request)
    turns = [own[i] for i in range(count) for own in rounds.values() if i < len(own)]
    order = np.random.default_rng([seed, 1]).permutation(count)
    return [turns[i] for i in order]


def sheet(pictures: torch.Tensor, first: int) -> Image.Image:
    """Pictures [n, 3, H, W] in -1..1 with their numbers above them."""
    side = pictures.shape[-1]
    canvas = Image.new("RGB", (ACROSS * side, -(-len(pictures) // ACROSS) * (side + CAPTION)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        left, top = i % ACROSS * side, i // ACROSS * (side + CAPTION)
        pen.text((left + 4, top + 4), str(first + i), fill="black")
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        canvas.paste(Image.fromarray(pixels), (left, top + CAPTION))
    return canvas


def marked(folder: Path, answers: Path) -> dict:
    """How many answers are right, and what was taken for what. DataError for answers that aren't one subject each."""
    try:
        key = json.loads(read_text(folder / "key.json"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no sheets: paint them first, without --answers.") from error
    names = [line.strip().lower() for line in read_text(answers).splitlines() if line.strip()]
    unknown = sorted(set(names) - set(SUBJECTS))
    if unknown or len(names) != len(key["subjects"]):
        raise DataError(
            f"{answers} has {len(names)} answers for {len(key['subjects'])} pictures"
            + (f", and {unknown[0]!r} is no subject" if unknown else "")
            + f": write one of {', '.join(SUBJECTS)} a line."
        )
    pairs = list(zip(key["subjects"], names, strict=True))
    return {
        "pictures": len(pairs),
        "right": sum(asked == named for asked, named in pairs),
        "wrong": [f"{i}: {asked}, named {named}" for i, (asked, named) in enumerate(pairs, 1) if asked != named],
    }


if __name__ == "__main__":
    main()
