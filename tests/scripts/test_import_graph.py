"""Imports run one way: nodes -> prefgen <- training, and in training common <- data <- evaluation and the stages.

Read from the sources, so that imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import graphlib
import importlib.util
from functools import cache

import pytest

from scripts.comfy_server import ROOT

ROOMS = ("nodes", "prefgen", "training", "scripts")
STAGES = ("train_mllm", "probe_layers", "extract", "train_alignment", "train_user_attention", "export")
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "node_helpers",
    "server",
}


@cache
def sources():
    """{dotted name: path} of every module of the rooms."""
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported_names(path):
    """The absolute names that a file imports: of `from a import b` both a.b and, where that is no module of ours, a."""
    # The nodes reach `..prefgen` from the folder that ComfyUI imports: one package above the rooms.
    package = ("pack." + path.relative_to(ROOT).parent.as_posix().replace("/", ".")).removesuffix("..")
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package).removeprefix("pack.") if node.level else relative
            members = [f"{base}.{alias.name}" for alias in node.names]
            names += [member if member in sources() else base for member in members]
    return names


@cache
def graph():
    """{module: what of our own it imports}."""
    return {
        module: {name for name in imported_names(path) if name in sources()} - {module}
        for module, path in sources().items()
    }


def crossing(importers, imported):
    """The imports from one group of packages or modules to another, for the message of a test."""

    def below(module, tops):
        return any(module == top or module.startswith(f"{top}.") for top in tops)

    return sorted(
        f"{module} -> {other}"
        for module, others in graph().items()
        if below(module, importers)
        for other in others
        if below(other, imported) and not below(other, importers)
    )


def test_the_graph_is_read_with_imports_inside_functions_and_relative_ones():
    """The control of the search itself."""
    assert "prefgen.comfy.patcher" in graph()["nodes.user"]
    assert sum(len(others) for others in graph().values()) > 200


def test_there_is_no_circle():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("importers", "imported"),
    [
        ("prefgen", "nodes training scripts"),
        ("nodes", "training scripts"),
        ("training", "nodes scripts"),
        ("training.common", "training"),
        ("training.data", "training.evaluation"),
    ],
)
def test_imports_run_one_way(importers, imported):
    assert crossing(importers.split(), imported.split()) == []


def test_nobody_imports_a_stage():
    stages = [f"training.{stage}" for stage in STAGES]
    assert set(stages) <= graph().keys()
    importers = [module for module in graph() if module not in stages] + stages
    imports = [f"{module} -> {other}" for module in importers for other in graph()[module] if other in stages]
    assert imports == []


def test_only_the_nodes_and_the_engines_comfy_room_import_comfyui():
    importers = {
        module for module, path in sources().items() if {name.split(".")[0] for name in imported_names(path)} & COMFYUI
    }
    assert {module for module in importers if not module.startswith(("nodes", "prefgen.comfy"))} == set()
    assert "prefgen.comfy.patcher" in importers
