"""What the MLLM is asked while it learns, and its answers, against the users' own attributes."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from prefgen.atelier import captions
from prefgen.atelier import users as people_of
from prefgen.atelier.attributes import FAMILIES
from prefgen.mllm.prompt import AVOID_QUESTION, CLOSING_QUESTION
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.atelier_users import FAMILY_INDEX, NAME_INDEX
from training.data.errors import DataError
from training.data.preference_questions import WOULD, Questions, closing, taste_answer, would
from training.data.vqa import make as command
from training.data.vqa.control import TextOnly, beats_chance
from training.data.vqa.questions import ANSWERS, Picture, Question
from training.data.worlds import AtelierWorld, DataSetWorld, World

POOL = 3000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The atelier's users over a pool of which only the labels matter here."""
    runs = tmp_path_factory.mktemp("questions")
    folder = runs / "atelier.pool"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sizes = [len(values) for values in FAMILIES.values()]
    labels = np.stack([rng.integers(n, size=POOL) for n in (8, 4, *sizes)], 1).astype(np.int8)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "pictures.npy", np.zeros((POOL, 1, 1, 3), np.uint8))
    (folder / "done").write_text("{}")
    return AtelierWorld(runs)


def said(family, name):
    return captions.taste_phrases({family: name})[0]


def shown(world, picture):
    """The (family, name) pairs that a picture of the pool shows."""
    row = world.pool.labels[picture, 2:]
    return {(family, name) for (family, name), number in NAME_INDEX.items() if row[FAMILY_INDEX[family]] == number}


def asked_of(world, count, kind):
    """(user's person, question) of many questions of one kind that `ask` deals."""
    questions, pairs = Questions(world, None), []
    for user in world.users("train", count):
        for number in range(6):
            one = questions.ask(user, np.random.default_rng([user, number]), 3, 3)
            if one.question.startswith(kind):
                pairs.append((people_of.user(user), one))
    return pairs


def test_a_family_question_is_answered_by_what_the_user_likes_there(world):
    answers = Counter()
    for person, one in asked_of(world, 60, "Which "):
        family = one.question.removeprefix("Which ").removesuffix(" does this user like ?")
        assert family in FAMILIES
        liked = [said(family, dict(taste.liked)[family]) for taste in person.tastes if family in dict(taste.liked)]
        assert one.answer.split(" or ") == (list(dict.fromkeys(liked)) or ["nothing in particular"])
        answers[min(len(set(liked)), 2)] += 1
    # Four to six of ten families in a taste, one user in five has two tastes: every kind of answer comes up.
    assert answers[0] > 20 and answers[1] > 20 and answers[2] > 0


def test_what_is_avoided_is_all_that_the_user_dislikes(world):
    asked = asked_of(world, 40, AVOID_QUESTION)
    assert len(asked) > 40
    for person, one in asked:
        assert one.answer.split(", ") == [said(*pair) for pair in person.disliked]


def test_the_whole_taste_names_every_taste_and_what_is_avoided(world):
    for user in world.users("train", 30):
        person = people_of.user(user)
        liked, avoided = taste_answer(world, user).removeprefix("likes ").split(" ; avoids ")
        assert liked.split(" or ") == [", ".join(said(*pair) for pair in taste.liked) for taste in person.tastes]
        assert avoided.split(", ") == [said(*pair) for pair in person.disliked]
    one = closing(world, user, np.random.default_rng(0), 4, 2)
    assert (one.question, one.answer) == (CLOSING_QUESTION, taste_answer(world, user))
    assert one.history.liked.sum() == 4 and len(one.history.liked) == 6
    unknown = SimpleNamespace(tastes=lambda user: [])
    assert taste_answer(unknown, 0) == ""


def test_a_shown_picture_is_new_and_fits_its_answer(world):
    answers = Counter()
    for person, one in asked_of(world, 60, WOULD):
        (picture,) = one.shown
        assert picture not in one.history.pictures
        disliked = len(shown(world, picture) & set(person.disliked))
        assert disliked == 0 if one.answer == "yes" else disliked >= 2
        answers[one.answer] += 1
    assert set(answers) == {"yes", "no"} and min(answers.values()) > 0.35 * sum(answers.values())


def test_the_kinds_come_equally_often(world):
    questions = Questions(world, None)
    starts = Counter(
        questions.ask(user, np.random.default_rng([user, n]), 2, 2).question.split()[0]
        for user in world.users("train", 40)
        for n in range(6)
    )
    assert len(starts) == 3 and min(starts.values()) > 240 / 3 * 0.7


def test_closed_questions_of_the_atelier_take_turns_and_come_again_the_same(world):
    questions = Questions(world, None)
    asked = list(questions.closed(12, 4, "test"))
    assert [user for user, _, _ in asked] == [u for u in world.users("test", 12) for _ in range(4)]
    assert {kind for _, kind, _ in asked} == {"would"}
    for user in world.users("test", 12):
        own = [one.answer for owner, _, one in asked if owner == user]
        assert own in (["yes", "no"] * 2, ["no", "yes"] * 2)
    firsts = [asked[i][2].answer for i in range(0, 48, 4)]
    assert len(set(firsts)) == 2, "not every user begins with the same answer"
    for user, _, one in asked:
        sides = one.history.liked.sum(), (~one.history.liked).sum()
        assert all(2 <= n <= 8 for n in sides)
        disliked = len(shown(world, one.shown[0]) & set(people_of.user(user).disliked))
        assert disliked == 0 if one.answer == "yes" else disliked >= 2
    again = list(questions.closed(12, 4, "test"))
    assert all(np.array_equal(a[2].shown, b[2].shown) for a, b in zip(asked, again, strict=True))
    assert len({one.shown[0] for _, _, one in asked}) > 40


@pytest.fixture(scope="module")
def agents_and_questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    make(Population(60, 1180, 3, 16, Atelier(16), None), folder / "agents", processes=1)
    command.make(folder / "agents", folder / "questions", 10, seed=0)
    return folder


def rows_of(agents_and_questions, split):
    import pyarrow.parquet as pq

    return pq.read_table(agents_and_questions / f"questions/{split}.parquet").to_pylist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_closed_questions_of_a_data_set_are_its_own_that_two_words_answer(agents_and_questions, split):
    world = DataSetWorld(agents_and_questions / "agents")
    questions = Questions(world, agents_and_questions / "questions", split)
    rows = [row for row in rows_of(agents_and_questions, split) if row["kind"] in ANSWERS]
    asked = list(questions.closed(0, 99, split))
    assert Counter(user for user, _, _ in asked) == Counter(row["user"] for row in rows)
    assert {kind for _, kind, _ in asked} == {"would", "which"}
    for _, kind, one in asked:
        assert one.answer in ANSWERS[kind] and len(one.shown) == {"would": 1, "which": 2}[kind]
        liked = {"yes": [True], "no": [False], "first": [True, False], "second": [False, True]}
        assert world.is_liked[one.shown].tolist() == liked[one.answer]
        assert world.is_liked[one.history.pictures].tolist() == one.history.liked.tolist()
        assert [world.prompt(p) for p in one.history.pictures] == one.history.prompts
        assert not set(one.shown) & set(one.history.pictures)
    two = list(questions.closed(2, 99, split))
    assert (
        sorted({user for user, _, _ in two})
        == sorted({row["user"] for row in rows_of(agents_and_questions, split)})[:2]
    )


def test_a_users_own_questions_are_asked_and_others_where_there_are_none(agents_and_questions):
    world = DataSetWorld(agents_and_questions / "agents")
    questions, rows = Questions(world, agents_and_questions / "questions"), rows_of(agents_and_questions, "train")
    user = rows[0]["user"]
    own = {(row["question"], row["answer"]) for row in rows if row["user"] == user}
    asked = [questions.ask(user, np.random.default_rng(n), 9, 9) for n in range(40)]
    assert {(one.question, one.answer) for one in asked} <= own and len({one.question for one in asked}) > 2
    stranger = max(row["user"] for row in rows) + 1
    others = [questions.ask(stranger, np.random.default_rng(n), 9, 9) for n in range(40)]
    assert len({tuple(one.history.pictures) for one in others}) > 20


@pytest.mark.parametrize("kind", ["would", "which"])
def test_the_report_says_how_often_the_text_alone_was_right(agents_and_questions, kind):
    report = json.loads((agents_and_questions / "questions/report.json").read_text())["text_only"][kind]
    control = TextOnly()
    splits = {
        split: [row for row in rows_of(agents_and_questions, split) if row["kind"] == kind]
        for split in ("train", "test")
    }
    world = DataSetWorld(agents_and_questions / "agents")
    places = zip(world.index["shard"].to_pylist(), world.index["row"].to_pylist(), strict=True)
    prompts = {place: world.prompt(picture) for picture, place in enumerate(places)}

    def question(row):
        history = [
            Picture("", p["liked"], prompts[p["shard"], p["row"]], frozenset(), False, 0, 0) for p in row["history"]
        ]
        return Question(row["kind"], row["question"], row["answer"], tuple(history), ())

    for row in splits["train"]:
        control.learn(question(row))
    right = sum(control.answer(question(row)) == row["answer"] for row in splits["test"])
    asked = len(splits["test"])
    assert report == {"right": right, "asked": asked, "gives_away": beats_chance(right, asked)} and asked > 5


def test_questions_that_are_missing_or_of_another_set_are_named(agents_and_questions, tmp_path):
    world = DataSetWorld(agents_and_questions / "agents")
    with pytest.raises(DataError, match="data.questions is missing"):
        Questions(world, None)
    with pytest.raises(DataError, match="holds no questions"):
        Questions(world, tmp_path)
    other = tmp_path / "agents"
    shutil.copytree(agents_and_questions / "agents", other)
    (other / "manifest.json").write_bytes((agents_and_questions / "agents/manifest.json").read_bytes() + b"\n")
    with pytest.raises(DataError, match="made of another set"):
        Questions(DataSetWorld(other), agents_and_questions / "questions")


class Few:
    """A world whose users have so many liked and disliked pictures and no more."""

    def __init__(self, liked, disliked):
        self.liked, self.disliked = liked, disliked

    def history(self, user, rng, liked, disliked):
        pictures = [*self.liked[:liked], *self.disliked[:disliked]]
        verdicts = np.array([picture in self.liked for picture in pictures])
        return SimpleNamespace(pictures=np.array(pictures), liked=verdicts)

    others = World.others


def test_a_new_picture_is_asked_about_where_there_is_one():
    history = SimpleNamespace(pictures=np.array([1, 2, 11]), liked=np.array([True, True, False]))
    rng = np.random.default_rng(0)
    assert would(Few([1, 2, 3], [11, 12]), 0, history, rng, True).shown.tolist() == [3]
    assert would(Few([1, 2, 3], [11, 12]), 0, history, rng, False).shown.tolist() == [12]
    # Else about one of the history, of that verdict.
    assert would(Few([1, 2], [11]), 0, history, rng, False).shown.tolist() == [11]
