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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from prefgen.errors import out_of_memory
from prefgen.files import write_atomic
from prefgen.mllm.model import PreferenceMLLM
from prefgen.precision import DTYPES

from ..common.config.command import load
from ..common.devices import default_device
from ..common.errors import exit_with_message
from ..common.statistics import bootstrap
from ..data.cli import natural, positive
from ..data.errors import DataError
from ..data.image_tokens import new_mllm, pool_image_tokens
from ..data.preference_questions import Questions
from ..data.readers import Conversation, Reader, load_reader
from ..data.schema import TEST, TRAIN
from ..data.vqa.control import TextOnly
from ..data.vqa.questions import ANSWERS, WOULD, Picture, Question
from ..data.worlds import World, open_world

RANKED = "ranked"
TUNED, UNTUNED, BLIND, TEXT = "tuned", "untuned", "tuned, without pictures", "text alone"
TITLES = {
    WOULD: "would like this picture, yes or no",
    "which": "which of the two, first or second",
    RANKED: "liked above disliked",
}


@dataclass(frozen=True)
class Closed:
    """A question that two words can answer, about one user's history."""

    user: int
    kind: str
    asked: Conversation

    @property
    def first(self) -> bool:
        """Whether the first of the two answers is the right one."""
        return self.asked.answer == ANSWERS[self.kind][0]


class Blind(Reader):
    """Reads every picture as nothing."""

    def features(self, pictures) -> torch.Tensor:
        return torch.zeros_like(super().features(pictures))


@torch.inference_mode()
def leanings(reader: Reader, questions: list[Closed], batch: int, title: str) -> np.ndarray:
    """How much each question's first answer is likelier than the second, in logits [n]."""
    found = np.empty(len(questions), np.float32)
    # Conversations of a length together: less padding.
    order = sorted(range(len(questions)), key=lambda i: (questions[i].kind, len(questions[i].asked.history.pictures)))
    for start in tqdm(range(0, len(order), batch), desc=title, mininterval=5):
        for kind in ANSWERS:
            some = [i for i in order[start : start + batch] if questions[i].kind == kind]
            if some:
                read = reader.batch([prompt_only(questions[i].asked) for i in some])
                states = reader.forward(read)[1]
                ends = states[torch.arange(len(some), device=states.device), read.last]
                found[some] = reader.leaning(ends, ANSWERS[kind]).cpu().numpy()
    return found


def prompt_only(asked: Conversation) -> Conversation:
    return Conversation(asked.history, asked.question, "", asked.shown)


def text_control(train: list[Closed], test: list[Closed]) -> np.ndarray:
    """+1 where the words alone point to the first answer, -1 to the second, [n]."""
    control = TextOnly()
    for one in train:
        control.learn(words_of(one))
    return np.array([1.0 if control.answer(words_of(one)) == ANSWERS[one.kind][0] else -1.0 for one in test])


def words_of(one: Closed) -> Question:
    """The question as the control sees it."""
    history = one.asked.history
    pictures = tuple(
        Picture("", bool(liked), prompt, frozenset(), False, 0, 0)
        for liked, prompt in zip(history.liked, history.prompts, strict=True)
    )
    return Question(one.kind, one.asked.question, one.asked.answer, pictures, ())


def by_user(questions: list[Closed], leaning: np.ndarray) -> dict[str, dict[int, float]]:
    """{kind: {user: share that is right}}, and for `ranked` the share of the user's pairs in the right order."""
    right, sides = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: ([], []))
    for one, value in zip(questions, leaning.tolist(), strict=True):
        right[one.kind][one.user].append((value > 0) == one.first)
        if one.kind == WOULD:
            sides[one.user][one.first].append(value)
    for user, (disliked, liked) in sides.items():
        if disliked and liked:
            apart = np.subtract.outer(liked, disliked)
            right[RANKED][user] = ((apart > 0) + 0.5 * (apart == 0)).ravel().tolist()
    return {kind: {user: float(np.mean(found)) for user, found in users.items()} for kind, users in right.items()}


def summary(shares: dict[str, dict[str, dict[int, float]]]) -> dict:
    """{reader: {kind: accuracy and interval, and what the tuned one has more}} of {reader: {kind: {user: share}}}."""
    figures = {}
    for name, kinds in shares.items():
        figures[name] = {}
        for kind, users in kinds.items():
            own = np.array([users[user] for user in sorted(users)])
            tuned = np.array([shares[TUNED][kind][user] for user in sorted(users)])
            figures[name][kind] = {"mean": round(float(own.mean()), 4), "ci95": bootstrap(own), "users": len(own)}
            if name != TUNED:
                margin = tuned - own
                figures[name][kind]["tuned_more"] = {
                    "mean": round(float(margin.mean()), 4),
                    "ci95": bootstrap(margin),
                }
    return figures


def page(figures: dict) -> str:
    """The figures as Markdown."""
    kinds = list(figures["readers"][TUNED])
    lines = [
        "# Questions about users that training left out",
        "",
        f"`{figures['command']}`: {figures['users']} users of the test split, "
        + ", ".join(f"{count} questions {TITLES[kind]!r}" for kind, count in figures["questions"].items())
        + f", right answers in balance ({figures['seconds']:.0f} s).",
        "Intervals: 95 %, bootstrap over users; chance is 0.5. In brackets: how much more the tuned one gets right,",
        "paired.",
        "",
        "| reader | " + " | ".join(TITLES[kind] for kind in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, row in figures["readers"].items():
        cells = [_said(row[kind]) + _margin(row[kind]) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _said(entry: dict) -> str:
    return f"{entry['mean']:.3f} ({entry['ci95'][0]:.3f} to {entry['ci95'][1]:.3f})"


def _margin(entry: dict) -> str:
    return f" [+{_said(entry['tuned_more'])}]".replace("+-", "-") if "tuned_more" in entry else ""


def untuned_of(args: SimpleNamespace, world: World) -> Reader:
    """The MLLM before `train_mllm`: without the LoRA; the atelier's with its trained eyes and new words."""
    mllm = args.config.mllm
    if mllm.path is not None:
        return Reader(PreferenceMLLM.load(mllm.path, DTYPES[mllm.precision], default_device(), None, mllm.nf4), world)
    from prefgen.atelier.models import mllm_tokenizer

    # The eyes' tokens are cached, so that only the language model runs.
    untuned = PreferenceMLLM(new_mllm().eval(), mllm_tokenizer(), "atelier untuned", "")
    return Reader(untuned, world, pool_image_tokens(args.runs, world.pool))


def closed(world: World, args, split: str) -> list[Closed]:
    """A split's closed questions. DataError when there are none."""
    questions = Questions(world, args.config.data.questions, split)
    found = [Closed(*one) for one in questions.closed(args.users, args.each, split)]
    if not found:
        raise DataError(
            f"{args.config.data.questions} has no closed question about the {split} split: make a larger set."
        )
    return found


def score(args: SimpleNamespace) -> dict:
    """All figures. DataError or MLLMError with one sentence."""
    started = time.monotonic()
    world = open_world(args.config, args.runs)
    train, test = closed(world, args, TRAIN), closed(world, args, TEST)
    tuned = load_reader(args, world)
    found = {TUNED: leanings(tuned, test, args.batch, TUNED)}
    found[BLIND] = leanings(Blind(tuned.mllm, world, tuned.tokens), test, args.batch, BLIND)
    fingerprint = tuned.fingerprint
    del tuned  # two large MLLMs don't fit at once
    found[UNTUNED] = leanings(untuned_of(args, world), test, args.batch, UNTUNED)
    found[TEXT] = text_control(train, test)
    shares = {name: by_user(test, found[name]) for name in (TUNED, UNTUNED, BLIND, TEXT)}
    return {
        "command": f"python -m training.evaluation.vqa_score {shlex.join(sys.argv[1:])}".rstrip(),
        "mllm": fingerprint,
        "world": world.name,
        "users": len({one.user for one in test}),
        "questions": dict(sorted(Counter(one.kind for one in test).items())),
        "readers": summary(shares),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
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
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = args.runs or Path("runs") / Path(args.config).stem
    try:
        config = load(args.config, args.set)
        figures = score(SimpleNamespace(config=config, runs=runs, users=args.users, each=args.each, batch=args.batch))
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise SystemExit(f"The GPU's memory is full: take less than --batch {args.batch}.") from error
    out = args.out or runs / "vqa"
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "vqa.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomic(out / "vqa.md", page(figures).encode())
    print(page(figures))


if __name__ == "__main__":
    with exit_with_message():
        main()
