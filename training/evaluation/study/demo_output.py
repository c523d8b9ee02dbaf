"""What `make demo` shows and where it puts it: the users, the prompts, and the names of histories and pictures.

The demo writes this layout and the study reads it, so that a study of a demo's pictures needs no checkout of `scripts`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from PIL import Image

from prefgen.atelier import users
from prefgen.atelier.renderer import render

# What each picture is painted with: nothing, the next user's history, the user's own, and the likes in the prompt.
CONDITIONS = ("none", "mismatched", "prefgen", "oracle")
LIKED = 8
DISLIKED = 8
HISTORY_SEED = 1


def history_name(user: int) -> str:
    return f"demo_user_{user:02d}"


def picture_prefix(user: int, prompt: int, condition: str) -> str:
    """Where a picture lies below `pictures/`, without its suffix."""
    return f"user{user:02d}/prompt{prompt:02d}_{condition}"


def unseen_users(count: int) -> list[users.User]:
    """`count` users of the test split: the bundled examples, who are on the sheet, then the others by number."""
    numbers = list(users.EXAMPLE_USERS.values())
    others = (number for number in itertools.count() if users.split(number) == "test" and number not in numbers)
    numbers += itertools.islice(others, max(0, count - len(numbers)))
    return [users.user(number) for number in numbers[:count]]


def spread(items: list, count: int) -> list:
    """`count` of `items`, evenly spread, so that subjects differ. All of them if there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


def write_histories(folder: Path, people: list[users.User]) -> list[tuple[list[Image.Image], list[Image.Image]]]:
    """Render every user's history to `folder`/<name>/{liked,disliked}/NN.png, as an artist would lay pictures down.

    Returns the (liked, disliked) pictures of each user.
    """
    shown = []
    for index, person in enumerate(people):
        pictures = {"liked": [], "disliked": []}
        for example in users.history(person, LIKED, DISLIKED, HISTORY_SEED):
            pictures["liked" if example.liked else "disliked"].append(Image.fromarray(render(example.scene)))
        for verdict, images in pictures.items():
            target = folder / history_name(index) / verdict
            target.mkdir(parents=True)
            for number, picture in enumerate(images):
                picture.save(target / f"{number:02d}.png")
        shown.append((pictures["liked"], pictures["disliked"]))
    return shown
