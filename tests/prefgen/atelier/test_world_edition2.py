"""The second world: pictures are pure functions of scenes, words carry what they should, scores mean 0 and 1."""

import itertools

import numpy as np
import pytest

from prefgen.atelier.world import scores, users
from prefgen.atelier.world.prompts import HELD_OUT_SUBJECTS, OPEN, Prompt, caption, fits, phrases, random_prompt
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import Scene, random_scene
from prefgen.atelier.world.subjects import COMPANIONS, SETTINGS, SUBJECTS
from prefgen.atelier.world.traits import CONTINUOUS, NAMED, NAMELESS, random_traits, visible
from training.atelier import ranking
from training.evaluation.world import drawn

CLEAR = {"palette": "earth", "line": "ink", "fill": "hatched", "shape": "drawn", "background": "plain"}
CLEAR |= {"light": "side", "frame": "none", "ornament": "stars"}
MIDDLE = {name: (trait.low + trait.high) / 2 for name, trait in CONTINUOUS.items()}


def scene(subject="cat", **changes) -> Scene:
    """A scene in which every continuous trait can be seen."""
    named = tuple((CLEAR | {k: v for k, v in changes.items() if k in NAMED})[name] for name in NAMED)
    values = tuple((MIDDLE | {k: v for k, v in changes.items() if k in CONTINUOUS})[name] for name in CONTINUOUS)
    fields = {"number": "one", "setting": "none", "companion": "none"}
    return Scene(subject, named=named, values=values, **fields | {k: changes[k] for k in fields if k in changes})


def people(count: int, part: str | None = None) -> list[users.User]:
    numbers = (n for n in itertools.count() if part in (None, users.split(n)))
    return [users.user(n) for n in itertools.islice(numbers, count)]


def test_a_scene_is_one_picture_whatever_was_drawn_before():
    scenes = [random_scene(np.random.default_rng(n)) for n in range(6)]
    first = [render(each, 64) for each in scenes]
    again = [render(each, 64) for each in reversed(scenes)][::-1]
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert first[0].shape == (64, 64, 3) and first[0].dtype == np.uint8


def test_a_small_picture_is_the_large_one_seen_from_afar():
    for n in range(4):
        each = random_scene(np.random.default_rng([7, n]))
        large = render(each, 256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(large - render(each, 128)).mean() < 12


def test_no_two_subjects_settings_or_companions_look_alike():
    for field, names in (("subject", SUBJECTS), ("setting", SETTINGS), ("companion", COMPANIONS)):
        pictures = [render(scene(**{field: name}), 64).astype(float) for name in names]
        for one, two in itertools.combinations(pictures, 2):
            assert np.abs(one - two).mean() > 0.4, field


@pytest.mark.parametrize("trait", list(NAMED))
def test_every_kind_of_a_named_trait_looks_different(trait):
    pictures = [render(scene(**{trait: kind}), 64).astype(float) for kind in NAMED[trait]]
    assert min(np.abs(one - two).mean() for one, two in itertools.combinations(pictures, 2)) > 0.5


@pytest.mark.parametrize("trait", list(CONTINUOUS))
def test_every_continuous_trait_shows_where_it_is_visible_and_nowhere_else(trait):
    low, high = (CONTINUOUS[trait].low, CONTINUOUS[trait].high)
    ends = (low + 0.1 * (high - low), low + 0.6 * (high - low))
    seen = [render(scene(**{trait: value}), 96).astype(float) for value in ends]
    assert visible(trait, CLEAR, MIDDLE) and np.abs(seen[0] - seen[1]).mean() > 0.5
    hiding = {"line": "none", "fill": "flat", "shape": "faceted", "light": "even", "ornament": "none"}
    hiding |= {"palette": "monochrome"}
    if not visible(trait, CLEAR | hiding, MIDDLE):
        hidden = [render(scene(**hiding, **{trait: value}), 96).astype(float) for value in ends]
        assert np.abs(hidden[0] - hidden[1]).mean() < 0.02


def test_distances_go_the_short_way_around_and_chance_is_their_mean():
    rng = np.random.default_rng(0)
    for trait in CONTINUOUS.values():
        values = rng.uniform(trait.low, trait.high, 4000)
        for centre in (trait.low, (trait.low + trait.high) / 2):
            measured = np.mean([trait.distance(value, centre) for value in values])
            assert measured == pytest.approx(trait.mean_distance(centre), abs=0.02)
    assert CONTINUOUS["light_angle"].distance(1, 359) < 0.02
    assert CONTINUOUS["light_angle"].distance(0, 180) == 1


def test_captions_say_names_and_bins_and_nothing_of_the_traits_without_words():
    for n in range(40):
        each = random_scene(np.random.default_rng([3, n]))
        _, values = random_traits(np.random.default_rng([4, n]))
        other = each.with_traits(values={name: values[name] for name in NAMELESS if name != "wavelength"})
        said = [caption(one, np.random.default_rng(n), keep=1.0) for one in (each, other)]
        assert said[0] == said[1]
    bold, thin = (scene(stroke_width=width) for width in (11.0, 3.0))
    assert phrases(bold)["stroke_width"] == "bold lines" and phrases(thin)["stroke_width"] == "thin lines"
    assert phrases(scene(stroke_width=9.0)) == phrases(scene(stroke_width=11.9))
    assert "stroke_width" not in phrases(scene(stroke_width=11.0, line="none"))


def test_captions_leave_subjects_open_and_phrases_out_as_often_as_they_say():
    said = [caption(scene(), np.random.default_rng(n)) for n in range(1500)]
    assert 0.36 < np.mean(["subject" not in one.names for one in said]) < 0.44
    shares = [np.mean([trait in one.names for one in said]) for trait in phrases(scene())]
    assert len(shares) > 8 and 0.45 < min(shares) and max(shares) < 0.55


def test_prompts_say_what_they_ask_for_and_held_out_ones_are_never_of_training():
    prompt = Prompt("animal", OPEN, "two", "garden", OPEN)
    assert prompt.text == "two animals in a garden and something in the sky"
    assert fits(scene("owl", number="two", setting="garden", companion="moon"), prompt)
    assert not fits(scene("car", number="two", setting="garden", companion="moon"), prompt)
    rng = np.random.default_rng(1)
    for heldout in (False, True):
        assert all(random_prompt(rng, heldout).heldout is heldout for _ in range(50))
    drawn = [random_prompt(rng) for _ in range(1500)]
    for is_open in (lambda p: p.subject == OPEN, lambda p: OPEN in (p.setting, p.companion)):
        assert 0.29 < np.mean([is_open(prompt) for prompt in drawn]) < 0.38, "a third each"


def test_users_are_split_by_number_and_have_about_nine_opinions():
    assert 0.06 < np.mean([users.split(n) == "test" for n in range(2000)]) < 0.14
    counts = [len(p.tastes[0].named) + len(p.tastes[0].values) + len(p.avoided) + 1 + 3 for p in people(200)]
    assert 9 <= np.mean(counts) <= 13
    assert 0.1 < np.mean([len(p.tastes) == 2 for p in people(400)]) < 0.3
    favourites = {name for p in people(400, "train") for name in p.favourites.values()}
    assert not favourites & set(HELD_OUT_SUBJECTS)


def test_a_longer_history_begins_with_the_shorter_one_and_shows_nothing_disliked_among_the_liked():
    for person in people(30):
        history = users.history(person, 4, 3, seed=1)
        assert [e.liked for e in history] == [True] * 4 + [False] * 3
        longer = users.history(person, 6, 6, seed=1)
        assert longer[:4] == history[:4] and longer[6:9] == history[4:]
        assert not any(users.dislikes_in(example.scene, person) for example in history[:4])
        assert all(fits(example.scene, example.prompt) for example in longer)


def test_habits_are_as_frequent_in_disliked_pictures_and_tastes_are_not():
    shown = {(sort, liked): [] for sort in ("habit", "taste") for liked in (True, False)}
    values = {True: [], False: []}
    for person in people(150):
        for example in users.history(person, 4, 4, seed=2):
            kinds = example.scene.kinds
            for sort, taste in (("habit", person.habits), ("taste", person.tastes[0])):
                shown[sort, example.liked] += [kinds[trait] == kind for trait, kind in taste.named.items()]
            numbers = example.scene.numbers
            for name, centre in person.habits.values.items():
                near = CONTINUOUS[name].distance(numbers[name], centre) <= users.TOLERANCE
                values[example.liked].append(near)
    for liked in (True, False):
        # A habit is shown in 4 of 5 pictures, and by chance in some of the others.
        assert 0.7 < np.mean(values[liked]) < 0.95 and len(values[liked]) > 200
    share = {key: np.mean(rows) for key, rows in shown.items()}
    assert abs(share["habit", True] - share["habit", False]) < 0.07 and share["habit", True] > 0.7
    assert share["taste", True] - share["taste", False] > 0.3


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_wrong_value_is_far_from_the_liked_one(name):
    rng = np.random.default_rng(5)
    trait = CONTINUOUS[name]
    for centre in rng.uniform(trait.low, trait.high, 20):
        distances = [trait.distance(users.away(rng, name, centre), centre) for _ in range(60)]
        assert 0.35 <= min(distances) < 0.42


def test_users_differ_as_often_as_they_are_meant_to():
    drawn = people(3000)
    assert 0.17 < np.mean([len(person.tastes) == 2 for person in drawn]) < 0.23
    assert 0.47 < np.mean([bool(person.habits.named or person.habits.values) for person in drawn]) < 0.53
    assert 0.30 < np.mean([person.few_likes for person in drawn]) < 0.37
    widths = [
        (high - low) / (CONTINUOUS[name].high - CONTINUOUS[name].low) for name, low, high in (p.band for p in drawn)
    ]
    assert np.allclose(widths, 0.3)


def test_a_picture_without_preference_scores_nothing_and_a_perfect_one_everything():
    columns = {"named": [], "continuous": [], "semantic": [], "all": []}
    for person in people(300):
        rng = np.random.default_rng([8, person.id])
        for _ in range(6):
            prompt = random_prompt(rng)
            score = scores.alignment(users.asked_scene(None, prompt, rng), person, prompt)
            for column, values in columns.items():
                values.append(getattr(score, column))
    one_taste = {name: np.mean([v for v in values if v is not None]) for name, values in columns.items()}
    # Users with two tastes are scored by the one that fits best: a little above chance.
    assert all(abs(mean) < 0.1 for mean in one_taste.values()), one_taste
    person = next(p for p in people(50) if len(p.tastes) == 1)
    prompt = Prompt(next(iter(person.favourites)), OPEN, "one", "none", "none")
    perfect = drawn.render_oracle(person, prompt, np.random.default_rng(0))
    perfect = perfect.with_traits(subject=person.favourites[prompt.kind])
    score = scores.alignment(perfect, person, prompt)
    assert score.named == pytest.approx(1) and score.semantic == pytest.approx(1) and score.all > 0.85


def test_the_judges_error_is_taken_off_before_a_value_is_scored():
    off = scene(tilt=5.0)
    assert scores.liked_value(off, "tilt", 0.0) < 1 == scores.liked_value(off, "tilt", 0.0, error=0.11)
    assert scores.liked_value(scene(fill="flat"), "hatch_angle", 90.0) == 0


def test_opinions_that_the_judge_cannot_read_are_not_scored():
    """Taken off every distance, an error as large as chance would make any picture perfect."""
    person = next(p for p in people(300) if "roundness" in p.tastes[0].values and len(p.tastes) == 1)
    prompt = Prompt("animal", "cat", "one", "none", "none")
    far = (CONTINUOUS["roundness"].share(person.tastes[0].values["roundness"]) + 0.5) % 1
    picture = drawn.render_oracle(person, prompt, np.random.default_rng(0)).with_traits(values={"roundness": far})
    others = {name: 0.02 for name in CONTINUOUS}
    blindfold = others | {"roundness": 0.25}
    assert scores.unread(others) == []
    read = scores.alignment(picture, person, prompt, others)
    blind = scores.alignment(picture, person, prompt, blindfold)
    assert scores.unread(blindfold | {"hatch_angle": 0.24}) == ["roundness"]
    # What is left is perfect, whatever the corners are like.
    assert read.continuous < 0.9 and blind.continuous > 0.99 and blind.named == read.named
    assert scores.alignment(picture.with_traits(values={"roundness": 0.0}), person, prompt, blindfold) == blind


def test_specificity_is_one_without_preference_and_nothing_for_a_copy():
    none, cloner = (np.array([0.8, 0.4, 0.5]), np.array([0.4, 0.38, 0.1]))
    assert scores.specificity(none, none, cloner) == 1 and scores.specificity(cloner, none, cloner) == 0
    assert scores.specificity((none + cloner) / 2, none, cloner) == pytest.approx(0.5)
    assert scores.specificity(none + 1, none, cloner) == 1 and scores.specificity(none, none, none) is None
    assert scores.harmonic(0.6, 0.6) == pytest.approx(0.6) and scores.harmonic(-0.2, 1) == 0 == scores.harmonic(0, 0)


def test_in_this_world_copying_and_pooling_lose_and_words_do_not_say_all():
    crowd = [person for person in people(120, "test") if person.habits.named][:25]
    result = ranking.summary(ranking.measure(crowd, (8, 8), seed=0))
    one_number = {row: figures["harmonic"] for row, figures in result.items()}
    both, liked = (one_number[f"ideal observer of {what}"] for what in ("both", "the liked alone"))
    assert result["cloner"]["all"] > 0.6 and one_number["cloner"] == 0
    assert one_number["render-oracle"] > 0.9 > both > liked + 0.05
    assert result["words-oracle"]["continuous"] < 0.4 < result["ideal observer of both"]["continuous"]
    assert one_number["ideal observer of both, in words"] < both
    assert "| render-oracle |" in ranking.table(result)


def test_the_ranking_is_a_command_that_leaves_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ranking", "--users", "4", "--out", str(tmp_path / "new" / "ranking.json")])
    ranking.main()
    assert "as users have them, 4 users" in capsys.readouterr().out
    assert (tmp_path / "new" / "ranking.json").stat().st_size > 500
