"""The second world's users as a data set of the common schema: what a lab's own users are to the stages.

    python -m training.atelier.world.people runs/world/people --users 6000

Every user has an album of liked and disliked pictures, from which histories of any length are drawn, and one held-out
pair of one prompt. Pictures are renders of 256 px; attributes are what words can say of them (names, bins, subjects,
company). Continuous centres aren't in the set: `prefgen.atelier.world.users.user` has them by the user's number. A
shard is a pure function of its users, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from prefgen.atelier.world import users
from prefgen.atelier.world.prompts import phrases
from prefgen.atelier.world.render import SIZE, render
from prefgen.atelier.world.scenes import Scene
from prefgen.atelier.world.traits import CONTINUOUS, NAMED

from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from ...data import card, engine
from ...data.schema import DISLIKED, LIKED, PAIRS, PICTURES, TEST, TRAIN, USERS, split
from ...data.store import ROW_GROUP, Store, shard_name

# Pictures of an album, liked and disliked: histories of 1 to 16, and one of each to ask about.
ALBUM = (17, 17)
# Of a user who knows mostly what he doesn't like.
FEW_LIKES = (3, 8)


@dataclass(frozen=True)
class People:
    """Everything that the set's bytes depend on: users are 0 to `users` - 1, a shard has `shard_users` of them."""

    users: int
    seed: int
    shard_users: int = 100

    def config(self) -> dict:
        """For the set's configuration, as JSON values."""
        return {"kind": "world", "users": self.users, "seed": self.seed, "shard_users": self.shard_users, "side": SIZE}

    def shards(self) -> range:
        return range(-(-self.users // self.shard_users))

    def users_of(self, shard: int) -> range:
        return range(shard * self.shard_users, min((shard + 1) * self.shard_users, self.users))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=positive, default=6000)
    parser.add_argument("--seed", type=natural, default=1)
    parser.add_argument("--processes", type=natural, default=0, help="0 for all cores")
    args = parser.parse_args()
    with exit_with_message():
        make(People(args.users, args.seed), args.folder, args.processes)


def make(people: People, folder: Path, processes: int = 0) -> None:
    """Write the set, or what is missing of it."""
    store = Store(folder, people.config())
    if store.done:
        print(f"{folder} is finished already.")
        return
    missing = [shard for shard in people.shards() if not store.finished(shard_name(shard))]
    results = engine.run(partial(write_shard, people, store), missing, processes)
    with tqdm(
        total=len(people.shards()), initial=len(people.shards()) - len(missing), unit="shard", mininterval=5
    ) as bar:
        for _ in results:
            bar.update()
    store.write("users.parquet", USERS, user_tables(people))
    store.write("pairs.parquet", PAIRS, pair_tables(people))
    store.write_index()
    card.write(store)
    store.seal(card.versions())


def write_shard(people: People, store: Store, shard: int) -> int:
    """Draw the pictures of one shard's users. Returns their number."""

    def tables() -> Iterator[pa.Table]:
        rows: list[dict] = []
        for user in people.users_of(shard):
            rows += picture_rows(people, user)
            if len(rows) >= ROW_GROUP:
                yield pa.Table.from_pylist(rows, PICTURES)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, PICTURES)

    return store.write(shard_name(shard), PICTURES, tables())


def album(people: People, user: int) -> list[users.Example]:
    """A user's pictures, liked and disliked by turns as far as they go, then the held-out pair."""
    person = users.user(user)
    liked_count, disliked_count = FEW_LIKES if person.few_likes else ALBUM
    examples = users.history(person, liked_count, disliked_count, people.seed)
    liked, disliked = examples[:liked_count], examples[liked_count:]
    turns = [example for pair in zip(liked, disliked, strict=False) for example in pair]
    rest = liked[len(disliked) :] + disliked[len(liked) :]
    return [*turns, *rest, *held_out_pair(people, person)]


def held_out_pair(people: People, person: users.User) -> list[users.Example]:
    """A liked and a disliked picture of one prompt; a test user's prompt is of the tests too."""
    rng = np.random.default_rng([people.seed, person.id, 2])
    prompt = users.own_prompt(person, rng, heldout=users.split(person.id) == TEST)
    return [
        users.Example(users.liked_scene(person, prompt, rng), True, prompt),
        users.Example(users.disliked_scene(person, prompt, rng), False, prompt),
    ]


def picture_rows(people: People, user: int) -> list[dict]:
    """PICTURES rows of one user."""
    examples = album(people, user)
    return [
        {
            "image": encoded(example.scene),
            "picture": picture_name(user, number),
            "user": user,
            "item": number,
            "verdict": LIKED if example.liked else DISLIKED,
            "prompt": example.prompt.text,
            "attributes": scene_attributes(example.scene),
            "split": split(users.split(user), TEST if example.prompt.heldout else TRAIN),
            "heldout": number >= len(examples) - 2,
            "seed": example.scene.seed,
        }
        for number, example in enumerate(examples)
    ]


def picture_name(user: int, number: int) -> str:
    return f"{user:07d}-{number:02d}"


def encoded(scene: Scene) -> bytes:
    """The render as PNG, quickly: drawings shrink little more at higher levels."""
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def scene_attributes(scene: Scene) -> list[str]:
    """What words can say of a scene, as "family/words"."""
    said = {"subject": scene.subject, "setting": scene.setting, "companion": scene.companion, **phrases(scene)}
    return [f"{family}/{words}" for family, words in said.items() if words != "none"]


def user_tables(people: People) -> Iterator[pa.Table]:
    """Tables of USERS, one a shard's users."""
    for shard in people.shards():
        yield pa.Table.from_pylist([user_row(people, user) for user in people.users_of(shard)], USERS)


def user_row(people: People, user: int) -> dict:
    """The USERS row of one user: as opinions what words can say of them."""
    person = users.user(user)
    liked, disliked = FEW_LIKES if person.few_likes else ALBUM
    return {
        "user": user,
        "split": users.split(user),
        "liked": liked,
        "disliked": disliked,
        "pairs": 1,
        "tastes": [opinions(liked_attributes(person, taste)) for taste in person.tastes],
        "dislikes": opinions(disliked_attributes(person)),
    }


def liked_attributes(person: users.User, taste: users.Taste) -> list[str]:
    """What a taste likes, in words: names, bins, favourites and company."""
    named = [f"{trait}/{NAMED[trait][kind]}" for trait, kind in taste.named.items()]
    bins = [
        f"{name}/{CONTINUOUS[name].bins[CONTINUOUS[name].bin(centre)]}"
        for name, centre in taste.values.items()
        if CONTINUOUS[name].bins
    ]
    favourites = [f"subject/{subject}" for subject in person.favourites.values()]
    where, name = person.company
    return [*named, *bins, *favourites, f"{where}/{name}"]


def disliked_attributes(person: users.User) -> list[str]:
    """What is disliked whatever the taste, in words. A band's bin is the one that its middle lies in."""
    avoided = [f"{trait}/{NAMED[trait][kind]}" for trait, kind in person.avoided.items()]
    aversions = [f"subject/{subject}" for subject in person.aversions.values()]
    name, low, high = person.band
    trait = CONTINUOUS[name]
    band = [f"{name}/{trait.bins[trait.bin((low + high) / 2)]}"] if trait.bins else []
    return [*avoided, *aversions, *band]


def opinions(attributes: list[str]) -> list[dict]:
    """Opinions of equal weight."""
    return [{"attribute": attribute, "weight": 1.0} for attribute in attributes]


def pair_tables(people: People) -> Iterator[pa.Table]:
    """Tables of PAIRS, one a shard's users."""
    for shard in people.shards():
        yield pa.Table.from_pylist([pair_row(people, user) for user in people.users_of(shard)], PAIRS)


def pair_row(people: People, user: int) -> dict:
    """The PAIRS row of one user's held-out pair."""
    person = users.user(user)
    liked, _ = held_out_pair(people, person)
    first = sum(FEW_LIKES if person.few_likes else ALBUM)
    return {
        "user": user,
        "pair": 0,
        "prompt": liked.prompt.text,
        "liked": picture_name(user, first),
        "disliked": picture_name(user, first + 1),
        "split": split(users.split(user), TEST if liked.prompt.heldout else TRAIN),
    }


if __name__ == "__main__":
    main()
