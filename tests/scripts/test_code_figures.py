"""The script that says how the code reads."""

import pytest

from scripts import code_figures

CODE = '''"""A module."""

SIZE, NAME = 3, "x"


def first(found):
    """Documented."""
    # A reason.
    left, right = right, left  # a swap is not packed
    for item in found:
        if item and left:
            return [one for one in item if one]

    def inner():
        if right:
            return 1


class _Hidden:
    def bare(self):
        kept = 1
'''


@pytest.fixture
def figures(tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    return code_figures.counted(tmp_path, ["code.py"])


def test_what_is_counted(figures):
    assert figures.lines == [CODE.count("\n")] and figures.comments == 1
    assert figures.packed == ["code.py:3"]
    assert [name.split()[-1] for name in figures.empty_names] == ["found", "kept"]
    assert (figures.public, figures.documented) == (3, 1)


def test_branches_of_a_function_inside_another_are_its_own(figures):
    branches = {function.name: function.branches for function in figures.functions}
    assert branches == {"first": 4, "inner": 1, "bare": 0}, "for, if, and, comprehension"


def test_what_goes_beyond_a_limit_is_a_line_each(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text(CODE)
    for limit, value in (("FUNCTION_LINES", 5), ("BRANCHES", 3), ("MODULE_LINES", 20)):
        monkeypatch.setattr(code_figures, f"MAX_{limit}", value)
    faults = list(code_figures.beyond_limits(code_figures.counted(tmp_path, ["code.py"])))
    assert faults == [
        "code.py first: 11 lines",
        "code.py first: 4 branches",
        "code.py: 21 lines",
        "code.py:6 found",
        "code.py:21 kept",
        "code.py:3 packed assignment",
    ]


def test_a_table_has_a_cell_for_every_column(figures):
    assert len(figures.row()) == len(code_figures.HEAD)


def test_without_git_every_file_of_the_packages_is_read_and_no_other(tmp_path):
    for name in ("prefgen/a.py", "prefgen/mllm/b.py", "tests/test_a.py", ".venv/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    assert code_figures.tracked(tmp_path) == ["prefgen/a.py", "prefgen/mllm/b.py"]
    assert code_figures.tracked(tmp_path, "prefgen") == ["prefgen/a.py", "prefgen/mllm/b.py"]
