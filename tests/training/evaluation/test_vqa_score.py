"""Scoring of closed questions: readers that know everything, its opposite, nothing; and a real one, asked by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefgen.mllm.model import PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder
from tests.training.data.test_readers import World
from training.data.readers import Conversation, Reader
from training.data.vqa.questions import ANSWERS
from training.data.worlds import History
from training.evaluation import vqa_score as score
from training.evaluation.vqa_score import Closed

USERS, EACH = 50, 8
WORDS = {"would": "Would this user like this picture?", "which": "Which of these two would this user like?"}


def question(user, number, rng, kind=None, prompts=None):
    """One question; answers are in balance over a user's questions of a kind."""
    kind = kind or ("would", "which")[number % 2]
    size = int(rng.integers(2, 6))
    history = History(rng.integers(0, 7, size), rng.random(size) < 0.5, prompts or [""] * size)
    shown = rng.integers(0, 7, {"would": 1, "which": 2}[kind])
    return Closed(user, kind, Conversation(history, WORDS[kind], ANSWERS[kind][number // 2 % 2], shown))


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    return [question(user, number, rng) for user in range(USERS) for number in range(EACH)]


class Playing:
    """A reader whose leaning towards the first answer is a function of the question."""

    def __init__(self, questions, lean):
        self.lean, self.sizes = lean, []
        self.questions = {id(one.conversation.history): one for one in questions}

    def batch(self, asked):
        assert all(one.answer == "" for one in asked), "the answer must not be read"
        self.sizes.append(len(asked))
        values = [self.lean(self.questions[id(one.history)]) for one in asked]
        # Conversations end at different places; elsewhere nothing is said.
        states = torch.full((len(asked), 5, 2), float("nan"))
        last = torch.tensor([i % 5 for i in range(len(asked))])
        for row, (place, value) in enumerate(zip(last, values, strict=True)):
            states[row, place] = torch.tensor([value, -value])
        return SimpleNamespace(last=last, states=states)

    def forward(self, batch):
        return None, batch.states

    def leaning(self, states, answers):
        assert answers in ANSWERS.values()
        return states[:, 0] - states[:, 1]


def shares_of(questions, lean, batch=16):
    reader = Playing(questions, lean)
    shares = score.by_user(questions, score.leanings(reader, questions, batch, "test"))
    assert sum(reader.sizes) == len(questions) and max(reader.sizes) <= batch
    return shares


def test_a_perfect_reader_has_everything_right_and_an_inverted_one_nothing(questions):
    for sign, share in ((1.0, 1.0), (-1.0, 0.0)):
        shares = shares_of(questions, lambda one, sign=sign: sign if one.first else -sign)
        assert set(shares) == {"would", "which", "ranked"}
        for kind in shares.values():
            assert kind == dict.fromkeys(range(USERS), share)


def test_a_reader_that_always_says_the_same_is_at_chance(questions):
    for value in (3.0, -3.0):
        shares = shares_of(questions, lambda one, value=value: value)
        for kind in ("would", "which", "ranked"):
            assert shares[kind] == dict.fromkeys(range(USERS), 0.5)


def test_a_guessing_reader_is_at_chance_within_its_interval(questions):
    rng = np.random.default_rng(5)
    figures = score.summary({score.TUNED: shares_of(questions, lambda one: float(rng.normal()))})[score.TUNED]
    for kind in ("would", "which", "ranked"):
        low, high = figures[kind]["ci95"]
        assert low < 0.5 < high and abs(figures[kind]["mean"] - 0.5) < 0.12 and figures[kind]["users"] == USERS


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_shares_are_those_counted_by_hand_whatever_the_batch(questions, batch):
    rng = np.random.default_rng(6)
    lean = {id(one): float(np.float32(round(rng.normal(), 1))) for one in questions}  # rounded: there are ties
    shares = shares_of(questions, lambda one: lean[id(one)], batch)
    for user in range(USERS):
        own = [one for one in questions if one.user == user]
        for kind in ("would", "which"):
            right = []
            for one in (one for one in own if one.kind == kind):
                said = ANSWERS[kind][0] if lean[id(one)] > 0 else ANSWERS[kind][1]
                right.append(said == one.conversation.answer)
            assert shares[kind][user] == pytest.approx(sum(right) / len(right))
        yes = [lean[id(one)] for one in own if one.kind == "would" and one.conversation.answer == "yes"]
        no = [lean[id(one)] for one in own if one.kind == "would" and one.conversation.answer == "no"]
        pairs = [1.0 if y > n else 0.5 if y == n else 0.0 for y in yes for n in no]
        assert shares["ranked"][user] == pytest.approx(sum(pairs) / len(pairs))


def test_a_user_with_one_answer_alone_has_no_pairs():
    rng = np.random.default_rng(1)
    one_sided = [question(0, number, rng, "would") for number in (0, 1)]
    assert {one.conversation.answer for one in one_sided} == {"yes"}
    assert set(shares_of(one_sided, lambda one: 1.0)) == {"would"}


def test_the_margin_is_what_the_tuned_one_has_more_user_by_user():
    rng = np.random.default_rng(2)
    tuned, other = ({"would": dict(enumerate(rng.integers(0, 5, 30) / 4))} for _ in range(2))
    figures = score.summary({score.TUNED: tuned, score.BLIND: other})
    margin = np.array([tuned["would"][u] - other["would"][u] for u in range(30)])
    entry = figures[score.BLIND]["would"]
    assert entry["tuned_more"]["mean"] == pytest.approx(margin.mean(), abs=5e-5)
    low, high = entry["tuned_more"]["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * margin.std() / 30**0.5, rel=0.1) and low < margin.mean() < high
    assert "tuned_more" not in figures[score.TUNED]["would"]
    assert entry["mean"] == pytest.approx(np.mean(list(other["would"].values())), abs=5e-5)

    page = score.page({"command": "cmd", "users": 30, "questions": {"would": 120}, "seconds": 7.2, "readers": figures})
    assert "`cmd`: 30 users" in page and "(7 s)" in page
    assert "120 questions 'would like this picture, yes or no'" in page
    line = next(line for line in page.splitlines() if line.startswith("| tuned, without"))
    sign = "+" if entry["tuned_more"]["mean"] >= 0 else "-"
    shown = f"[{sign}{abs(entry['tuned_more']['mean']):.3f} ({low:.3f} to {high:.3f})]"
    assert f"{entry['mean']:.3f} ({entry['ci95'][0]:.3f} to {entry['ci95'][1]:.3f}) {shown}" in line


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return PreferenceMLLM.load(write_folder(tmp_path_factory.mktemp("mllm"), "SmolVLM2"))


def test_a_real_reader_leans_as_each_conversation_by_itself(mllm):
    rng = np.random.default_rng(3)
    asked = [question(user, number, rng, "would", None) for user in range(3) for number in range(3)]
    reader = Reader(mllm, World())
    actual = score.leanings(reader, asked, 4, "test")
    yes, no = (mllm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ANSWERS["would"])
    expected = []
    with torch.inference_mode():
        for one in asked:
            batch = reader.batch(
                [Conversation(one.conversation.history, one.conversation.question, "", one.conversation.shown)]
            )
            hidden = mllm.family.text(**batch.inputs).last_hidden_state[0, -1]
            logits = mllm.model.get_output_embeddings()(hidden)
            expected.append(float(logits[yes] - logits[no]))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    assert np.std(actual) > 0.01


def test_a_blind_reader_sees_the_same_in_every_picture(mllm):
    rng = np.random.default_rng(4)
    one = question(0, 0, rng, "would")
    other = Closed(
        0,
        "would",
        Conversation(
            one.conversation.history, one.conversation.question, one.conversation.answer, one.conversation.shown + 1
        ),
    )
    blind, seeing = (kind(mllm, World()) for kind in (score.Blind, Reader))
    same = score.leanings(blind, [one, other], 2, "test")
    assert same[0] == pytest.approx(same[1], abs=1e-5)
    different = score.leanings(seeing, [one, other], 2, "test")
    assert abs(different[0] - different[1]) > 1e-3


@pytest.mark.parametrize("leak", [True, False])
def test_the_text_control_is_right_where_words_give_answers_away_and_at_chance_elsewhere(leak):
    rng = np.random.default_rng(7)

    def asked(user, number):
        one = question(user, number, rng, "would")
        word = one.conversation.answer if leak else "boat"
        history = History(
            one.conversation.history.pictures,
            one.conversation.history.liked,
            [word] * len(one.conversation.history.pictures),
        )
        return Closed(
            user,
            "would",
            Conversation(history, one.conversation.question, one.conversation.answer, one.conversation.shown),
        )

    train, test = ([asked(u, n) for u in range(*ids) for n in range(8)] for ids in ((0, 30), (30, 60)))
    leaning = score.text_control(train, test)
    assert set(leaning) <= {1.0, -1.0}
    share = np.mean([(value > 0) == one.first for value, one in zip(leaning, test, strict=True)])
    assert share == 1 if leak else 0.35 < share < 0.65
