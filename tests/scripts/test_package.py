"""What artists get: the zip of `comfy node pack`, unzipped beside a ComfyUI with its own requirements alone."""

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import graph as graphs
from scripts import setup_env
from scripts.comfy_server import ComfyServer
from tests.scripts.artist_environment import make_environment
from tests.scripts.working_tree import copy_sources, source_files, track_all

FOLDER = "PrefGen-main_2"  # the installer chooses the folder's name
PACKED_FOLDERS = ("locales", "nodes", "prefgen", "web", "workflows")
PACKED_FILES = {"__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt"}
LARGEST_FILE, LARGEST_ZIP = 24_000_000, 60_000_000


def pack(tree: Path) -> Path:
    """Run `comfy node pack` in `tree` and return the zip."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "pack"]
    environment = dict(os.environ, HOME=str(tree.parent), DO_NOT_TRACK="1")
    subprocess.run(command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return tree / "node.zip"


def packed_names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("packing") / "clone")
    track_all(tree)
    return pack(tree)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(interpreter, distributions in it, distributions left out)."""
    return make_environment(tmp_path_factory.mktemp("artist") / "venv", setup_env.find_comfyui())


@pytest.fixture(scope="module")
def server(archive, environment, tmp_path_factory):
    base = tmp_path_factory.mktemp("artist") / "base"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(base / "custom_nodes" / FOLDER)
    comfyui, python = setup_env.find_comfyui(), str(environment[0])
    with ComfyServer(comfyui, base, python=python, pack=None, threads=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def nodes(client) -> dict[str, dict]:
    """The pack's nodes as the server describes them, by node id."""
    return {name: info for name, info in client.object_info().items() if name.startswith("PrefGen_")}


def fetch(server, path: str) -> bytes:
    with urllib.request.urlopen(server.address + urllib.request.quote(path), timeout=30) as answer:
        return answer.read()


def test_the_zip_holds_what_the_nodes_need_and_nothing_else(archive):
    needed = {name for name in source_files() if name in PACKED_FILES or name.split("/")[0] in PACKED_FOLDERS}
    assert packed_names(archive) == needed
    assert needed >= PACKED_FILES


def test_the_zip_holds_no_links_no_caches_and_no_file_that_the_registry_would_refuse(archive):
    assert archive.stat().st_size < LARGEST_ZIP
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            assert (entry.external_attr >> 16) & 0o170000 != 0o120000, f"{entry.filename} is a link"
            assert entry.file_size <= LARGEST_FILE, entry.filename
            assert not re.search(r"__pycache__|\.pyc$|\.(ckpt|pt|pth|bin|pkl)$", entry.filename), entry.filename


def test_a_folder_is_packed_whatever_the_folders_in_it_are_called(tmp_path):
    """`docs/` in .comfyignore once took web/docs/ out as well."""
    tree = tmp_path / "clone"
    tree.mkdir()
    for name in (".comfyignore", "pyproject.toml", "LICENSE"):
        (tree / name).write_bytes((Path(setup_env.ROOT) / name).read_bytes())
    words = ["docs", "tests", "training", "scripts", "benchmarks", "output", "runs", "build", "dist", ".ci", ".github"]
    wanted = {
        f"{folder}/{below}{word}/kept.md"
        for folder in PACKED_FOLDERS
        for below in ("", "deeper/still/")
        for word in words
    } | {f"{folder}/{name}" for folder in PACKED_FOLDERS for name in ("Makefile", "requirements-lock.txt", "node.zip")}
    for name in wanted | {f"{word}/left_out.md" for word in words}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    track_all(tree)
    assert packed_names(pack(tree)) == wanted | {"pyproject.toml", "LICENSE"}


def test_a_source_archive_without_git_packs_the_same_files(archive, tmp_path):
    """comfy-cli then takes whatever lies there, as what `make setup` and the demo left."""
    tree = copy_sources(tmp_path / "source")
    for name in (".venv/lib/torch.py", ".comfyui/main.py", ".cache/x", "output/demo/sheet.png", "runs/step.pt"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("x")
    (tree / "nodes" / "__pycache__").mkdir()
    (tree / "nodes" / "__pycache__" / "user.cpython-311.pyc").write_text("x")
    assert packed_names(pack(tree)) == packed_names(archive)


def test_no_packed_file_imports_one_that_stays_behind(archive):
    opened = zipfile.ZipFile(archive)
    files = [name for name in opened.namelist() if name.endswith(".py")]
    modules = {f"pack/{name}".removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    own = {name.split("/")[0].removesuffix(".py") for name in source_files()}
    for name in files:
        package = f"pack/{name}".rpartition("/")[0].replace("/", ".")
        for node in ast.walk(ast.parse(opened.read(name))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                targets = [importlib.util.resolve_name("." * node.level + (node.module or ""), package)]
            else:
                continue
            for target in targets:
                # prefgen/download is run by its folder's path as well, and then imports what lies beside it.
                inside = target in modules or f"{package}.{target}" in modules
                assert inside or target.split(".")[0] not in own | {"pack"}, f"{name} needs {target}"


@pytest.mark.slow
def test_the_artists_environment_has_comfyui_s_requirements_and_none_of_training_s(environment):
    python, inside, left_out = environment
    assert inside >= {"torch", "transformers", "safetensors", "numpy", "pillow", "aiohttp", "tqdm"}
    assert left_out >= {"diffusers", "accelerate", "peft", "duckdb", "pyarrow", "matplotlib", "tensorboard", "pytest"}
    script = """
import importlib.util, importlib.metadata
for name in ("diffusers", "accelerate", "peft", "duckdb", "pyarrow", "matplotlib", "tensorboard", "pytest"):
    assert importlib.util.find_spec(name) is None, name
assert "peft" not in {each.metadata["Name"] for each in importlib.metadata.distributions()}
import torch, transformers
"""
    subprocess.run([python, "-c", script], check=True)


@pytest.mark.slow
def test_the_engine_of_the_zip_imports_in_the_artists_environment(archive, environment, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    script = """
import importlib, pkgutil, prefgen
for module in pkgutil.walk_packages(prefgen.__path__, "prefgen."):
    if not module.name.startswith("prefgen.comfy") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    subprocess.run([environment[0], "-c", script], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_pack_boots_from_the_zip_under_a_folder_name_of_the_installers(server, nodes):
    sources = "".join(path.read_text() for path in (server.base / "custom_nodes" / FOLDER / "nodes").glob("*.py"))
    assert set(nodes) == set(re.findall(r'node_id="(PrefGen_\w+)"', sources)) and len(nodes) >= 7
    assert {info["python_module"] for info in nodes.values()} == {f"custom_nodes.{FOLDER}"}
    log = server.log_path.read_text()
    assert "IMPORT FAILED" not in log and "Traceback" not in log


@pytest.mark.slow
def test_every_node_of_the_zip_shows_its_help_page(server, nodes):
    for name, info in nodes.items():
        # The address that the front end makes of a node's python_module.
        folder = info["python_module"].split(".")[1]
        page = fetch(server, f"/extensions/{folder}/docs/{name}.md").decode()
        assert page.startswith("# ") and len(page) > 200, name


@pytest.mark.slow
def test_every_node_of_the_zip_is_translated(client, nodes):
    for language, texts in client.get("/i18n").items():
        for name, info in nodes.items():
            described = texts["nodeDefs"][name]
            assert described["display_name"], (language, name)
            shown = {entry for group in ("required", "optional") for entry in info["input"].get(group, {})}
            assert set(described.get("inputs", {})) <= shown, (language, name)


@pytest.mark.slow
def test_the_template_of_the_zip_paints_its_pictures(server, client, nodes):
    names = client.get("/workflow_templates")[FOLDER]
    assert "prefgen_atelier" in names
    for name in names:
        thumbnail = Image.open(io.BytesIO(fetch(server, f"/api/workflow_templates/{FOLDER}/{name}.jpg")))
        assert min(thumbnail.size) > 100
    (server.base / "atelier.json").write_bytes(fetch(server, f"/api/workflow_templates/{FOLDER}/prefgen_atelier.json"))
    graph = graphs.to_api(graphs.load(server.base / "atelier.json"), client.object_info())
    pictures = {
        graph[node]["_meta"]["title"]: np.asarray(Image.open(io.BytesIO(client.picture(entries[0]))), int)
        for node, entries in client.run(graph).items()
    }
    plain, leaning = pictures["Save without preference"], pictures["Save with preference"]
    assert plain.std() > 10 and np.abs(plain - leaning).mean() > 1


@pytest.mark.slow
def test_the_download_command_runs_from_the_unzipped_pack(server, environment):
    for command in (["-m", "prefgen.download"], ["prefgen/download"]):
        pack_folder = server.base / "custom_nodes" / FOLDER
        listed = subprocess.run([environment[0], *command], cwd=pack_folder, capture_output=True, text=True, check=True)
        assert "sdxl" in listed.stdout
