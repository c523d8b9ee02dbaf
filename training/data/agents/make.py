"""A whole set of simulated users: shards of pictures, then the tables, the card and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .. import card, engine
from ..errors import DataError
from ..schema import PAIRS, PICTURES, USERS
from ..store import MANIFEST, ROW_GROUP, WORK, Store, shard_name, write_parquet
from . import people, renderers, vocabulary


@dataclass(frozen=True)
class Population:
    """Everything that a set's bytes depend on: users are 0 to `users` - 1, a shard has `shard_users` of them."""

    users: int
    pictures: int  # of all users together
    seed: int
    shard_users: int
    renderer: renderers.Renderer
    vocabulary_file: Path | None  # None for the atelier's

    @cached_property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """What its pictures can be made of."""
        return vocabulary.load(self.vocabulary_file) if self.vocabulary_file else vocabulary.atelier()

    def config(self) -> dict:
        """For the set's configuration, as JSON values."""
        return {
            "kind": "agents",
            "users": self.users,
            "pictures": self.pictures,
            "seed": self.seed,
            "shard_users": self.shard_users,
            "vocabulary": self.vocabulary.name,
            "vocabulary_version": self.vocabulary.version,
            "vocabulary_sha256": self.vocabulary.digest,
        } | self.renderer.identity()

    def agent(self, user: int) -> people.Agent:
        """A user's opinions."""
        return people.agent(self.vocabulary, self.seed, user)

    def items(self, person: people.Agent, numbers: Iterable[int]) -> list[people.Item]:
        """These pictures of a user, not yet drawn."""
        return people.items(self.vocabulary, person, self.seed, numbers)

    def count(self, user: int) -> int:
        """Pictures of a user."""
        return people.picture_count(user, self.users, self.pictures)

    def shard_count(self) -> int:
        """Shards of the whole set."""
        return -(-self.users // self.shard_users)

    def users_of(self, shard: int) -> range:
        """Users of a shard."""
        return range(shard * self.shard_users, min((shard + 1) * self.shard_users, self.users))

    def pictures_in(self, shards: Iterable[int]) -> int:
        """Pictures of these shards together."""
        return sum(self.count(user) for shard in shards for user in self.users_of(shard))


def make(
    population: Population,
    folder: Path,
    processes: int = 0,
    part: tuple[int, int] = (0, 1),
    run: engine.Engine = engine.run,
) -> None:
    """Write the set, or what is missing of it; the last part to end writes the tables, the card and the manifest.

    part: (n, count) for every count-th shard from n on. run: an engine's, which calls a function with many jobs.
    """
    store = Store(folder, population.config())
    if store.done:
        print(f"{folder} is finished already.")
        return
    first, step = part
    shards = range(first, population.shard_count(), step)
    jobs = [shard for shard in shards if not store.finished(shard_name(shard))]
    total = population.pictures_in(shards)
    with tqdm(total=total, initial=total - population.pictures_in(jobs), unit="picture", mininterval=1) as bar:
        # In this process the bar can follow every user, which a slow renderer needs; else it follows shards.
        follows_users = run is engine.run and processes == 1
        job = partial(write_shard, population, store, progress=bar.update if follows_users else None)
        for rows in run(job, jobs, processes):
            bar.update(0 if follows_users else rows)
    with store.lock():  # several parts may end at the same moment
        if not store.done:
            finish(population, store)


def write_shard(
    population: Population, store: Store, shard: int, progress: Callable[[int], object] | None = None
) -> int:
    """Make the pictures of one shard's users. Returns their number; `progress` is called with each user's."""
    return store.write(shard_name(shard), PICTURES, picture_tables(population, population.users_of(shard), progress))


def finish(population: Population, store: Store) -> None:
    """Write everything that needs all shards, unless some are missing."""
    missing = sum(not store.finished(shard_name(shard)) for shard in range(population.shard_count()))
    if missing:
        print(f"This part is done; {missing} shards of other parts are missing.")
        return
    store.write("users.parquet", USERS, user_tables(population))
    store.write("pairs.parquet", PAIRS, pair_tables(population))
    store.write_index()
    card.write(store)
    store.seal(card.versions() | population.renderer.versions())


def make_one(population: Population, folder: Path, user: int) -> None:
    """One user's pictures alone, to FOLDER/user-0000017.parquet: the same rows as in the whole set."""
    if not 0 <= user < population.users:
        raise DataError(f"--user {user}: the set's users are 0 to {population.users - 1}.")
    if (folder / MANIFEST).exists() or (folder / WORK).exists():
        raise DataError(f"{folder} holds a whole set: name another folder for the file of user {user} alone.")
    path = folder / f"user-{user:07d}.parquet"
    write_parquet(path, PICTURES, picture_tables(population, range(user, user + 1)))
    print(path)


def picture_tables(
    population: Population, users: range, progress: Callable[[int], object] | None = None
) -> Iterator[pa.Table]:
    """Tables of PICTURES for these users, about ROW_GROUP rows each; users are never torn apart."""
    rows: list[dict] = []
    for user in users:
        rows += picture_rows(population, user)
        if progress:
            progress(population.count(user))
        if len(rows) >= ROW_GROUP:
            yield pa.Table.from_pylist(rows, PICTURES)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, PICTURES)


def picture_rows(population: Population, user: int) -> list[dict]:
    """PICTURES rows of one user."""
    words = population.vocabulary
    person = population.agent(user)
    items = population.items(person, range(population.count(user)))
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
        for item, image in zip(items, population.renderer.render(words, items), strict=True)
    ]


def user_tables(population: Population) -> Iterator[pa.Table]:
    """Tables of USERS, one a shard's users."""
    for shard in range(population.shard_count()):
        yield pa.Table.from_pylist([user_row(population, user) for user in population.users_of(shard)], USERS)


def user_row(population: Population, user: int) -> dict:
    """The USERS row of one user."""
    words = population.vocabulary
    person = population.agent(user)
    count = population.count(user)
    pairs = int(people.heldout_pair(count) >= 0)

    def opinions(weights: np.ndarray) -> list[dict]:
        strongest_first = (-weights).argsort(kind="stable")
        return [{"attribute": words.keys[i], "weight": weights[i]} for i in strongest_first if weights[i]]

    return {
        "user": user,
        "split": person.split,
        "liked": (count + 1) // 2 - pairs,
        "disliked": count // 2 - pairs,
        "pairs": pairs,
        "tastes": [opinions(taste) for taste in person.tastes],
        "dislikes": opinions(person.dislikes),
    }


def pair_tables(population: Population) -> Iterator[pa.Table]:
    """Tables of PAIRS, one a shard's users: the held-out pair of each user that has one."""
    for shard in range(population.shard_count()):
        users = [user for user in population.users_of(shard) if people.heldout_pair(population.count(user)) >= 0]
        yield pa.Table.from_pylist([pair_row(population, user) for user in users], PAIRS)


def pair_row(population: Population, user: int) -> dict:
    """The PAIRS row of one user's held-out pair."""
    person = population.agent(user)
    pair = people.heldout_pair(population.count(user))
    liked, disliked = population.items(person, (2 * pair, 2 * pair + 1))
    return {
        "user": user,
        "pair": 0,
        "prompt": liked.prompt,
        "liked": liked.picture,
        "disliked": disliked.picture,
        "split": person.split,
    }
