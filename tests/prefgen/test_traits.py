"""From an MLLM's answers to the two prompts of an artist."""

import json

import pytest

from prefgen.mllm.traits import Traits, split

TRAINED = "likes ocean palette, gradient fill or no outline ; avoids halftone fill, clean surface"


def test_the_answer_of_a_preference_mllm_is_two_lists():
    traits = Traits.of_answers(TRAINED)
    assert traits.liked == ("ocean palette", "gradient fill", "no outline")
    assert traits.disliked == ("halftone fill", "clean surface")
    assert traits.positive == "ocean palette, gradient fill, no outline"
    assert traits.negative == "halftone fill, clean surface"
    assert json.loads(traits.to_json()) == {"liked": [*traits.liked], "disliked": [*traits.disliked]}


@pytest.mark.parametrize(
    ("like", "avoid", "liked", "disliked"),
    [
        ("This user likes soft light, pastel colours.", "", ("soft light", "pastel colours"), ()),
        ("The user likes boats. They avoid noise.", "", ("boats",), ("noise",)),
        (
            "Soft light and pastel colours",
            "They avoid harsh shadows.",
            ("Soft light and pastel colours",),
            ("harsh shadows",),
        ),
        ("- soft light\n- boats", "- noise", ("soft light", "boats"), ("noise",)),
        ("Likes: boats; Dislikes: noise", "", ("boats",), ("noise",)),
        ("likes boats, boats ; avoids boats, noise", "", ("boats",), ("noise",)),
        ("", "", (), ()),
    ],
)
def test_an_mllm_with_words_of_its_own_is_understood(like, avoid, liked, disliked):
    traits = Traits.of_answers(like, avoid)
    assert (traits.liked, traits.disliked) == (liked, disliked)


def test_words_that_hold_or_stay_whole():
    assert split("coral colours, decor, ornament") == ("coral colours", "decor", "ornament")


def test_typed_traits_take_the_place_of_a_side_and_the_mllm_is_asked_only_for_the_other():
    read = Traits.of_answers(TRAINED)
    assert Traits.typed("boats", "").or_else(lambda: read) == Traits(("boats",), read.disliked)
    assert Traits.typed("", "noise").or_else(lambda: read) == Traits(read.liked, ("noise",))
    assert Traits.typed("", "").or_else(lambda: read) == read
    assert Traits.typed("boats", "noise").or_else(lambda: pytest.fail("asked")) == Traits(("boats",), ("noise",))


def test_an_mllm_that_stutters_says_nothing():
    """The atelier's MLLM, given prompts that it was tuned without: 300 words in place of a trait."""
    traits = Traits.of_answers("likes " + "no frame " * 60 + ", flat fill ; avoids " + "yes " * 90)
    assert traits.liked == ("flat fill",) and traits.disliked == ()
    assert Traits.typed("a" * 300, "").liked == ("a" * 300,), "what an artist types is theirs"
