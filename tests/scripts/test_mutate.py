"""The tool that changes the code to see what the tests notice, on a project of two functions."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import mutate

CODE = '''"""A module."""

LIMIT = 3


def share(values: list[int | float], top: int = 2) -> float:
    """Not to be changed: 1 + 1."""
    if top < 0 and values:
        raise ValueError(f"{top} is below {0}")
    chosen = [v for v in values[:top] if not v > LIMIT]
    return max(sum(chosen), 0.0) / {"all": top}["all"]


def unguarded(x):
    return x + 1
'''
TESTS = """from pack.code import share, unguarded

def test_share():
    assert share([1, 3, 5, 4]) == 2 and share([4, 1, 2], 3) == 1 and share([-5]) == 0

def test_too_little():
    try:
        share([1], -1)
    except ValueError:
        pass
    else:
        raise AssertionError
    unguarded(1)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "pack").mkdir(parents=True)
    (root / "pack/__init__.py").write_text("")
    (root / "pack/code.py").write_text(CODE)
    (root / "tests").mkdir()
    (root / "tests/test_code.py").write_text(TESTS)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "PRELOADED", ())
    return root


def changes(root):
    return {(m.operator, m.before, m.after) for m in mutate.Source(root, "pack/code.py").spans}


def test_every_kind_of_change_is_offered_and_annotations_docstrings_and_messages_are_not(project):
    offered = changes(project)
    for expected in [
        ("constant", "3", "4"),
        ("constant", "3", "(2)"),
        ("constant", "0.0", "1.0"),
        ("comparison", "top < 0", "(top <= 0)"),
        ("boolean", "top < 0 and values", "(top < 0 or values)"),
        ("boolean", "not v > LIMIT", "(v > LIMIT)"),
        ("negated condition", "not v > LIMIT", "(not (not v > LIMIT))"),
        ("slice", ":top", "1:top"),
        ("slice", ":top", ":top + 1"),
        ("min and max", "max(sum(chosen), 0.0)", "min(sum(chosen), 0.0)"),
        ("swapped arguments", "max(sum(chosen), 0.0)", "max(0.0, sum(chosen))"),
        ("arithmetic", "x + 1", "(x - 1)"),
        ("string key", '"all"', "'all_'"),
        ("dropped statement", 'raise ValueError(f"{top} is below {0}")', "pass"),
    ]:
        assert expected in offered, expected
    assert not any("int | float" in before or "Not to be changed" in before for _, before, _ in offered)
    assert ("constant", "0", "1") in offered
    assert sum(before == "0" for _, before, _ in offered) == 2, "the zero of the message is left alone"


@pytest.mark.slow
def test_changes_of_the_repositorys_own_code_can_be_parsed():
    root = Path(__file__).parents[2]
    for file in (
        "training/common/mmd.py",
        "prefgen/comfy/run.py",
        "training/evaluation/vqa_score.py",
        "scripts/mutations.py",
    ):
        source = mutate.Source(root, file)
        assert len({m.id for m in source.spans}) == len(source.spans) > 20
        for mutation in list(source.spans)[::4]:
            text = source.mutated(mutation)
            assert text != source.text
            ast.parse(text)


def test_a_draw_is_the_same_for_a_seed_and_takes_no_line_twice(project):
    first = mutate.draw(project, "pack", 6, 1, [])
    assert first == mutate.draw(project, "pack", 6, 1, []) != mutate.draw(project, "pack", 6, 2, [])
    assert len({m.line for m in first}) == 6
    assert mutate.draw(project, "pack", 6, 1, ["pack/code.py"]) == []


def test_an_id_stays_when_lines_move(project):
    ids = {m.id for m in mutate.Source(project, "pack/code.py").spans}
    (project / "pack/code.py").write_text("# one more line\n" + CODE)
    assert {m.id for m in mutate.Source(project, "pack/code.py").spans} == ids


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mutate", *map(str, words)])
    mutate.main()


@pytest.mark.slow
def test_what_the_tests_check_is_noticed_what_they_do_not_survives_and_a_stopped_run_goes_on(
    project, tmp_path, monkeypatch, capsys
):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    wanted = {("arithmetic", "x + 1"): "survived", ("comparison", "top < 0"): "survived"}
    wanted |= {("min and max", "max(sum(chosen), 0.0)"): "noticed", ("slice", ":top"): "noticed"}
    source = mutate.Source(project, "pack/code.py")
    drawn = [next(m for m in source.spans if (m.operator, m.before) == key) for key in wanted]
    monkeypatch.setattr(mutate, "draw", lambda *_: drawn)
    work = tmp_path / "work"
    line = ("--work", work, "--seed", 7, "--count", "pack=4")
    tried = []
    try_mutation = mutate.try_mutation

    def stopped(*arguments):
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(arguments[2].id)
        return try_mutation(*arguments)

    monkeypatch.setattr(mutate, "try_mutation", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "run", *line)
    monkeypatch.setattr(mutate, "try_mutation", lambda *a: tried.append(a[2].id) or try_mutation(*a))
    run(monkeypatch, "run", *line)
    assert tried == [m.id for m in drawn], "each was tried once"
    rows = [json.loads(row) for row in (work / "seed7.jsonl").read_text().splitlines()]
    outcomes = {row["id"]: row["outcome"] for row in rows if "outcome" in row}
    assert [outcomes[m.id] for m in drawn] == list(wanted.values())
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert not (work / "copy/ignored").exists()
    assert "| pack | 4 | 4 | 2 | 2 | 0 | 0 | 2 | 2 of 4 (50 %) |" in capsys.readouterr().out

    run(monkeypatch, "judge", *line[:4], drawn[1].id, "equivalent", "no test of 0")
    (project / "tests/test_code.py").write_text(TESTS.replace("unguarded(1)", "assert unguarded(1) == 2"))
    run(monkeypatch, "run", *line, "--again")
    assert tried[4:] == [drawn[0].id], "what is judged isn't tried again"
    shown = capsys.readouterr().out
    assert "| pack | 4 | 4 | 2 | 3 | 1 | 0 | 0 | 3 of 3 (100 %) |" in shown and "equivalent: no test of 0" in shown


def test_the_map_names_the_lines_that_a_test_file_runs_in_other_processes_too(project, tmp_path, monkeypatch):
    pytest.importorskip("coverage")
    (project / "tests/test_started.py").write_text(
        "import subprocess, sys\n\ndef test_started():\n"
        "    subprocess.run([sys.executable, '-c', 'from pack.code import unguarded; unguarded(1)'], check=True)\n"
    )
    work = tmp_path / "work"
    run(monkeypatch, "map", "--work", work)
    tree = mutate.make_copy(work)
    body = CODE.splitlines().index("    return x + 1") + 1
    condition = CODE.splitlines().index("    if top < 0 and values:") + 1
    names = [[r["test"] for r in mutate.tests_of(work, tree, "pack/code.py", (n, n))] for n in (body, condition)]
    assert sorted(names[0]) == ["tests/test_code.py", "tests/test_started.py"] and names[1] == ["tests/test_code.py"]


def test_without_a_map_the_tests_that_import_or_name_the_module_are_run(project, tmp_path):
    shutil.copy(project / "tests/test_code.py", project / "tests/test_other.py")
    (project / "tests/test_other.py").write_text("import json\n")
    records = mutate.tests_of(tmp_path / "work", project, "pack/code.py", (1, 1))
    assert [record["test"] for record in records] == ["tests/test_code.py"]
    assert mutate.module_of("training/data/vqa/__main__.py") == "training.data.vqa"
    (project / "tests/test_other.py").write_text("start('evaluation.vqa_score')\n")
    assert "training.evaluation.vqa_score" in mutate.modules_named(project / "tests/test_other.py")


def test_a_test_that_hangs_is_stopped(project, tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "GRACE", 2)
    (project / "tests/test_code.py").write_text("import time\n\ndef test_slow():\n    time.sleep(60)\n")
    record = {"test": "tests/test_code.py", "seconds": 0, "failed": []}
    assert mutate.run_tests(project, record, tmp_path / "log") == "timeout"
