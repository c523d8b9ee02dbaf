"""`pip install` of a clean clone: the engine and the training with all their files, and nothing of the ComfyUI pack."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.comfy_server import ROOT
from tests.scripts.artist_environment import closure, installed
from tests.scripts.working_tree import copy_sources, source_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("prefgen", "training")


def run(command: list, folder: Path) -> str:
    ran = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("install") / "clone")


@pytest.fixture(scope="module")
def site(clone) -> Path:
    """A folder as site-packages, into which pip has installed the clone."""
    target = clone.parent / "site"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "install", *options, "--target", target, "."], clone)
    return target


def test_pip_installs_prefgen_and_training_and_never_the_nodes(site):
    installed = {path.name for path in site.iterdir()}
    assert installed == {*PACKAGES, f"prefgen-{PROJECT['version']}.dist-info"}


def test_weights_configurations_and_pages_are_installed_with_the_code(site):
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    wanted = {name for name in source_files() if name.split("/")[0] in PACKAGES}
    assert {name for name in files if "dist-info" not in name and "__pycache__" not in name} == wanted
    assert wanted >= {
        "prefgen/atelier/weights/mllm/model.safetensors",
        "prefgen/download/sets.json",
        "training/data/agents/vocabulary.json",
        "training/configs/sd15_12gb.yaml",
        "training/evaluation/study/page/index.html",
    }


@pytest.mark.slow
def test_what_is_installed_imports_and_reads_its_files_far_from_the_clone(site, tmp_path):
    script = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import prefgen.atelier.models, prefgen.download.fetch, training.data.agents.vocabulary, training.evaluation.study.make
from training.common.config.command import FOLDER
print(json.dumps({
    "elsewhere": [name for name in ("prefgen", "training") if not sys.modules[name].__file__.startswith(sys.argv[1])],
    "nodes": [name for name in ("nodes", "scripts", "tests") if importlib.util.find_spec(name)],
    "sets": sorted(prefgen.download.fetch.load_sets()),
    "missing": [str(path) for path in (prefgen.atelier.models.WEIGHTS / "unet.safetensors", FOLDER / "sdxl_24gb.yaml",
        training.data.agents.vocabulary.REAL_WORLD, training.evaluation.study.make.PAGE / "study.js")
        if not path.is_file()],
}))
"""
    report = json.loads(run([sys.executable, "-c", script, site], tmp_path))
    assert report["elsewhere"] == report["nodes"] == report["missing"] == [] and "sdxl" in report["sets"]


def test_an_editable_installation_opens_the_two_packages_and_not_the_folder_around_them(clone, tmp_path):
    """What `pip install -e .` puts into site-packages, laid out as pip does."""
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    run([sys.executable, "-c", build, tmp_path], clone)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    script = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
import prefgen, training
print(*(name for name in ("nodes", "scripts", "tests", "locales", "web") if importlib.util.find_spec(name)), sep=",")
print(prefgen.__file__, training.__file__, sep=",")
"""
    others, ours = run([sys.executable, "-c", script, tmp_path / "site"], tmp_path).splitlines()
    assert others == "" and all(path.startswith(str(clone)) for path in ours.split(","))


def imported(file: Path) -> set[str]:
    """The top-level modules that a file imports by their absolute names, at once or later."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


def test_no_installed_file_imports_one_that_stays_in_the_clone():
    left = {name.split("/")[0].removesuffix(".py") for name in source_files()} - set(PACKAGES)
    for name in source_files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            assert not imported(ROOT / name) & left, name


def test_the_training_extra_brings_every_library_that_the_training_imports():
    """torchvision, which lays the samples of a run side by side, was once left to luck."""
    here = installed()
    extras = PROJECT["optional-dependencies"]
    brought = closure(extras["train"], here) | {
        canonicalize_name(Requirement(line).name) for line in [*extras["ray"], *extras["bits"]]
    }
    distributions_of = packages_distributions()
    for name in source_files():
        if name.split("/")[0] not in PACKAGES or not name.endswith(".py") or name.startswith("prefgen/comfy/"):
            continue
        beside = {path.stem for path in (ROOT / name).parent.glob("*.py")}  # prefgen/download, run by its folder's path
        for module in imported(ROOT / name) - set(sys.stdlib_module_names) - set(PACKAGES) - beside:
            owners = {canonicalize_name(each) for each in distributions_of.get(module, [module])}
            assert owners & brought, f"{name} imports {module}, which no extra brings"


def test_the_tested_environment_is_one_that_the_extras_allow():
    """The two locks install without the project: what they pin has to be what pyproject.toml asks for."""
    pins = {}
    locks = [(ROOT / f"requirements-{name}.txt").read_text() for name in ("lock", "test")]
    for line in "\n".join(locks).splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement.specifier)
    for line in [*PROJECT["optional-dependencies"]["train"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        for pin in pins[canonicalize_name(requirement.name)]:
            (version,) = (each.version for each in pin)
            assert requirement.specifier.contains(version), f"{line}, but the lock has {version}"


def test_one_floor_of_python_is_named_everywhere():
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert f"MINIMUM_PYTHON = ({floor.replace('.', ', ')})" in (ROOT / "scripts" / "setup_env.py").read_text()
    assert f'target-version = "py{floor.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        named = re.findall(r"Python (3\.\d+) or newer", page.read_text())
        assert set(named) <= {floor}, page.name
