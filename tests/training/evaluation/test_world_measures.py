"""The second edition's measures: what they say of rows whose truth is known."""

import numpy as np
import pytest

from prefgen.atelier.world import scores
from prefgen.atelier.world.prompts import Prompt
from training.evaluation.world import drawn, page, requests
from training.evaluation.world.figures import Table
from training.evaluation.world.measures import Bootstrap, contrast, holm, score
from training.evaluation.world.rows import IDEAS, PRIMARY, ROWS

PEOPLE = requests.reported_users(12)
PROMPTS = requests.heldout_prompts(8)
ASKED = requests.requests_of(len(PEOPLE), len(PROMPTS), 4)
HISTORIES = [requests.history_of(person, 3) for person in PEOPLE]


def scored(paint):
    """A row that paints scenes, scored as the judges' readings of its pictures would be."""
    from prefgen.atelier.world import users

    scenes = []
    for request in ASKED:
        rng = np.random.default_rng([5, request.number])
        person, prompt = PEOPLE[request.user], PROMPTS[request.prompt]
        scenes.append(
            {
                "none": lambda r=rng, p=prompt: users.asked_scene(None, p, r),
                "cloner": lambda r=rng, p=prompt, u=request.user: drawn.cloner(HISTORIES[u], p, r),
                "oracle": lambda r=rng, p=prompt, who=person: drawn.render_oracle(who, p, r),
            }[paint]()
        )
    return score(scenes, ASKED, PEOPLE, PROMPTS, HISTORIES, {})


@pytest.fixture(scope="module")
def rows():
    return {name: scored(name) for name in ("none", "cloner", "oracle")}


def test_the_one_number_is_formed_in_every_draw_and_only_the_oracle_wins(rows):
    draws = Bootstrap(ASKED, rows["none"], rows["cloner"], draws=200)
    harmonic = {name: draws.harmonic([row]) for name, row in rows.items()}
    assert harmonic["oracle"][0] > 0.9 and harmonic["none"][0] < 0.3 and harmonic["cloner"][0] == 0
    # What was measured is what the scores of users and their pictures say.
    own = draws.part([rows["oracle"]], "all")
    assert own[0] == pytest.approx(np.nanmean(rows["oracle"].parts["all"]))
    specific = draws.specificity([rows["none"]])
    assert specific[0] == pytest.approx(1.0)
    one, two = own[7], draws.specificity([rows["oracle"]])[7]
    assert harmonic["oracle"][7] == pytest.approx(scores.harmonic(one, two))
    difference = contrast(harmonic["oracle"] - harmonic["cloner"])
    assert difference["ci95"][0] > 0.5 and difference["p"] == pytest.approx(2 / 200)
    same = contrast(harmonic["oracle"] - harmonic["oracle"])
    assert same["mean"] == 0 and same["p"] == 1.0


def test_p_is_twice_the_share_of_draws_on_the_other_side():
    draws = np.array([0.3, *[0.5] * 95, *[-0.01] * 5])
    assert contrast(draws)["p"] == pytest.approx(0.1) and contrast(draws)["mean"] == 0.3
    assert contrast(-draws)["p"] == pytest.approx(0.1)
    # Draws of nothing count on both sides; none on the other side is told as fewer than there are draws.
    assert contrast(np.zeros(101))["p"] == 1.0 and contrast(np.full(101, 0.2))["p"] == pytest.approx(0.02)


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    corrected = holm({"a": {"p": 0.01}, "b": {"p": 0.04}, "c": {"p": 0.03}})
    assert [corrected[name]["p_holm"] for name in "abc"] == pytest.approx([0.03, 0.06, 0.06])


def test_users_and_prompts_are_those_that_were_fixed():
    assert all(person.id >= requests.FIRST_REPORTED for person in PEOPLE)
    assert all(person.id < requests.FIRST_REPORTED for person in requests.choosing_users(5))
    every = requests.heldout_prompts()
    assert len(every) == len(set(every)) == 24 and all(prompt.heldout for prompt in every)
    assert [requests.manner(prompt) for prompt in every].count(1) == 8
    counts = np.bincount([request.prompt for request in requests.requests_of(144, 24)])
    assert counts.tolist() == [24] * 24
    partners = requests.partners_of(PEOPLE, 0)
    assert len(set(partners)) == 3 and 0 not in partners
    chosen = [requests.partners_of(PEOPLE, user) for user in range(len(PEOPLE))]
    themselves = [[user] for user in range(len(PEOPLE))]
    assert abs(requests.expected_overlap(PEOPLE, chosen)) < 0.25 < requests.expected_overlap(PEOPLE, themselves)
    assert all(line.row in ROWS for line in (*PRIMARY, *IDEAS))


def test_words_fill_the_slots_that_they_fit():
    prompt = Prompt("animal", "", "one", "", "none")
    text, look = requests.with_words(prompt, ["an owl", "neon palette", "in a garden", "a car", "a moon"])
    assert text == "an owl in a garden" and look == ["neon palette"]
    assert requests.negative_words(prompt, ["a cat", "a car", "flat fill"]) == "a cat, flat fill"


def test_a_table_says_what_reaches_its_line(rows):
    reading = {
        "features": [0.0, 1.0],
        "sharpness": 0.3,
        "render_back": 0.1,
        "subjects": {"a": "cat", "b": "cat"},
    }
    rng = np.random.default_rng(0)
    seen = [[reading | {"features": rng.normal(size=2).tolist()} for _ in ASKED]]
    names = {"none": "none", "cloner": "cloner", "render_oracle": "oracle", "prefgen": "oracle", "no_core": "none"}
    names |= {"mismatched": "none", "blind": "oracle"}
    table = Table(PEOPLE, PROMPTS, ASKED, dict.fromkeys(names, seen), {n: [rows[own]] for n, own in names.items()})
    figures = table.figures(8)
    assert figures["primary"]["cloner"]["reached"] and set(figures["rows"]) == set(names)
    line, blind = figures["lines"]
    assert line["idea"] == "e_core" and line["reached"] and line["mean"] > 0.5
    assert (blind["of"], blind["row"], blind["measure"]) == ("blind", "mismatched", "all") and blind["reached"]
    assert figures["rows"]["prefgen"]["sharpness"] == 1.0 and table.figures(1)["primary"] == {}


def test_an_ideas_line_says_by_how_much_and_whether_it_was_reached():
    entry = {"idea": "e_core", "of": "prefgen", "row": "no_core", "measure": "continuous", "users": "all"}
    entry |= {"mean": 0.0612, "ci95": [0.02, 0.1], "p_holm": 0.03, "line": 0.05, "reached": True}
    lines = page.lines_of([entry, entry | {"mean": -0.0612, "reached": False}])
    assert "+0.061" in lines and "-0.061" in lines and "| yes |" in lines and "| no |" in lines


def test_contrasts_say_their_lines_where_they_have_any_and_no_empty_columns_elsewhere():
    entry = {"mean": 0.125, "ci95": [0.1, 0.15], "p_holm": 0.01}
    with_lines = page.contrasts_of({"words": entry | {"line": 0.05, "reached": True}})
    plain = page.contrasts_of({"words": entry})
    assert "| less | difference | p (Holm) | line | reached |" in with_lines and "| 0.050 | yes |" in with_lines
    assert "line" not in plain and "+0.125 (0.100 to 0.150)" in plain
