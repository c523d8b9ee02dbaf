"""Parts of the second edition after its base models: what is said of a taste, its questions, its teachers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefgen.atelier.world import users
from prefgen.atelier.world.labels import CLASSES
from prefgen.atelier.world.prompts import OPEN, Prompt, random_prompt
from prefgen.atelier.world.subjects import CLASSES as SUBJECT_CLASSES
from prefgen.atelier.world.tastes import avoided_text, disliked_of, enriched_text, filled, liked_of
from prefgen.atelier.world.traits import CONTINUOUS, NAMED
from tests.closeness import assert_close
from training.atelier.tokenizers import write_mllm
from training.atelier.world.tokenizers import QUESTIONS
from training.common.base import Text
from training.data import lessons, world_questions
from training.data.history_shapes import drawn_length, drop_prompts
from training.data.people_world import PeopleWorld, labels_of
from training.data.readers import Conversation
from training.data.worlds import History, Target

PERSON = users.user(3)


def test_a_taste_fills_open_slots_and_leaves_what_a_prompt_names():
    ((kind, favourite),) = PERSON.favourites.items()
    closed = Prompt(kind, next(s for s in SUBJECT_CLASSES[kind] if s != favourite), "one", "garden", "none")
    opened = replace(closed, subject=OPEN)
    assert filled(PERSON, closed) == closed and filled(PERSON, opened).subject == favourite
    assert "subject" not in liked_of(PERSON, PERSON.tastes[0], closed).kinds
    said = liked_of(PERSON, PERSON.tastes[0], opened)
    assert said.kinds["subject"] == favourite and dict(said.values) == dict(PERSON.tastes[0].values)
    ((other, averse),) = PERSON.aversions.items()
    asked = Prompt(other, OPEN, "one", "none", "none")
    assert disliked_of(PERSON, asked).kinds["subject"] == averse
    assert "subject" not in disliked_of(PERSON, closed).kinds
    words = enriched_text(PERSON, PERSON.tastes[0], opened)
    named = [NAMED[trait][kind] for trait, kind in PERSON.tastes[0].named.items()]
    assert words.startswith(filled(PERSON, opened).text) and all(phrase in words for phrase in named)
    assert all(NAMED[trait][kind] in avoided_text(PERSON, closed) for trait, kind in PERSON.avoided.items())


def test_labels_say_what_is_said_and_nothing_else():
    said = liked_of(PERSON, PERSON.tastes[0], Prompt("animal", "cat", "one", "none", "none"))
    labels = labels_of(said)
    names = [*CLASSES, *CONTINUOUS]
    assert {names[i] for i in torch.nonzero(labels.said)[:, 0]} == {*said.kinds, *said.values}
    for name, value in said.values.items():
        assert_close(labels.values[list(CONTINUOUS).index(name)], torch.tensor(CONTINUOUS[name].share(value)))


class Album(PeopleWorld):
    """A user's pictures without a folder."""

    def __init__(self):
        self.attributes = sorted({name for row in SHOWN for name in row})
        self.index = {"attributes": [SimpleNamespace(as_py=lambda row=row: row) for row in SHOWN]}
        self.name = "album"

    def history(self, user, rng, liked, disliked):
        numbers = [*range(min(liked, 3)), *range(3, 3 + min(disliked, 3))]
        return History(np.array(numbers), np.array([n < 3 for n in numbers]), ["a cat"] * len(numbers))

    def others(self, user, rng, history):
        return self.history(user, rng, 3, 3)

    def tastes(self, user):
        return [[0]]

    def dislikes(self, user):
        return [self.attributes.index("fill/flat fill")]


SHOWN = [["palette/neon palette", "subject/owl"]] * 3 + [["fill/flat fill", "subject/teacup"]] * 3


def test_questions_say_what_pictures_show_in_words_that_the_tokenizer_knows(tmp_path):
    from tokenizers import Tokenizer

    from prefgen.atelier.world.prompts import every_word

    write_mllm(tmp_path, [*every_word(), QUESTIONS])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    world = Album()
    rng = np.random.default_rng(0)
    short = world.history(3, rng, 2, 2)
    asked = [
        world_questions.which(world, 3, short, rng, first=True),
        world_questions.which(world, 3, short, rng, first=False),
        world_questions.shared(world, short),
        world_questions.avoid(world, 3, short),
        *(world_questions.favourite(world, 3, short, rng) for _ in range(8)),
    ]
    assert [asked[0].answer, asked[1].answer] == ["first", "second"]
    assert asked[0].shown.tolist() == asked[1].shown.tolist()[::-1] and asked[0].shown[0] < 3 <= asked[0].shown[1]
    assert asked[2].answer == "an owl, neon palette" or asked[2].answer == "neon palette, an owl"
    assert asked[3].answer == "flat fill" and len({one.answer for one in asked[4:]}) == 2
    for one in asked:
        for text in (one.question, one.answer):
            assert "<unk>" not in tokenizer.encode(text).tokens, text


def test_prompts_are_dropped_as_often_as_is_asked_and_lengths_are_short_half_the_time():
    rng = np.random.default_rng(0)
    history = History(np.arange(2), np.array([True, False]), ["a", "b"])
    dropped = drop_prompts([Conversation(history)] * 400, 0.5, rng)
    assert 0.4 < np.mean([not any(one.history.prompts) for one in dropped]) < 0.6
    assert all(len(one.history.prompts) == 2 for one in dropped)
    state = rng.bit_generator.state
    assert drop_prompts([Conversation(history)], 0, rng) and rng.bit_generator.state == state
    lengths = [drawn_length(rng, 12, 0.5) for _ in range(600)]
    assert {*lengths} == set(range(1, 13)) and 0.42 < np.mean(np.array(lengths) <= 3) < 0.58
    assert {drawn_length(rng, 2, 0.0) for _ in range(40)} == {1, 2}


class Guessing:
    """A base whose answer is the mean of its text, so that what it was told shows."""

    device = torch.device("cpu")

    def predict(self, noisy, timesteps, text, sizes=None):
        return text.states.mean((1, 2))[:, None, None, None].expand_as(noisy)


def batch_of(lesson, text):
    zeros = torch.zeros(2, 1, 2, 2)
    ones = torch.ones(2)
    return lessons.Batch(ones[:, None], zeros, zeros, ones.long(), None, text, lesson, ones, ones)


def test_a_teacher_leans_to_what_is_liked_and_away_from_what_is_disliked_and_tells_a_dropped_user_nothing():
    def texts(values):
        return Text(torch.tensor(values)[:, None, None].expand(2, 3, 4).clone())

    lesson = lessons.Lesson(
        texts([5.0, 5.0]), texts([1.0, 1.0]), torch.tensor([False, True]), torch.tensor([0.25, 0.0])
    )
    batch = batch_of(lesson, texts([3.0, 3.0]))
    answer = lessons.answer_of(Guessing(), batch)[:, 0, 0, 0]
    assert_close(answer, torch.tensor([5 + 0.25 * (5 - 1), 3.0]))
    # A micro-batch is taught what the whole batch is.
    parts = [lessons.answer_of(Guessing(), batch.of(np.array([row])))[0, 0, 0, 0] for row in range(2)]
    assert_close(torch.stack(parts), answer)


def test_the_words_teacher_pushes_away_only_what_words_can_say():
    teacher = lessons.WordsTeacher(lambda prompts: prompts, 0.25, torch.device("cpu"))
    targets = [Target(0, "a cat", "a cat, neon palette", "flat fill"), Target(1, "a cat", "a cat, ink outline", "")]
    lesson = teacher.lesson([3, 3], targets, [True, True])
    assert lesson.liked == ["a cat, neon palette", "a cat, ink outline"] and lesson.plain is None
    assert lesson.disliked == ["a cat, flat fill", ""] and lesson.away.tolist() == [0.25, 0.0]
    assert teacher.lesson([3, 3], targets, [False, False]).disliked is None
    assert not teacher.knows(Target(0, "", None)) and not teacher.knows(Target(0, "a cat", None))


def test_every_prompt_of_the_world_is_read_back_from_its_words():
    world = Album()
    for n in range(60):
        prompt = random_prompt(np.random.default_rng(n))
        assert world.prompt_object(prompt.text).text == prompt.text


@pytest.mark.parametrize("pixels", [128])
def test_the_configuration_of_the_world_is_one_of_the_second_edition(pixels, monkeypatch, one_sentence):
    from prefgen.atelier import editions, models
    from training.common.bases import BaseError, load_base
    from training.common.config.command import load

    config = load("world", [f"base.pixels={pixels}"])
    monkeypatch.setattr(models, "edition", lambda: editions.SECOND)
    with pytest.raises(BaseError) as raised:
        load_base(config, without=("unet", "vae"))
    assert "256" in one_sentence(raised)


def test_the_mllms_gate_ends_the_run_in_a_sentence_where_too_few_questions_are_answered(monkeypatch):
    from training import train_mllm
    from training.common.config.command import load

    stops, shares = [], [0.6, 0.9]
    run = SimpleNamespace(step=1, log_figures=lambda **figures: None, stop=stops.append)
    args = SimpleNamespace(stage="train_mllm", section=load("world").train_mllm, config=None)
    monkeypatch.setattr(train_mllm, "share_right", lambda *_: shares.pop(0))
    train_mllm.check_gate(args, run, None)
    assert len(shares) == 2, "before the gate nothing is asked"
    run.step = args.section.gate_step - 1
    train_mllm.check_gate(args, run, None)
    train_mllm.check_gate(args, run, None)
    (sentence,) = stops
    assert "after 2000 steps the MLLM answers 0.60" in sentence and "trains on all the same" in sentence
