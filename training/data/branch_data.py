"""What the branch learns from: every extracted history as a user vector, and batches of pictures that its user likes.

A batch is a pure function of its step: noise, timesteps, and what is dropped are those of the whole batch, of which
each process takes its share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from prefgen.adapter import UserAdapter

from ..common.base import Base, Text
from ..common.config.command import StageArgs
from ..common.config.schema import PARTS, TrainUserAttention
from ..common.fitting import release
from ..common.order import step_seed
from ..common.run import Run
from ..common.stage_outputs import ExtractedUsers, first_heldout
from .branch_caches import LatentCache, TextCache
from .lessons import Batch, Teacher, TraitsTeacher, WordsTeacher
from .people_world import PeopleWorld
from .picture_shapes import picture_shapes
from .worlds import Target, World


@dataclass
class Shelf:
    """Pictures of one shape, and the histories of users who like some of them. targets: of each user, None for all that
    the world gives."""

    latents: LatentCache
    rows: np.ndarray
    targets: dict[int, list[Target]] | None = None


@dataclass
class TrainingData:
    """Every extracted history with what its user likes, and the batches of it.

    owners [n]: the user of each history. vectors [n, C + D + I]: its user vector. part_widths: C, D, I. shelves: by the
    shape of the pictures, one in all but `base.aspects`. heldout [users]: one history of each user that is left out.
    texts: prompts -> Text. teacher: None where nobody knows a taste; distil: its share of the loss, 0 without one.
    """

    section: TrainUserAttention
    world: World
    base: Base
    owners: np.ndarray
    vectors: torch.Tensor
    part_widths: list[int]
    shelves: list[Shelf]
    heldout: np.ndarray
    texts: Callable[[list[str]], Text]
    teacher: Teacher | None
    distil: float

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        """This process's share of a step's batch.

        Every process draws for the whole batch and takes its rows of it, so any number of processes learns the same.
        """
        section = self.section
        rng = np.random.default_rng([section.seed, step])
        torch.manual_seed(step_seed(section.seed, step))
        shelf = self.shelves[0]
        if len(self.shelves) > 1:
            # One shape a batch, as often as there are histories with pictures of it.
            counts = np.array([len(shelf.rows) for shelf in self.shelves])
            shelf = self.shelves[rng.choice(len(counts), p=counts / counts.sum())]
        chosen = rng.choice(shelf.rows, section.batch, replace=False)
        targets = [self.target(row, shelf, rng) for row in chosen]
        vectors = drop_parts(self.vectors[chosen], self.part_widths, section.drop_part, section.drop_user)
        timesteps = torch.randint(0, len(self.base.schedule), (section.batch,))
        noise = torch.randn(section.batch, *shelf.latents.shape)
        # Where the text is dropped or nobody knows the taste, a row learns from its picture alone; the others have the
        # teacher's weight together, whatever process or micro-batch they are in.
        teachable = torch.tensor([self.teacher is not None and self.teacher.knows(target) for target in targets])
        teacher_weights = teachable * (section.batch / max(1, int(teachable.sum())))

        share = section.batch // world_size
        own = slice(rank * share, (rank + 1) * share)
        clean, sizes = shelf.latents.of([target.picture for target in targets[own]])
        lesson = None
        if self.teacher is not None:
            # A dropped user must predict what the plain UNet predicts, so its teacher is told nothing.
            taught = teachable[own] & (vectors[own].abs().sum(1) > 0)
            lesson = self.teacher.lesson(self.owners[chosen[own]].tolist(), targets[own], taught.tolist())
        device = self.base.device
        own_timesteps = timesteps[own].to(device)
        noisy, prediction = self.base.schedule.add_noise(clean.to(device), noise[own].to(device), own_timesteps)
        return Batch(
            vectors=vectors[own].to(device),
            noisy=noisy,
            target=prediction,
            timesteps=own_timesteps,
            sizes=sizes,
            text=self.texts([target.prompt for target in targets[own]]),
            lesson=lesson,
            weights=self.base.schedule.min_snr_weights(own_timesteps, section.min_snr),
            teacher_weights=teacher_weights[own].to(device),
        )

    def latents(self, pictures: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `LatentCache.of`, of pictures of one shape."""
        shelf = next(shelf for shelf in self.shelves if pictures[0] in shelf.latents)
        return shelf.latents.of(pictures)

    def target(self, row: int, shelf: Shelf, rng: np.random.Generator) -> Target:
        """What a history's user might ask for; at times without its text, for guidance."""
        user = int(self.owners[row])
        if shelf.targets is None:
            target = self.world.target(user, rng)
        else:
            target = shelf.targets[user][rng.integers(len(shelf.targets[user]))]
        return Target(target.picture, "", None) if rng.random() < self.section.drop_text else target


def caches(
    args: StageArgs[TrainUserAttention], run: Run, world: World, extracted: ExtractedUsers, base: Base
) -> tuple[list[Shelf], Callable[[list[str]], Text]]:
    """Latents of all pictures that training may aim at, and what reads prompts: cached states, or the base."""
    targets = world.all_targets(np.unique(extracted.owners).tolist())
    rows = training_rows(args, extracted.owners)
    with run.timer("caches"):
        texts = base.encode_text
        if targets is None:
            shelves = [Shelf(LatentCache.of_pool(args.runs, world.pool, run), rows)]
        else:
            if args.config.base.aspects:
                shelves = shelves_by_shape(args, run, world, extracted.owners, rows, base)
            else:
                shelves = [Shelf(LatentCache.of_targets(args, base, world, targets, run), rows)]
            if args.section.cache_text:
                texts = TextCache(args, base, world, targets, run)
                base.free_encoders()
        # It waits there for the pictures to be shown.
        base.vae.to("cpu")
        release()
    return shelves, texts


def training_data(
    args: StageArgs[TrainUserAttention],
    run: Run,
    world: World,
    extracted: ExtractedUsers,
    base: Base,
    adapter: UserAdapter,
    shelves: list[Shelf],
    texts: Callable[[list[str]], Text],
) -> TrainingData:
    """The histories as user vectors, and who is left out of training. SystemExit where they can't fill a batch."""
    owners = extracted.owners
    vectors = user_vectors(adapter, extracted, args.section.parts)
    heldout = np.searchsorted(owners, heldout_users(args, owners)[: args.section.users])
    header = adapter.header
    widths = [header.semantic_width, header.core_width, header.image_width]
    teacher = teacher_of(args, run, world, base, texts)
    distil = args.section.distil if teacher is not None else 0.0
    return TrainingData(args.section, world, base, owners, vectors, widths, shelves, heldout, texts, teacher, distil)


def teacher_of(
    args: StageArgs[TrainUserAttention], run: Run, world: World, base: Base, texts: Callable[[list[str]], Text]
) -> Teacher | None:
    """The teacher that the section asks for, None where it has no weight or nobody knows a taste. SystemExit for trait
    tokens of users whom nobody knows completely."""
    section = args.section
    if not section.distil:
        return None
    if section.teacher == "traits":
        if not isinstance(world, PeopleWorld):
            raise SystemExit(
                f"{args.stage}.teacher=traits: only the traits of the atelier's own users are known; set it to words."
            )
        return TraitsTeacher(world, texts, section.away, base.device)
    if world.attributes or world.traits:
        return WordsTeacher(texts, section.away, base.device)
    if run.rank == 0:
        print(f"{args.stage}: nobody knows a taste in words, so there is no words teacher.", flush=True)
    return None


def heldout_users(args: StageArgs[TrainUserAttention], owners: np.ndarray) -> np.ndarray:
    """Users whom a data set keeps for the figures, those that the alignment was measured on; the atelier has others."""
    users = np.unique(owners)
    return users[:0] if args.config.data.path is None else users[first_heldout(len(users)) :]


def training_rows(args: StageArgs[TrainUserAttention], owners: np.ndarray) -> np.ndarray:
    """Histories that are trained on. SystemExit where they can't fill a batch."""
    rows = np.flatnonzero(~np.isin(owners, heldout_users(args, owners)))
    if len(rows) < args.section.batch:
        raise SystemExit(
            f"{args.stage}: {len(rows)} histories can't fill a batch of {args.section.batch}: extract more users."
        )
    return rows


def shelves_by_shape(
    args: StageArgs[TrainUserAttention], run: Run, world: World, owners: np.ndarray, rows: np.ndarray, base: Base
) -> list[Shelf]:
    """Pictures by the shape that keeps their proportions, in an order."""
    targets = {user: world.all_targets([user]) or [] for user in np.unique(owners).tolist()}
    trained, counts = np.unique(owners[rows], return_counts=True)
    histories = dict(zip(trained.tolist(), counts.tolist(), strict=True))
    shapes = picture_shapes(world, targets, histories, args, run)
    shelves = []
    for shape in sorted(set(shapes.values())):
        own = {user: [t for t in some if shapes[t.picture] == shape] for user, some in targets.items()}
        own = {user: some for user, some in own.items() if some}
        every = [target for some in own.values() for target in some]
        cache = LatentCache.of_targets(args, base, world, every, run, shape)
        having = rows[np.isin(owners[rows], list(own))]
        # Too few for a batch: nothing is drawn from it, but held-out pictures may have the shape.
        shelves.append(Shelf(cache, having if len(having) >= args.section.batch else having[:0], own))
    return shelves


@torch.no_grad()
def user_vectors(adapter: UserAdapter, extracted: ExtractedUsers, parts, at_once: int = 4096) -> torch.Tensor:
    """e_u of every extracted history, [n, C + D + I], fp32: the paper's fusion, of the trained `parts` alone."""
    vectors = []
    for start in range(0, len(extracted.owners), at_once):
        rows = slice(start, start + at_once)
        e_u = {}
        if extracted.hidden is not None:
            hidden = torch.from_numpy(np.array(extracted.hidden[rows], np.float32))
            e_u = {"semantic": adapter.semantic(hidden), "core": adapter.core(hidden)}
        if extracted.images is not None:
            e_u["image"] = torch.from_numpy(np.array(extracted.images[rows], np.float32))
        vectors.append(torch.cat([e_u[part] for part in PARTS if part in parts], 1))
    return torch.cat(vectors)


def drop_parts(vectors: torch.Tensor, widths: list[int], part: float, user: float) -> torch.Tensor:
    """Zero each part with probability `part`, everything with probability `user`.

    No user is zeros through the same projection, so the branch has to learn what zeros mean: classifier-free guidance
    (arXiv 2207.12598) compares with them, and the artist may set a part's weight to 0.
    """
    keep = (torch.rand(len(vectors), len(widths)) >= part) & (torch.rand(len(vectors), 1) >= user)
    return vectors * keep.repeat_interleave(torch.tensor(widths), 1)
