"""The picture world: pictures are pure functions, attributes show, users are consistent, splits don't leak."""

import itertools

import numpy as np
import pytest

from prefgen.atelier import captions, users
from prefgen.atelier.attributes import FAMILIES, PROPS, SUBJECTS
from prefgen.atelier.renderer import Scene, attribute_labels, random_scene, render

PLAIN = {family: values[0].name for family, values in FAMILIES.items()}
SOME_USERS = [users.user(number) for number in range(60)]


def test_the_world_is_as_large_as_promised():
    assert len(SUBJECTS) >= 16 and len(FAMILIES) >= 10
    phrases = [a.phrase for values in FAMILIES.values() for a in values]
    assert 45 <= len(phrases) == len(set(phrases))


def test_a_picture_is_a_pure_function_of_its_scene():
    scene = random_scene(np.random.default_rng(5))
    first = render(scene)
    render(random_scene(np.random.default_rng(6)))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, render(scene))


def test_a_larger_picture_shows_the_same_thing():
    for seed in range(8):
        scene = random_scene(np.random.default_rng(seed), fixed={"texture": "clean", "fill": "flat"})
        small = render(scene, 128).astype(float)
        large = render(scene, 256).astype(float).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 12


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pair
        for family, values in FAMILIES.items()
        for pair in itertools.combinations([(family, a.name) for a in values], 2)
    ],
)
def test_every_attribute_shows(one, two):
    pictures = [render(Scene.of("owl", "none", PLAIN | {family: name}, 3)).astype(float) for family, name in (one, two)]
    changed = (np.abs(pictures[0] - pictures[1]).max(2) > 16).mean()
    assert changed > 0.012, f"{one} and {two} differ in {changed:.1%} of the pixels"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "palette"])
@pytest.mark.parametrize("palette", [a.name for a in FAMILIES["palette"]])
def test_no_palette_hides_an_attribute(palette, family):
    look = PLAIN | {"palette": palette}
    pictures = {
        a.name: render(Scene.of("cat", "none", look | {family: a.name}, 3)).astype(float) for a in FAMILIES[family]
    }
    for one, two in itertools.combinations(pictures, 2):
        changed = (np.abs(pictures[one] - pictures[two]).max(2) > 24).mean()
        assert changed > 0.012, f"{one} and {two} differ in {changed:.1%} of the pixels"


@pytest.mark.parametrize("size", [64, 192, 512])
def test_pictures_are_drawn_at_other_sizes(size):
    for shape in ("round", "pixel"):
        scene = Scene.of("owl", "moon", PLAIN | {"shape": shape, "frame": "filmstrip", "texture": "mosaic"}, 2)
        assert render(scene, size).shape == (size, size, 3)


def test_subjects_and_props_differ():
    pictures = [render(Scene.of(subject, "none", PLAIN, 1)).astype(float) for subject in SUBJECTS]
    pictures += [render(Scene.of("cat", prop, PLAIN, 1)).astype(float) for prop in PROPS if prop != "none"]
    for a, b in itertools.combinations(pictures, 2):
        assert (np.abs(a - b).max(2) > 16).mean() > 0.02


def test_labels_name_the_scene():
    scene = Scene.of("cat", "moon", PLAIN | {"palette": "neon", "frame": "circle"}, 0)
    named = {f: FAMILIES[f][i].name for f, i in zip(FAMILIES, attribute_labels(scene), strict=True)}
    assert named == dict(scene.attributes)


def test_prompts_of_training_and_of_evaluation_are_disjoint_and_every_word_is_learnt():
    train, heldout = captions.train_prompts(), captions.heldout_prompts()
    assert len(heldout) == len(SUBJECTS) and not set(train) & set(heldout)
    assert {s for s, _ in train} == set(SUBJECTS)
    assert all(sum(prop == p for _, prop in train) >= 10 for p in PROPS)


def test_an_enriched_prompt_begins_with_the_neutral_one_and_says_each_phrase_once():
    asked = {"palette": "pastel", "line": "thick"}
    text = captions.enriched("boat", "moon", asked, np.random.default_rng(0))
    assert captions.neutral("boat", "moon") == "a sailing boat and a moon"
    assert text.startswith("a sailing boat and a moon, ")
    assert sorted(text.split(", ")[1:]) == sorted(captions.taste_phrases(asked))


def test_the_phrases_of_an_enriched_prompt_stand_in_any_order_where_a_generator_is_given():
    asked = {"palette": "pastel", "line": "thick"}
    orders = {captions.enriched("boat", "moon", asked, np.random.default_rng(seed)) for seed in range(20)}
    fixed = ", ".join(["a sailing boat and a moon", *captions.taste_phrases(asked)])
    assert len(orders) == 2 and fixed in orders and captions.enriched("boat", "moon", asked) == fixed


def test_users_never_like_what_they_dislike_and_some_have_two_tastes():
    for person in SOME_USERS:
        assert 4 <= len(person.disliked) <= 6
        for taste in person.tastes:
            assert 4 <= len(taste.liked) <= 6
            assert not set(taste.liked) & set(person.disliked)
    many = [users.user(number) for number in range(1000)]
    assert 0.15 < np.mean([len(person.tastes) == 2 for person in many]) < 0.25
    assert users.user(7) == users.user(7)


def test_users_are_split_once_and_for_all():
    share = np.mean([users.split(number) == "test" for number in range(4000)])
    assert 0.08 < share < 0.12
    assert all(users.split(number) == "test" for number in users.EXAMPLE_USERS.values())


@pytest.mark.parametrize("person", SOME_USERS[:12])
def test_histories_say_what_the_user_is(person):
    history = users.history(person, 10, 10, seed=4)
    train = set(captions.train_prompts())
    for example in history:
        shown = set(example.scene.attributes)
        assert (example.scene.subject, example.scene.prop) in train
        if example.liked:
            assert not shown & set(person.disliked)
        else:
            assert len(shown & set(person.disliked)) >= 2
    scores = {
        verdict: np.mean([users.alignment(dict(e.scene.attributes), person) for e in history if e.liked is verdict])
        for verdict in (True, False)
    }
    assert scores[True] > 0.5 > 0 > scores[False]


def test_a_longer_history_begins_with_the_shorter_one():
    short, long = (users.history(SOME_USERS[0], n, n, seed=1) for n in (3, 6))
    assert [e for e in long if e.liked][:3] == [e for e in short if e.liked]
    assert [e for e in long if not e.liked][:3] == [e for e in short if not e.liked]


def test_alignment_is_one_for_the_ideal_picture_and_minus_one_for_the_worst():
    for person in SOME_USERS:
        disliked = dict(person.disliked)
        neutral = {
            family: next(
                a.name
                for a in values
                if (family, a.name) not in person.disliked
                and all((family, a.name) not in taste.liked for taste in person.tastes)
            )
            for family, values in FAMILIES.items()
        }
        assert users.alignment(neutral | dict(person.tastes[0].liked), person) == 1.0
        assert users.alignment(neutral, person) == 0.0
        assert users.alignment(neutral | disliked, person) == -1.0
