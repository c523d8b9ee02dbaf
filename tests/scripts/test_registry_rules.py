"""What the registry, the Manager and ComfyUI itself ask of a pack's files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.comfy_server import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "prefgen").rglob("*.py"))]


def test_the_name_may_become_a_folder_name_and_the_version_is_semantic():
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,99}", PROJECT["project"]["name"])
    assert "comfyui" not in PROJECT["project"]["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["project"]["version"])


def test_the_registry_finds_licence_repository_publisher_and_floor():
    assert (ROOT / PROJECT["project"]["license"]["file"]).read_text().lstrip().startswith("GNU GENERAL PUBLIC LICENSE")
    assert PROJECT["project"]["urls"]["Repository"].startswith("https://")
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] == "PrefGen" and comfy["requires-comfyui"] == ">=0.3.75"


def test_the_web_folder_is_declared_once():
    assert "web" not in PROJECT["tool"]["comfy"], "with WEB_DIRECTORY as well, every script would load twice"
    assert "WEB_DIRECTORY" in (ROOT / "__init__.py").read_text()


def test_installing_the_pack_installs_nothing_that_comfyui_brings():
    assert PROJECT["project"]["dependencies"] == []
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_the_changelog_tells_of_this_version():
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_managers_scanner_finds_every_node():
    """It reads the source: a class directly below io.ComfyNode, whose schema has a literal node_id."""
    node_ids = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "io.ComfyNode" in [ast.unparse(base) for base in node.bases]:
                ids = re.findall(r"Schema\(\s*node_id=['\"](\w+)['\"]", ast.unparse(node))
                assert len(ids) == 1, f"{path.name}: {node.name} needs one literal node_id"
                node_ids.add(ids[0])
    assert node_ids == {
        "PrefGen_ApplyTaste",
        "PrefGen_LabelledSheet",
        "PrefGen_LoadPreferenceMLLM",
        "PrefGen_LoadPreferenceHistory",
        "PrefGen_EncodePreferenceHistory",
        "PrefGen_FuseUserVector",
        "PrefGen_ApplyUserCrossAttention",
        "PrefGen_DescribePreference",
        "PrefGen_LoadAtelier",
        "PrefGen_LookAtPictures",
        "PrefGen_SaveUser",
        "PrefGen_LoadUser",
        "PrefGen_BlendUsers",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_file_runs_no_strings_no_programs_and_no_pickles(path: Path):
    tree = ast.parse(path.read_text())
    modules, calls = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module or "")
        elif isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func))
    downloads = {"urllib"} if path.parent.name == "download" else set()  # a command of its own, run by hand
    tops = {module.split(".")[0] for module in modules - {"urllib.parse"}}  # which asks nobody
    assert not tops & {"pickle", "subprocess", "marshal", "requests", "urllib", "socket"} - downloads
    assert not calls & {"eval", "exec", "__import__", "os.system", "torch.load", "importlib.import_module"}


def test_what_stays_out_of_the_zip_is_named_from_the_top_alone():
    """An unanchored name would leave out folders of that name anywhere: docs/ took web/docs/ with it."""
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {"/tests/", "/scripts/", "/training/", "/docs/"} <= set(lines)
    assert {line for line in lines if not line.startswith("/")} == {"__pycache__/", "*.pyc"}
    assert not {"/nodes/", "/prefgen/", "/workflows/", "/web/", "/locales/"} & set(lines)


def test_make_prints_its_targets():
    # Under `make test` another make would say which folder it is in.
    line = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = ("demo", "serve", "test", "check", "lint", "train-atelier", "clean")
    assert all(f"make {target} " in shown for target in targets)
    assert all(line.startswith(("make ", "PYTHON=")) for line in shown.splitlines() if line)
