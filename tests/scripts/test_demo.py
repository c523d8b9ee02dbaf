"""The demo's own arithmetic and drawing."""

import numpy as np
from PIL import Image

from scripts import demo, demo_sheet


def picture(colour) -> Image.Image:
    return Image.new("RGB", (128, 128), colour)


def test_the_interval_covers_the_mean_and_narrows_with_more_users():
    rng = np.random.default_rng(1)
    few, many = rng.normal(0.3, 0.2, 8), rng.normal(0.3, 0.2, 200)
    for values in (few, many):
        low, high = demo.bootstrap(values)
        assert low < values.mean() < high
    assert np.ptp(demo.bootstrap(many)) < np.ptp(demo.bootstrap(few))


def test_pictures_of_one_user_do_not_count_as_independent():
    by_user = np.random.default_rng(2).normal(0, 1, 10)
    one, hundred = demo.summary(by_user[:, None]), demo.summary(np.repeat(by_user[:, None], 100, 1))
    assert hundred["ci95"] == one["ci95"] and hundred["n"] == 1000


def test_the_users_on_the_sheet_share_a_seed_and_all_others_have_their_own():
    sheet = {demo.seed_of(1, user, 0) for user in range(demo.SHEET_USERS)}
    assert len(sheet) == 1
    pairs = [demo.seed_of(1, user, prompt) for user in range(2, 30) for prompt in range(8)]
    assert len(set(pairs)) == len(pairs)


def test_spreading_takes_different_items_evenly():
    assert demo.spread(list(range(12)), 4) == [0, 3, 6, 9]
    assert demo.spread([1, 2], 4) == [1, 2]


def test_the_sheet_shows_every_picture_and_is_written_whole(tmp_path):
    red, green, blue = picture("#ff0000"), picture("#00ff00"), picture("#0000ff")
    row = demo_sheet.SheetRow("a sailing boat under a very long and winding prompt", red, green, blue)
    users = [
        demo_sheet.SheetUser("User A", "thick outlines, " * 30, "", [red] * 4, [blue] * 2, [row] * rows)
        for rows in (3, 1)
    ]
    sheet = demo_sheet.draw_sheet(users, "title", "subtitle", ["one", "two"])
    pixels = np.asarray(sheet).reshape(-1, 3)
    area = 0.9 * demo_sheet.CELL**2
    assert (pixels == (0, 255, 0)).all(1).sum() > 4 * area
    demo.save_image(sheet, tmp_path / "sheet.png", optimize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert Image.open(tmp_path / "sheet.png").size == sheet.size


def test_either_edition_has_users_prompts_and_a_judge_that_likes_what_they_like(monkeypatch):
    from prefgen.atelier.world import judge, render, users
    from scripts import demo_worlds

    assert isinstance(demo_worlds.demo_world(), demo_worlds.FirstWorld)
    world = demo_worlds.SecondWorld()
    (person, prompt), (picture, liked) = (world.people(1)[0], world.prompts()[1]), world.history(world.people(1)[0])[0]
    assert picture.shape == (world.side, world.side, 3) and liked
    assert world.enriched(person, prompt).split(", ")[1:] and all(world.opinions(person))
    scenes = [users.asked_scene(None, prompt, np.random.default_rng(0))]
    scenes.append(users.follow(scenes[0], person.tastes[0], np.random.default_rng(0), width=0.0))
    reader = type("Reader", (), {"read": lambda self, pixels: [judge.Reading(scene, ()) for scene in scenes]})
    monkeypatch.setattr(demo_worlds.second_judge, "load_judge", lambda which: reader())
    drawn = [render.render(scene) for scene in scenes]
    (plain, subject), (suited, _) = world.read(drawn, [(person, prompt)] * 2)
    assert suited > plain and subject
