"""Gate G0: which way of using a history wins in this world, simulated from the scenes alone before anything is trained.

    python -m training.atelier.ranking --users 200 --out runs/atelier/ranking.json

Every row paints scenes, not pictures, from what its method can know: the asked prompt, the user's true taste (oracles),
or the traits of the history's pictures. Nothing here reads a pixel: the figures are ceilings of a way of thinking. In a
world that can judge the method, copying loses, words lose what has no name, pooling loses to telling liked from
disliked where users have habits, and histories of one picture leave doubt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prefgen.atelier.world import scores, users
from prefgen.atelier.world.prompts import OPEN, Prompt, random_prompt
from prefgen.atelier.world.scenes import Scene
from prefgen.atelier.world.subjects import CLASSES
from prefgen.atelier.world.traits import COARSE, CONTINUOUS, NAMED, visible
from prefgen.atelier.world.users import TOLERANCE, Example, Taste, User
from prefgen.files import write_atomic

from ..evaluation.world import drawn

PROMPTS = 12  # a user
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Reading:
    """What a way of reading makes of a history.

    slots: {"subject of CLASS", "setting" or "companion": (what fills it, whether that is liked)}.
    """

    taste: Taste
    slots: dict[str, tuple[str, bool]]


# What an ideal observer knows of the world (prefgen/atelier/world/users.py): how often a liked picture and a hard
# negative follow a taste, one of two tastes, or a habit; measured on 400 users' histories.
SHOWN = {"taste": (0.93, 0.27), "one of two": (0.5, 0.17), "habit": (0.77, 0.77), "free": (0.0, 0.0)}
LIKED = 2  # the first so many of them are tastes
# How often a trait is one of them: 2.5 of 8 named and 4.5 of 13 continuous traits are liked, a fifth of the users has
# two tastes, half of them two habits.
PRIOR = {"taste": 0.27, "one of two": 0.12, "habit": 0.05, "free": 0.56}
CENTRES = 36  # places along a continuous trait's range that are tried as the centre of a taste


def likelihoods(matches: np.ndarray, verdicts: np.ndarray, chance: np.ndarray | float, contrast: bool) -> np.ndarray:
    """Log likelihood ratio [sorts, hypotheses] of each sort of SHOWN to chance.

    matches [pictures, hypotheses]: whether a picture shows what is supposed; verdicts [pictures]: liked. Without
    `contrast` the disliked pictures aren't looked at.
    """
    looked = np.ones(len(verdicts), bool) if contrast else verdicts
    rows = []
    for follow_liked, follow_disliked in SHOWN.values():
        follow = np.where(verdicts, follow_liked, follow_disliked)[:, None]
        shown = follow + (1 - follow) * chance
        rows.append(np.log(np.where(matches, shown / chance, (1 - shown) / (1 - chance)))[looked].sum(0))
    return np.array(rows)


def posterior(log_likelihood: np.ndarray) -> np.ndarray:
    """[sorts, hypotheses] that sums to 1: a prior for each sort, spread evenly over its hypotheses."""
    prior = np.log(np.array(list(PRIOR.values())) / log_likelihood.shape[1])[:, None]
    weight = np.exp(log_likelihood + prior - (log_likelihood + prior).max())
    return weight / weight.sum()


def read(history: Sequence[Example], contrast: bool) -> Reading:
    """What an ideal observer takes for taste: of each trait whatever is more likely liked than not.

    With `contrast` liked and disliked pictures are compared; without, the liked ones alone are pooled.
    """
    verdicts = np.array([example.liked for example in history])
    named = {}
    for trait, kinds in NAMED.items():
        shown = np.array([list(kinds).index(example.scene.kinds[trait]) for example in history])
        chances = posterior(likelihoods(shown[:, None] == np.arange(len(kinds)), verdicts, 1 / len(kinds), contrast))
        if liked_share(chances, contrast) > 0.5:
            named[trait] = list(kinds)[chances[:LIKED].sum(0).argmax()]
    values = {}
    for name, trait in CONTINUOUS.items():
        seen = [visible(name, example.scene.kinds, example.scene.numbers) for example in history]
        if not any(seen & verdicts):
            continue
        shares = np.array([trait.share(example.scene.numbers[name]) for example in history])[seen]
        centres = (np.arange(CENTRES) + 0.5) / CENTRES
        distances = np.abs(shares[:, None] - centres)
        distances = np.minimum(distances, 1 - distances) if trait.period else distances
        width = (
            np.minimum(centres + TOLERANCE, 1) - np.maximum(centres - TOLERANCE, 0)
            if not trait.period
            else 2 * TOLERANCE
        )
        chances = posterior(likelihoods(distances <= TOLERANCE, verdicts[seen], width, contrast))
        if liked_share(chances, contrast) > 0.5:
            values[name] = trait.low + mean_place(chances[:LIKED].sum(0), centres, trait.period) * (
                trait.high - trait.low
            )
    return Reading(Taste(named, values), slots_of(history, contrast))


def liked_share(chances: np.ndarray, contrast: bool) -> float:
    """How likely a trait is liked; who doesn't compare can't tell a habit from a taste and takes both."""
    return float(chances[:LIKED].sum() if contrast else chances[: LIKED + 1].sum())


def mean_place(weights: np.ndarray, centres: np.ndarray, period: bool) -> float:
    """The mean of places along a range, 0..1, on the circle where it wraps around."""
    if not period:
        return float((weights * centres).sum() / weights.sum())
    angles = 2 * np.pi * centres
    return float(np.arctan2((weights * np.sin(angles)).sum(), (weights * np.cos(angles)).sum()) / (2 * np.pi) % 1)


def open_slots(prompt: Prompt) -> dict[str, str]:
    """{slot: field of the scene that fills it} of what a prompt leaves open."""
    slots = {field: field for field in ("setting", "companion") if getattr(prompt, field) == OPEN}
    return slots | ({f"subject of {prompt.kind}": "subject"} if prompt.subject == OPEN else {})


def slots_of(history: Sequence[Example], contrast: bool) -> dict[str, tuple[str, bool]]:
    """What most liked pictures fill an open slot with; with `contrast`, what disliked ones do, too."""
    filled: dict[tuple[str, bool], list[str]] = {}
    for example in history:
        for slot, field in open_slots(example.prompt).items():
            filled.setdefault((slot, example.liked), []).append(getattr(example.scene, field))
    readings = {}
    for (slot, liked), names in filled.items():
        name = max(set(names), key=names.count)
        if (
            (liked or contrast and slot.startswith("subject"))
            and names.count(name) > len(names) / 2
            and slot not in readings
        ):
            readings[slot] = (name, liked)
    return readings


def fill(scene: Scene, prompt: Prompt, slots: dict[str, tuple[str, bool]], rng: np.random.Generator) -> Scene:
    """The scene with its open slots filled as was read."""
    for slot, field in open_slots(prompt).items():
        name, liked = slots.get(slot, ("", True))
        if name and liked:
            scene = scene.with_traits(**{field: name})
        elif name and scene.subject == name:
            others = [each for each in CLASSES[prompt.kind] if each != name]
            scene = scene.with_traits(subject=others[rng.integers(len(others))])
    return scene


# --- the rows: (user, history, prompt, random numbers) -> scene ---

Row = Callable[[User, list[Example], Prompt, np.random.Generator], Scene]


def none(person: User, history: list[Example], prompt: Prompt, rng: np.random.Generator) -> Scene:
    """Without preference."""
    return users.asked_scene(None, prompt, rng)


def words_oracle(person: User, history: list[Example], prompt: Prompt, rng: np.random.Generator) -> Scene:
    """The true taste in words: names, bins, favourites; dislikes as negative prompt."""
    scene = users.asked_scene(person, prompt, rng)
    taste = in_words(person.tastes[rng.integers(len(person.tastes))], rng)
    return drawn.without_dislikes(users.follow(scene, taste, rng, width=0.0), person, rng, person.band[0] in COARSE)


def in_words(taste: Taste, rng: np.random.Generator) -> Taste:
    """What words carry of a taste: names, and a value somewhere in its bin."""
    values = {}
    for name in COARSE:
        if name in taste.values:
            trait = CONTINUOUS[name]
            share = (trait.bin(taste.values[name]) + rng.random()) / 3
            values[name] = trait.low + share * (trait.high - trait.low)
    return Taste(taste.named, values)


def reader(contrast: bool, words: bool = False) -> Row:
    """A row that reads the history's traits; with `words`, only what words carry of them."""

    def paint(person: User, history: list[Example], prompt: Prompt, rng: np.random.Generator) -> Scene:
        reading = read(history, contrast)
        scene = users.asked_scene(None, prompt, rng)
        scene = fill(scene, prompt, reading.slots, rng)
        taste = in_words(reading.taste, rng) if words else reading.taste
        return users.follow(scene, taste, rng, width=0.02)

    return paint


ROWS: dict[str, Row] = {
    "none": none,
    "render-oracle": lambda person, history, prompt, rng: drawn.render_oracle(person, prompt, rng),
    "words-oracle": words_oracle,
    "cloner": lambda person, history, prompt, rng: drawn.cloner(history, prompt, rng),
    "ideal observer of the liked alone": reader(contrast=False),
    "ideal observer of both": reader(contrast=True),
    "ideal observer of both, in words": reader(contrast=True, words=True),
}


def measure(people: list[User], lengths: tuple[int, int] | None, seed: int) -> dict[str, dict[str, list]]:
    """{row: {measure: one value a user}}. lengths: (liked, disliked) pictures of every history; None: as users have."""
    columns = ("all", "named", "continuous", "semantic", "specificity")
    figures: dict[str, dict[str, list]] = {row: {column: [] for column in columns} for row in ROWS}
    for person in tqdm(people, desc="users", mininterval=5):
        liked_count, disliked_count = lengths or users.history_lengths(person, seed)
        history = users.history(person, liked_count, disliked_count, seed)
        prompts = [random_prompt(np.random.default_rng([seed, person.id, 5, k]), heldout=True) for k in range(PROMPTS)]
        free = [name for name in (*NAMED, *CONTINUOUS) if name not in person.opinions()]
        liked = [example for example in history if example.liked]
        by_row = {}
        for row, paint in ROWS.items():
            rngs = [np.random.default_rng([seed, person.id, 6, k]) for k in range(PROMPTS)]
            scenes = [paint(person, history, prompt, rng) for prompt, rng in zip(prompts, rngs, strict=True)]
            aligned = [scores.alignment(scene, person, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]
            for column in columns[:4]:
                figures[row][column].append(mean_of([getattr(one, column) for one in aligned]))
            by_row[row] = np.mean([scores.distances(scene, liked, free) for scene in scenes], 0)
        for row in ROWS:
            figures[row]["specificity"].append(scores.specificity(by_row[row], by_row["none"], by_row["cloner"]))
    return figures


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what there is; None of nothing."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def summary(figures: dict[str, dict[str, list]], seed: int = 0) -> dict[str, dict]:
    """{row: {measure: mean, "harmonic": number, "interval": its 95 % interval over users}}."""
    count = len(next(iter(figures.values()))["all"])
    draws = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    result = {}
    for row, columns in figures.items():
        arrays = {name: np.array([np.nan if v is None else v for v in values]) for name, values in columns.items()}
        drawn = [
            scores.harmonic(one, two)
            for one, two in zip(
                np.nanmean(arrays["all"][draws], 1), np.nanmean(arrays["specificity"][draws], 1), strict=True
            )
        ]
        means = {name: float(np.nanmean(array)) for name, array in arrays.items()}
        interval = [float(edge) for edge in np.percentile(drawn, (2.5, 97.5))]
        result[row] = means | {"harmonic": scores.harmonic(means["all"], means["specificity"]), "interval": interval}
    return result


def table(result: dict[str, dict]) -> str:
    """The rows as Markdown."""
    head = ("row", "alignment", "named", "continuous", "semantic", "specificity", "harmonic")
    lines = ["| " + " | ".join(head) + " |", "| ---" * len(head) + " |"]
    for row, figures in result.items():
        cells = [f"{figures[name]:.3f}" for name in ("all", "named", "continuous", "semantic", "specificity")]
        low, high = figures["interval"]
        lines.append("| " + " | ".join([row, *cells, f"{figures['harmonic']:.3f} ({low:.3f} to {high:.3f})"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200, help="test users (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    numbers = (n for n in range(args.users * 20) if users.split(n) == "test")
    people = [users.user(n) for _, n in zip(range(args.users), numbers, strict=False)]
    record = {}
    groups = {
        "8 liked and 8 disliked": (people, (8, 8)),
        "8 and 8, users with habits": ([p for p in people if p.habits.named or p.habits.values], (8, 8)),
        "1 and 1": (people, (1, 1)),
        "as users have them": (people, None),
    }
    for name, (group, lengths) in groups.items():
        record[name] = summary(measure(group, lengths, args.seed))
        print(f"\n## {name}, {len(group)} users\n\n{table(record[name])}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
