"""The study with human judges: nothing tells the methods apart, the page works by keys alone, figures are right."""

import csv
import json
import random
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from training.common import statistics as bootstrap
from training.data.errors import DataError
from training.evaluation.study import __main__ as command
from training.evaluation.study import agreement, analyse, pictures
from training.evaluation.study.answers import COLUMNS, read_answers, read_key
from training.evaluation.study.make import Plan, make

METHODS = ("prefgen", "none", "oracle")


def save(path, rng, size=24):
    """A picture of noise whose metadata tell everything."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("prompt", path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(path, pnginfo=metadata)


def write_table(folder, users=3, prompts=2, methods=METHODS, liked=2, disliked=1):
    """A folder with pictures.jsonl. Returns its rows."""
    rng, rows = np.random.default_rng(5), []
    for user in range(users):
        for verdict, count in (("liked", liked), ("disliked", disliked)):
            rows += [
                {"user": f"u{user}", "verdict": verdict, "image": f"h/{verdict}{user}{i}.png"} for i in range(count)
            ]
        for prompt in range(prompts):
            for method in methods:
                image = f"{method}/u{user}_{prompt}.png"
                rows.append({"user": f"u{user}", "prompt": f"a <b>cat</b> {prompt}", "method": method, "image": image})
    for row in rows:
        save(folder / row["image"], rng)
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def study_of(folder, plan, **options):
    """A study of small pictures; returns its key."""
    write_table(folder / "in", **options)
    make(pictures.read(folder / "in"), folder / "study", plan)
    return read_key(folder / "study")


@pytest.fixture
def small(tmp_path):
    return study_of(tmp_path, Plan(trials=0, repeats=3))


def page_data(folder):
    return json.loads((folder / "page/data.js").read_text().removeprefix("const STUDY = ").rstrip(";\n"))


def judge(path, key, name, choose, seed=0, trials=None):
    """Write the file of a judge; choose(entry, rng) gives a method or None for no difference."""
    rng, rows = random.Random(f"{name} {seed}"), []
    for i, trial in enumerate(trials or key["trials"]):
        entry = key["trials"][trial]
        left, right = rng.sample(list(entry["pictures"]), 2)
        method = choose(entry, rng)
        choice = "same" if method is None else "left" if entry["pictures"][left] == method else "right"
        time = f"2026-01-02T03:{i // 60:02}:{i % 60:02}.000Z"
        rows.append([key["study"], name, trial, left, right, choice, 900 + i, time])
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *rows])
    return path


def prefers(first, share):
    """Chooses method `first` in this share of its trials, the other else."""
    return lambda entry, rng: (
        first if rng.random() < share else next(m for m in entry["pictures"].values() if m != first)
    )


def test_a_table_becomes_blinded_trials(small, tmp_path):
    study, page = tmp_path / "study", page_data(tmp_path / "study")
    originals = [entry for entry in small["trials"].values() if not entry["mirrors"]]
    compared = Counter(frozenset(entry["pictures"].values()) for entry in originals)
    assert len(compared) == 3 and set(compared.values()) == {6}
    assert sum(bool(entry["mirrors"]) for entry in small["trials"].values()) == 3
    for trial in page["trials"]:
        entry = small["trials"][trial["id"]]
        assert list(entry["pictures"]) == trial["pictures"] and entry["prompt"] == trial["prompt"]
        for name, method in entry["pictures"].items():
            source = Image.open(tmp_path / "in" / method / f"{entry['user']}_{entry['prompt'][-1]}.png")
            shown = Image.open(study / "page/pictures" / f"{name}.png")
            assert np.array_equal(np.asarray(source), np.asarray(shown))
        if "mirrors" in trial:
            first = small["trials"][trial["mirrors"]]
            assert list(entry["pictures"].values()) == list(first["pictures"].values())


def test_nothing_in_the_page_tells_a_method(small, tmp_path):
    page = tmp_path / "study/page"
    telling = [method.encode() for method in METHODS[::2]] + [b"u0_", b"key.json", b"http:", b"https:"]
    for file in page.rglob("*"):
        if file.is_file():
            assert not any(word in file.read_bytes() for word in telling), file
    names = Counter(name for trial in page_data(page.parent)["trials"] for name in trial["pictures"])
    assert set(names.values()) == {1}, "how often a name appears would tell a method"
    files = list((page / "pictures").iterdir())
    assert {file.stat().st_mtime for file in files} == {0}
    for file in files:
        chunks, data = [], file.read_bytes()
        at = 8
        while at < len(data):
            chunks.append(data[at + 4 : at + 8])
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    first = Counter(list(e["pictures"].values())[0] for e in small["trials"].values())
    assert len(first) == 3, "no method always comes first"


def test_a_part_of_the_trials_is_balanced_and_pairs_can_be_named(tmp_path):
    key = study_of(tmp_path / "a", Plan(trials=9, repeats=0), users=3, prompts=3)
    compared = Counter(frozenset(entry["pictures"].values()) for entry in key["trials"].values())
    assert set(compared.values()) == {3}
    assert set(Counter(entry["user"] for entry in key["trials"].values()).values()) == {3}
    key = study_of(tmp_path / "b", Plan((("none", "prefgen"),), trials=0, repeats=0))
    assert {frozenset(e["pictures"].values()) for e in key["trials"].values()} == {frozenset(("none", "prefgen"))}


def test_parquet_says_the_same_as_lines(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = write_table(tmp_path)
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(pictures.TEXTS) | row for row in rows]), tmp_path / "t.parquet")
    assert pictures.read(tmp_path / "t.parquet") == pictures.read(tmp_path / "pictures.jsonl")


def test_the_demo_s_output_becomes_a_study(tmp_path):
    from scripts import demo
    from scripts.demo_worlds import FirstWorld

    world = FirstWorld()
    prompts = [world.text(prompt) for prompt in demo.spread(world.prompts(), 2)]
    demo.write_histories(tmp_path / "pictures/histories", world, world.people(2))
    jobs = [demo.Job(u, p, condition, 0, {}) for u in range(2) for condition in demo.CONDITIONS for p in range(2)]
    for job in jobs:
        save(tmp_path / "pictures" / f"{job.prefix}.png", np.random.default_rng(job.user + job.prompt))
    (tmp_path / "pictures.jsonl").write_text(demo.study_table(jobs, prompts, tmp_path / "pictures/histories"))
    read = pictures.read(tmp_path)
    assert read.methods == list(demo.CONDITIONS) and len(read.painted) == 4
    assert all(len(files) == 8 for sides in read.histories.values() for files in sides.values())
    (tmp_path / "pictures/user01/prompt01_none.png").unlink()
    with pytest.raises(DataError, match="there is no picture .*prompt01_none.png"):
        pictures.read(tmp_path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda rows: rows.clear(), "nothing to compare"),
        (lambda rows: rows[3].pop("method"), "line 4 has no method"),
        (lambda rows: rows[3].update(image="gone.png"), "line 4: there is no picture"),
        (lambda rows: rows[0].update(verdict="loved"), "neither liked nor disliked"),
        (lambda rows: rows.append(rows[-1]), "second picture"),
        (lambda rows: rows.__setitem__(slice(0, 2), []), "no liked picture"),
        (lambda rows: rows.__setitem__(0, 7), "line 1 is no object"),
        (lambda rows: rows[0].update(image="pictures.jsonl"), "Can't read the picture"),
        (lambda rows: rows[4].update(image="big.png"), "bring them to one size"),
        (lambda rows: [r.update(method="one") for r in rows[4:] if "method" in r], "second picture"),
    ],
)
def test_pictures_that_make_no_study_are_explained_and_leave_nothing(tmp_path, change, sentence):
    rows = write_table(tmp_path, users=1, prompts=1)
    save(tmp_path / "big.png", np.random.default_rng(0), 48)
    change(rows)
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=sentence):
        make(pictures.read(tmp_path), tmp_path / "out" / "study", Plan())
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("make nowhere study", "is no table"),
        ("make IN study --pairs prefgen", "write two methods as A:B"),
        ("make IN study --pairs prefgen:magic", "no method 'magic'"),
        ("make IN IN", "is not empty"),
        ("make . study", "as the output of make demo does"),
        ("make IN study --trials -1", "no whole number"),
        ("analyse IN a.csv", "There is no IN/key.json"),
        ("analyse IN a.csv --min-consistency 2", "no number from 0 to 1"),
    ],
)
def test_a_wrong_command_line_ends_in_a_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    write_table(tmp_path / "IN", users=1, prompts=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert sentence in f"{stopped.value}{capsys.readouterr().err}"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("STUDY", "another", "is of the study 'another'"),
        ("TRIAL", "0" * 8, "no trial '00000000'"),
        ("LEFT", "0" * 16, "not those of the trial"),
        ('"left"', '"up"', "choice 'up' is none of"),
        ('"901"', '"soon"', "milliseconds or timestamp"),
        ("Z", "", "milliseconds or timestamp"),
        ('"Ann"', '" "', "has no judge"),
        (",", ";", "has not the columns"),
        ('Z"', 'Z","more"', "has not 8 cells"),
        (":00.000Z", "", "milliseconds or timestamp"),
    ],
)
def test_a_file_the_page_did_not_write_is_refused(small, tmp_path, old, new, sentence):
    path = judge(tmp_path / "a.csv", small, "Ann", lambda entry, rng: next(iter(entry["pictures"].values())))
    text = path.read_text()
    row = text.splitlines()[2].replace('"', "").split(",")
    old = {"STUDY": row[0], "TRIAL": row[2], "LEFT": row[3]}.get(old, old)
    head, body = text.split("\n", 1)
    path.write_text((head.replace(old, new) if old == "," else head) + "\n" + body.replace(old, new))
    with pytest.raises(DataError, match=sentence):
        read_answers([path], small)


def test_empty_and_foreign_files_are_refused(small, tmp_path):
    path = tmp_path / "a.csv"
    foreign = ((b"", "has not the columns"), (b"\xff\xfe", "has not the columns"), (b"caf\xe9", "save it as UTF-8"))
    for content, sentence in (*foreign, (None, "Can't read")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=sentence):
            read_answers([path], small)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(DataError, match="holds no answer"):
        read_answers([path], small)


def test_a_known_preference_is_found_and_everything_is_counted(tmp_path):
    key = study_of(tmp_path, Plan(trials=0, repeats=4), users=12, prompts=3, methods=("prefgen", "none"))
    files = [judge(tmp_path / f"{n}.csv", key, f"J{n}", prefers("prefgen", 0.8)) for n in range(5)]
    part = list(key["trials"])[:-7]
    files.append(judge(tmp_path / "part.csv", key, "Part", prefers("prefgen", 1), trials=part))
    files.append(judge(tmp_path / "again.csv", key, "Part", prefers("prefgen", 0), trials=part[:2]))
    files.append(judge(tmp_path / "none.csv", key, "Unsure", lambda entry, rng: None))
    analyse.analyse(tmp_path / "study", files)
    result, page = json.loads((tmp_path / "study/study.json").read_text()), (tmp_path / "study/study.md").read_text()
    (pair,) = result["pairs"]
    assert (pair["a"], pair["b"]) == ("prefgen", "none") and pair["ci95"][0] < pair["win_rate"] < pair["ci95"][1]
    assert pair["wins"] + pair["losses"] + pair["no_difference"] == pair["answers"] == result["counted_answers"]
    assert pair["win_rate"] == pytest.approx((pair["wins"] + pair["no_difference"] / 2) / pair["answers"], abs=1e-4)
    assert pair["no_difference"] == 36 and 0.65 < pair["win_rate"] < 0.9 and pair["ci95"][0] > 0.5
    assert result["duplicates"] == 2 and result["judges"]["Part"]["missing"] == 7
    assert result["judges"]["Unsure"]["left"]["left"] is None and result["judges"]["Unsure"]["consistency"] == 1
    assert result["overall"]["none"]["win_rate"] == pytest.approx(1 - pair["win_rate"], abs=1e-4)
    left = result["left"]  # sides are drawn anew for every study: six deviations either way
    assert left["ci95"][0] < left["left"] < left["ci95"][1] and abs(left["left"] - 0.5) < 0.2
    assert "| prefgen over none |" in page and "| Unsure | yes | 40 | 0 | 4 of 4 | - | 100.0% |" in page


def test_careless_judges_can_be_left_out_by_their_repeats(tmp_path):
    key = study_of(tmp_path, Plan(trials=0, repeats=6), methods=("prefgen", "none"))

    def fickle(entry, rng):
        return sorted(entry["pictures"].values())[bool(entry["mirrors"])]

    files = [judge(tmp_path / "a.csv", key, "Sure", prefers("none", 1)), judge(tmp_path / "b.csv", key, "Odd", fickle)]
    result = analyse.measure(read_answers(files, key).latest, key, min_consistency=0.5)
    assert result["judges"]["Odd"]["failed_repeats"] == 6 and not result["judges"]["Odd"]["counted"]
    assert result["judges"]["Sure"]["counted"] and result["counted_answers"] == 6
    with pytest.raises(DataError, match="No answer is left"):
        analyse.measure(read_answers(files[1:], key).latest, key, min_consistency=0.5)


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): examples A, B and C, with their published values.
PUBLISHED = [
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbcccedd" + "d"], 0.692),
    (["123321412...", "1233224125.3", ".33323422" + "51.", "12332441251."], 0.743),
]


def counts_of(units):
    labels = sorted({value for unit in units for value in unit})
    return np.array([[unit.count(label) for label in labels] for unit in units])


@pytest.mark.parametrize("judges, expected", PUBLISHED)
def test_alpha_of_published_examples(judges, expected):
    units = [[value for value in unit if value != "."] for unit in zip(*judges, strict=True)]
    assert agreement.alpha(counts_of(units)) == pytest.approx(expected, abs=5e-4)


def test_alpha_by_hand():
    counts = counts_of(["aa", "bb", "ab", "a"])
    # n = 6, since a value alone in its unit meets none; observed 2/6; expected (36 - 18) / 30
    assert agreement.alpha(counts) == pytest.approx(1 - (2 / 6) / (18 / 30))
    assert agreement.observed(counts) == pytest.approx(4 / 6)
    assert np.isnan(agreement.alpha(counts_of(["aaa"]))), "all values are the same"
    assert np.isnan(agreement.alpha(counts_of(["a", "b"]))) and np.isnan(agreement.observed(counts_of(["a", "b"])))
    assert np.isnan(agreement.alpha(np.array([[3, 0]]))), "a label that nobody gave changes nothing"


def test_the_crossed_interval_widens_with_judges_who_differ_and_covers(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 400)
    rng, covered = np.random.default_rng(6), 0
    for _ in range(150):
        cells = 0.6 + rng.normal(0, 0.1, (20, 1)) + rng.normal(0, 0.1, (1, 12)) + rng.normal(0, 0.2, (20, 12))
        low, high = bootstrap.ci95(bootstrap.crossed(cells, np.ones_like(cells)))
        covered += low <= 0.6 <= high
    assert covered / 150 > 0.88
    users_only = bootstrap.bootstrap(cells.mean(1))
    assert high - low > users_only[1] - users_only[0]
    gaps = np.array([[1.0, 0.0], [0.0, 0.0]])
    draws = bootstrap.crossed(gaps, (gaps > 0).astype(float))
    assert len(draws) < 400 and set(draws) == {1.0}, "a draw without any answer has no mean"


@pytest.fixture
def page(chromium):
    """A page that notes its errors and every address it asks for."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.errors = []
    page.requested = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    yield page
    context.close()


@pytest.mark.slow
def test_a_judge_with_keys_alone_does_the_whole_study_in_the_real_page(page, tmp_path):
    key = study_of(tmp_path, Plan(trials=0, repeats=2), methods=("prefgen", "none"))
    methods = {name: method for entry in key["trials"].values() for name, method in entry["pictures"].items()}
    side = "document.getElementById('{}').src.slice(-20, -4)"

    def begin():
        page.goto((tmp_path / "study/page/index.html").as_uri())
        page.wait_for_function("document.readyState === 'complete' && document.activeElement.id === 'judge'")
        page.keyboard.type("Ann")
        page.keyboard.press("Enter")

    def ready(number):
        place = f"document.getElementById('place').textContent === 'Choice {number} of 8'"
        page.wait_for_function(f"shownAt !== null && {place}")
        return {methods[page.evaluate(side.format(s))]: s for s in ("left", "right")}

    def choose(number):
        better = ready(number)["prefgen"]
        page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight"}[better])

    began = time.monotonic()
    begin()
    for number in (1, 2, 3):
        choose(number)
    ready(4)
    shown = "[...document.querySelectorAll('#trial img')].map(i => i.alt).join()"
    expected = "Liked picture 1 of 2,Liked picture 2 of 2,Disliked picture 1 of 1,Left picture,Right picture"
    assert page.evaluate(shown) == expected
    assert page.evaluate("document.activeElement.id") == "place"
    assert page.evaluate("document.getElementById('prompt').innerHTML").startswith("a &lt;b&gt;cat")
    begin()  # as if the tab had been closed
    ready(4)
    page.keyboard.press("Space")
    ready(5)
    page.keyboard.press("u")
    ready(4)
    for number in (4, 5, 6, 7):
        choose(number)
    ready(8)
    page.keyboard.press("ArrowDown")
    page.wait_for_function("!document.getElementById('end').hidden")
    page.keyboard.press("u")
    ready(8)
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.activeElement.id === 'save'")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == f"answers-{key['study']}-Ann.csv"
    assert not page.errors
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in page.requested)

    answers = read_answers([file], key)
    assert len(answers.latest) == 8 and answers.duplicates == 0
    assert [a.method for a in answers.latest] == ["prefgen"] * 7 + [None]
    assert all(0 <= answer.milliseconds < 1000 * (time.monotonic() - began) for answer in answers.latest)
    rows = {row["trial"]: row for row in csv.DictReader(file.open())}
    for trial, entry in key["trials"].items():
        if entry["mirrors"]:
            assert methods[rows[trial]["left"]] == methods[rows[entry["mirrors"]]["right"]]
            order = list(rows)
            assert order.index(trial) > order.index(entry["mirrors"])
    result = analyse.measure(answers.latest, key)
    assert result["pairs"][0]["wins"] + result["pairs"][0]["no_difference"] == 6
