"""Words of a taste: struck out, added and taken back, beside the pictures and apart from their revision."""

import pytest

from prefgen.mllm.answer import Answer
from prefgen.tastes.names import TasteError
from prefgen.tastes.taste import Taste
from prefgen.tastes.words import Words, keep_understood, understood
from tests.prefgen.tastes.test_taste import picture, state


@pytest.fixture
def taste(tmp_path) -> Taste:
    (tmp_path / "sea").mkdir()
    return Taste(tmp_path / "sea")


def test_a_struck_word_never_counts_and_an_added_one_always_does(taste):
    taste.say("Round Shapes", "liked", "struck")
    taste.say("sea foam", "liked", "added")
    taste.say("sea foam", "disliked", "struck")
    words = Taste(taste.folder).words()
    assert words.applied("liked", ["round shapes", "fog"]) == ("fog", "sea foam")
    assert words.applied("liked", ["fog", "Sea Foam"]) == ("fog", "Sea Foam"), "what is understood isn't said twice"
    assert words.applied("disliked", ["sea foam", "noise"]) == ("noise",)
    assert words.shown() == {
        "liked": {"added": ["sea foam"], "struck": ["Round Shapes"]},
        "disliked": {"added": [], "struck": ["sea foam"]},
    }


def test_words_are_acts_like_any_other_and_leave_the_pictures_revision_alone(taste):
    taste.rate(picture(1), "liked")
    revision = taste.revision()
    digests = [taste.words().digest()]
    for word, now in (("fog", "added"), ("noise", "struck"), ("fog", ""), ("fog", "struck")):
        assert taste.say(word, "liked", now).events
        digests.append(taste.words().digest())
    assert len(set(digests)) == 5 and digests[0] == ""
    assert taste.revision() == revision and not taste.say("FOG", "liked", "struck").events
    for expected in reversed(digests[:-1]):
        taste.undo()
        assert taste.words().digest() == expected
    taste.undo()
    assert not state(taste), "before the words came the picture"
    taste.redo()
    taste.redo()
    assert taste.words().chosen("liked", "added") == ("fog",) and len(state(taste)) == 1


def test_a_word_may_be_as_long_as_the_panel_s_field(taste):
    assert taste.say("x" * 120, "liked", "added").events and taste.words().chosen("liked", "added") == ("x" * 120,)


@pytest.mark.parametrize("word", ["", "   ", ",;", "x" * 121])
def test_what_is_no_word_is_refused(taste, word, one_sentence):
    with pytest.raises(TasteError) as raised:
        taste.say(word, "liked", "added")
    assert "one trait at a time" in one_sentence(raised)
    for side, now in (("adored", "added"), ("liked", "loved")):
        with pytest.raises(TasteError, match="added or struck out"):
            taste.say("fog", side, now)
    assert taste.words() == Words()


def test_a_word_is_one_line_without_the_signs_that_part_words(taste):
    taste.say(" two\nlines, and a comma ", "liked", "added")
    assert taste.words().chosen("liked", "added") == ("two lines and a comma",)


def test_what_was_understood_comes_back_and_what_is_damaged_says_nothing(taste):
    rows = [{"word": "fog", "side": "liked", "sure": 0.5}, {"word": "noise", "side": "disliked", "sure": None}]
    assert understood(taste.folder) == {}
    keep_understood(taste.folder, "1a2b3c4d", rows)
    assert understood(taste.folder) == {"revision": "1a2b3c4d", "words": rows}
    for data in (b"", b"[]", b'{"words": [{}]}', b'{"words": 5, "revision": ""}'):
        (taste.folder / ".words.json").write_bytes(data)
        assert understood(taste.folder) == {}


def test_sureness_is_the_mean_of_the_tokens_that_write_a_phrase():
    tokens = ["likes", " round", " shapes", ",", " fog"]
    answer = Answer.of_tokens(range(5), [0.9, 0.5, 0.5, 1.0, 0.25], lambda part: "".join(tokens[n] for n in part))
    assert answer.text == "likes round shapes, fog"
    assert answer.sureness("round shapes") == pytest.approx(0.5) and answer.sureness("fog") == pytest.approx(0.25)
    assert answer.sureness("boats") is None and Answer("").sureness("") is None
