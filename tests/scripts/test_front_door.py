"""What a visitor and the registry meet first: links lead somewhere, forms and workflows can be read."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scripts.comfy_server import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def test_pictures_of_the_readme_are_small_and_the_first_is_landscape():
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(names) == 2, "one landscape picture and the graph"
    for name in names:
        assert (ROOT / name).stat().st_size < 400_000
        width, height = Image.open(ROOT / name).size
        assert width > 1.8 * height


def test_the_registrys_icon_is_square_and_its_banner_wide():
    comfy = PROJECT["tool"]["comfy"]
    start = "https://raw.githubusercontent.com/prefgen/prefgen/main/"
    for key, check in (("Icon", lambda w, h: w == h <= 400), ("Banner", lambda w, h: 9 * w == 21 * h)):
        assert comfy[key].startswith(start)
        assert check(*Image.open(ROOT / comfy[key].removeprefix(start)).size), key


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_a_file_of_github_is_yaml(path):
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_its_parts_and_names_files_that_exist(path):
    workflow = read(path)
    assert workflow["name"] == path.stem and workflow["permissions"] == {"contents": "read"}
    assert workflow.get("on", workflow.get(True)), "YAML 1.1 reads the key `on` as true"
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    assert all(("uses" in step) != ("run" in step) for step in steps)
    for step in steps:
        for name in re.findall(r"(?<![\w/.])(?:\.ci/run|(?:scripts|tests)/[\w/]+(?:\.py)?)", step.get("run", "")):
            assert (ROOT / name).exists(), name


def test_a_new_version_alone_is_published():
    workflow = read(ROOT / ".github/workflows/publish.yml")
    assert workflow.get("on", workflow.get(True))["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    (publish,) = [
        step for step in workflow["jobs"]["publish"]["steps"] if "publish-node-action" in step.get("uses", "")
    ]
    assert "steps.version.outputs.changed" in publish["if"]


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_form_has_what_github_asks_of_it(name):
    form = read(ROOT / f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_this_version_and_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("2512.06020") and len(paper["authors"]) == 6


def test_pre_commit_runs_what_make_lint_runs():
    hooks = [hook for repository in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    commands = " ".join(hook["entry"] for hook in hooks)
    makefile = Path(ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("ruff check", "ruff format"):
        assert command in commands and command in makefile
    assert "make types" in commands and "\ntypes:" in makefile
