"""A whole set of simulated users: shards of pictures, then the tables, the card and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from .. import card, engine
from ..errors import DataError
from ..schema import PAIRS, PICTURES, USERS
from ..store import MANIFEST, ROW_GROUP, WORK, Store, shard_name, write_parquet
from . import people, renderers, vocabulary


@dataclass(frozen=True)
class World:
    """Everything that a shard's bytes depend on."""

    users: int
    pictures: int
    seed: int
    shard_users: int
    renderer: renderers.Renderer
    vocabulary_file: Path | None  # None for the atelier's

    @cached_property
    def vocabulary(self) -> vocabulary.Vocabulary:
        return vocabulary.load(self.vocabulary_file) if self.vocabulary_file else vocabulary.atelier()

    def config(self) -> dict:
        words = self.vocabulary
        numbers = {k: getattr(self, k) for k in ("users", "pictures", "seed", "shard_users")}
        named = {"vocabulary": words.name, "vocabulary_version": words.version, "vocabulary_sha256": words.digest}
        return {"kind": "agents"} | numbers | named | self.renderer.identity()

    def count(self, user: int) -> int:
        return people.picture_count(user, self.users, self.pictures)

    def shard_count(self) -> int:
        return -(-self.users // self.shard_users)

    def users_of(self, shard: int) -> range:
        return range(shard * self.shard_users, min((shard + 1) * self.shard_users, self.users))

    def pictures_in(self, shards: Iterable[int]) -> int:
        return sum(self.count(user) for shard in shards for user in self.users_of(shard))


def make(
    world: World, folder: Path, processes: int = 0, part: tuple[int, int] = (0, 1), run: engine.Engine = engine.run
) -> None:
    """Write the set, or what is missing of it; the last part to end writes the tables, the card and the manifest.

    run: an engine's, which calls a function with each of many jobs.
    """
    store = Store(folder, world.config())
    if store.done:
        print(f"{folder} is finished already.")
        return
    mine = range(part[0], world.shard_count(), part[1])
    jobs = [n for n in mine if not store.finished(shard_name(n))]
    todo, done = world.pictures_in(jobs), world.pictures_in(mine) - world.pictures_in(jobs)
    with tqdm(total=done + todo, initial=done, unit="picture", mininterval=1) as bar:
        inside = run is engine.run and processes == 1  # then the bar can follow every user, which a slow renderer needs
        job = partial(write_shard, world, store, tick=bar.update if inside else None)
        for rows in run(job, jobs, processes):
            bar.update(0 if inside else rows)
    with store.lock():  # several parts may end at the same moment
        if not store.done:
            finish(world, store)


def finish(world: World, store: Store) -> None:
    """Write everything that needs all shards, unless some are missing."""
    missing = sum(not store.finished(shard_name(n)) for n in range(world.shard_count()))
    if missing:
        print(f"This part is done; {missing} shards of other parts are missing.")
        return
    store.write("users.parquet", USERS, user_tables(world))
    store.write("pairs.parquet", PAIRS, pair_tables(world))
    store.write_index()
    card.write(store)
    store.seal(card.versions() | world.renderer.versions())


def write_shard(world: World, store: Store, shard: int, tick: Callable[[int], object] | None = None) -> int:
    """Make the pictures of one shard's users. Returns their number, and tells `tick` as it goes."""
    return store.write(shard_name(shard), PICTURES, picture_tables(world, world.users_of(shard), tick))


def make_one(world: World, folder: Path, user: int) -> None:
    """One user's pictures alone, to FOLDER/user-0000017.parquet: the same rows as in the whole set."""
    if not 0 <= user < world.users:
        raise DataError(f"--user {user}: the set's users are 0 to {world.users - 1}.")
    if (folder / MANIFEST).exists() or (folder / WORK).exists():
        raise DataError(f"{folder} holds a whole set: name another folder for the file of user {user} alone.")
    path = folder / f"user-{user:07d}.parquet"
    write_parquet(path, PICTURES, picture_tables(world, range(user, user + 1)))
    print(path)


def picture_tables(world: World, users: range, tick: Callable[[int], object] | None = None) -> Iterator[pa.Table]:
    """Tables of PICTURES for these users, about ROW_GROUP rows each; users are never torn apart."""
    rows: list[dict] = []
    for user in users:
        rows += picture_rows(world, user)
        if tick:
            tick(world.count(user))
        if len(rows) >= ROW_GROUP:
            yield pa.Table.from_pylist(rows, PICTURES)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, PICTURES)


def picture_rows(world: World, user: int) -> list[dict]:
    """PICTURES rows of one user."""
    words = world.vocabulary
    person = people.agent(words, world.seed, user)
    items = people.items(words, person, world.seed, range(world.count(user)))
    heldout = people.heldout_pair(len(items))
    return [
        {
            "image": image,
            "picture": item.picture,
            "user": user,
            "item": item.number,
            "verdict": item.verdict,
            "prompt": item.prompt,
            "attributes": [words.keys[i] for i in item.attributes],
            "split": person.split,
            "heldout": item.number // 2 == heldout,
            "seed": item.seed,
        }
        for item, image in zip(items, world.renderer.render(words, items), strict=True)
    ]


def user_tables(world: World) -> Iterator[pa.Table]:
    """Tables of USERS, one a shard's users."""
    words = world.vocabulary

    def opinions(weights) -> list[dict]:
        return [
            {"attribute": words.keys[i], "weight": weights[i]} for i in (-weights).argsort(kind="stable") if weights[i]
        ]

    for shard in range(world.shard_count()):
        rows = []
        for user in world.users_of(shard):
            person, count = people.agent(words, world.seed, user), world.count(user)
            pairs = int(people.heldout_pair(count) >= 0)
            rows.append(
                {
                    "user": user,
                    "split": person.split,
                    "liked": (count + 1) // 2 - pairs,
                    "disliked": count // 2 - pairs,
                    "pairs": pairs,
                    "tastes": [opinions(taste) for taste in person.tastes],
                    "dislikes": opinions(person.dislikes),
                }
            )
        yield pa.Table.from_pylist(rows, USERS)


def pair_tables(world: World) -> Iterator[pa.Table]:
    """Tables of PAIRS: the held-out pair of each user."""
    words = world.vocabulary
    for shard in range(world.shard_count()):
        rows = []
        for user in world.users_of(shard):
            pair = people.heldout_pair(world.count(user))
            if pair >= 0:
                person = people.agent(words, world.seed, user)
                liked, disliked = people.items(words, person, world.seed, (2 * pair, 2 * pair + 1))
                names = {"liked": liked.picture, "disliked": disliked.picture}
                rows.append({"user": user, "pair": 0, "prompt": liked.prompt, "split": person.split} | names)
        yield pa.Table.from_pylist(rows, PAIRS)
