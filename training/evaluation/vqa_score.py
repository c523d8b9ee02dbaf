"""What MLLMs answer to closed questions about users that training left out.

    python -m training.evaluation.vqa_score --config sdxl_24gb --runs runs/sdxl_24gb --out docs/evidence

The tuned MLLM beside the untuned one, the tuned one without pictures (their tokens are zeros), and a control that has
learnt what the words of a conversation give away. An answer counts as given when its first word is the likelier of the
two. "ranked": of a liked and a disliked picture of one user, each asked about by itself, the liked one leans more
towards "yes". Writes vqa.json and vqa.md. Intervals: 95 %, bootstrap over users.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from prefgen.dtypes import DTYPES
from prefgen.errors import out_of_memory
from prefgen.files import write_atomic
from prefgen.mllm.model import PreferenceMLLM

from ..common.arguments import natural, positive
from ..common.captioning import captioning_folder
from ..common.config.command import load
from ..common.devices import default_device
from ..common.errors import exit_with_message
from ..data.errors import DataError
from ..data.image_tokens import new_mllm, pool_image_tokens
from ..data.open_world import open_world
from ..data.preference_questions import Questions
from ..data.readers import Conversation, Reader, data_set_tokens, load_reader
from ..data.schema import TEST, TRAIN
from ..data.vqa.control import TextOnly
from ..data.vqa.questions import ANSWERS, WHICH, WOULD, Picture, Question
from ..data.worlds import AtelierWorld, World
from .metrics import interval
from .tables import estimate, table

RANKED = "ranked"
TUNED = "tuned"
UNTUNED = "untuned"
BLIND = "tuned, without pictures"
TEXT = "text alone"
TITLES = {
    WOULD: "would like this picture, yes or no",
    WHICH: "which of the two, first or second",
    RANKED: "liked above disliked",
}


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = args.runs or Path("runs") / Path(args.config).stem
    try:
        figures = score(load(args.config, args.set), runs, args.users, args.each, args.batch)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise SystemExit(f"The GPU's memory is full: take less than --batch {args.batch}.") from error
    out = args.out or runs / "vqa"
    write_atomic(out / "vqa.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomic(out / "vqa.md", page(figures).encode())
    print(page(figures))


def score(config, runs: Path, users: int, each: int, batch: int) -> dict:
    """All figures. users: of each split; each: questions a user. DataError or MLLMError with one sentence."""
    started = time.monotonic()
    world = open_world(config, runs)
    train = closed_questions(world, config, users, each, TRAIN)
    test = closed_questions(world, config, users, each, TEST)
    tuned = load_reader(SimpleNamespace(config=config, runs=runs), world)
    leaning = {TUNED: leanings(tuned, test, batch, TUNED)}
    leaning[BLIND] = leanings(Blind(tuned.mllm, world, tuned.tokens), test, batch, BLIND)
    fingerprint = tuned.fingerprint
    # Two large MLLMs don't fit at once.
    del tuned
    leaning[UNTUNED] = leanings(untuned_of(config, runs, world), test, batch, UNTUNED)
    leaning[TEXT] = text_control(train, test)
    shares = {name: by_user(test, leaning[name]) for name in (TUNED, UNTUNED, BLIND, TEXT)}
    return {
        "command": f"python -m training.evaluation.vqa_score {shlex.join(sys.argv[1:])}".rstrip(),
        "mllm": fingerprint,
        "world": world.name,
        "users": len({question.user for question in test}),
        "questions": dict(sorted(Counter(question.kind for question in test).items())),
        "readers": summary(shares),
        "seconds": round(time.monotonic() - started, 1),
    }


def share_right(reader: Reader, config, users: int, each: int, batch: int) -> float:
    """Of the test users' closed questions, the share that a reader answers rightly, the mean over kinds of question.
    users, each: how many users, and questions of each kind a user."""
    assert reader.world is not None
    try:
        questions = closed_questions(reader.world, config, users, each, TEST)
    except DataError:
        # A small set has fewer users.
        questions = closed_questions(reader.world, config, 0, each, TEST)
    right = by_user(questions, leanings(reader, questions, batch, "gate"))
    return float(np.mean([np.mean(list(shares.values())) for kind, shares in right.items() if kind != RANKED]))


@dataclass(frozen=True)
class Closed:
    """A question that two words can answer, about one user's history."""

    user: int
    kind: str
    conversation: Conversation

    @property
    def first(self) -> bool:
        """Whether the first of the two answers is the right one."""
        return self.conversation.answer == ANSWERS[self.kind][0]

    @property
    def unanswered(self) -> Conversation:
        """The conversation as the MLLM is asked."""
        return replace(self.conversation, answer="")

    @property
    def words(self) -> Question:
        """The question as the control sees it."""
        history = self.conversation.history
        pictures = tuple(
            Picture("", bool(liked), prompt, frozenset(), False, 0, 0)
            for liked, prompt in zip(history.liked, history.prompts, strict=True)
        )
        return Question(self.kind, self.conversation.question, self.conversation.answer, pictures, ())


def closed_questions(world: World, config, users: int, each: int, split: str) -> list[Closed]:
    """A split's closed questions. DataError when there are none."""
    questions = Questions(world, config.data.questions, split)
    closed = [Closed(*question) for question in questions.closed(users, each, split)]
    if not closed:
        raise DataError(f"{config.data.questions} has no closed question about the {split} split: make a larger set.")
    return closed


class Blind(Reader):
    """Reads every picture as nothing."""

    def features(self, pictures) -> torch.Tensor:
        return torch.zeros_like(super().features(pictures))


def untuned_of(config, runs: Path, world: World) -> Reader:
    """The MLLM before `train_mllm`: without the LoRA; the atelier's as it captions pictures, or in
    the first edition with its trained image encoder and new words."""
    mllm = config.mllm
    if mllm.path is not None:
        return Reader(PreferenceMLLM.load(mllm.path, DTYPES[mllm.precision], default_device(), None, mllm.nf4), world)
    if not isinstance(world, AtelierWorld):
        captioning = PreferenceMLLM.load(captioning_folder(runs))
        return Reader(captioning, world, data_set_tokens(SimpleNamespace(config=config, runs=runs), world, captioning))
    from prefgen.atelier.models import mllm_tokenizer

    # The image tokens are cached, so that only the language model runs.
    untuned = PreferenceMLLM(new_mllm().eval(), mllm_tokenizer(), "atelier untuned", "")
    return Reader(untuned, world, pool_image_tokens(runs, world.pool))


@torch.inference_mode()
def leanings(reader: Reader, questions: list[Closed], batch: int, title: str) -> np.ndarray:
    """How much each question's first answer is likelier than the second, in logits [n]."""
    leaning = np.empty(len(questions), np.float32)
    # Conversations of one length together: less padding.
    order = sorted(
        range(len(questions)), key=lambda i: (questions[i].kind, len(questions[i].conversation.history.pictures))
    )
    for start in tqdm(range(0, len(order), batch), desc=title, mininterval=5):
        for kind in ANSWERS:
            numbers = [i for i in order[start : start + batch] if questions[i].kind == kind]
            if numbers:
                inputs = reader.batch([questions[i].unanswered for i in numbers])
                states = reader.forward(inputs)[1]
                ends = states[torch.arange(len(numbers), device=states.device), inputs.last]
                leaning[numbers] = reader.leaning(ends, ANSWERS[kind]).cpu().numpy()
    return leaning


def text_control(train: list[Closed], test: list[Closed]) -> np.ndarray:
    """+1 where the words alone point to the first answer, -1 to the second, [n]."""
    control = TextOnly()
    for question in train:
        control.learn(question.words)
    return np.array([1.0 if control.answer(each.words) == ANSWERS[each.kind][0] else -1.0 for each in test])


def by_user(questions: list[Closed], leaning: np.ndarray) -> dict[str, dict[int, float]]:
    """{kind: {user: share that is right}}, and for `ranked` the share of the user's pairs in the right order."""
    right = defaultdict(lambda: defaultdict(list))
    sides = defaultdict(lambda: ([], []))
    for question, value in zip(questions, leaning.tolist(), strict=True):
        right[question.kind][question.user].append((value > 0) == question.first)
        if question.kind == WOULD:
            sides[question.user][question.first].append(value)
    for user, (disliked, liked) in sides.items():
        if disliked and liked:
            difference = np.subtract.outer(liked, disliked)
            right[RANKED][user] = ((difference > 0) + 0.5 * (difference == 0)).ravel().tolist()
    return {kind: {user: float(np.mean(each)) for user, each in users.items()} for kind, users in right.items()}


def summary(shares: dict[str, dict[str, dict[int, float]]]) -> dict:
    """{reader: {kind: accuracy and interval, and what the tuned one has more}} of {reader: {kind: {user: share}}}."""
    figures = {}
    for name, kinds in shares.items():
        figures[name] = {}
        for kind, users in kinds.items():
            own = np.array([users[user] for user in sorted(users)])
            tuned = np.array([shares[TUNED][kind][user] for user in sorted(users)])
            figures[name][kind] = interval(own)
            if name != TUNED:
                figures[name][kind]["tuned_more"] = interval(tuned - own)
    return figures


def page(figures: dict) -> str:
    """The figures as Markdown."""
    kinds = list(figures["readers"][TUNED])
    questions = ", ".join(
        f"{count} questions {TITLES.get(kind, kind)!r}" for kind, count in figures["questions"].items()
    )
    rows = [[name, *(cell_of(row[kind]) for kind in kinds)] for name, row in figures["readers"].items()]
    return f"""# Questions about users that training left out

`{figures["command"]}`: {figures["users"]} users of the test split, {questions}, right answers in balance \
({figures["seconds"]:.0f} s).
Intervals: 95 %, bootstrap over users; chance is 0.5. In brackets: how much more the tuned one gets right,
paired.

{table(["reader", *(TITLES.get(kind, kind) for kind in kinds)], rows)}
"""


def cell_of(entry: dict) -> str:
    """A share, and behind it what the tuned one has more."""
    more = f" [{estimate(entry['tuned_more'], signed=True)}]" if "tuned_more" in entry else ""
    return estimate(entry) + more


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.vqa_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="atelier", help="a name in training/configs, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value")
    parser.add_argument("--runs", type=Path, help="folder that holds every stage's run; runs/NAME by default")
    parser.add_argument("--users", type=positive, default=400, help="of each split")
    parser.add_argument("--each", type=positive, default=8, help="questions a user, where they are dealt (atelier)")
    parser.add_argument("--batch", type=positive, default=16, help="conversations at once: less on a small GPU")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads, 0 for all")
    parser.add_argument("--out", type=Path, help="where vqa.json and vqa.md go; RUNS/vqa by default")
    return parser.parse_args()


if __name__ == "__main__":
    with exit_with_message():
        main()
