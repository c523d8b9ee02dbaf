"""What an artist reads on a node: locales/ says what the schemas say, and a help page names every input."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
LOCALE = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(node) -> dict:
    """A node's entry of nodeDefs.json, from its schema."""
    schema = node.define_schema()
    entry = {"display_name": schema.display_name, "description": schema.description}
    if schema.inputs:
        entry["inputs"] = {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs}
    entry["outputs"] = {
        str(number): {"name": output.display_name, "tooltip": output.tooltip}
        for number, output in enumerate(schema.outputs)
    }
    return entry


@pytest.fixture(scope="module")
def nodes(pack):
    """Every node class of the pack by its id."""
    classes = asyncio.run(pack("nodes").PrefGenExtension().get_node_list())
    return {node.define_schema().node_id: node for node in classes}


def test_the_english_locale_says_what_the_schemas_say(nodes):
    assert {name: texts(node) for name, node in nodes.items()} == LOCALE


def test_every_node_has_a_help_page_that_names_its_inputs(nodes):
    for name, node in nodes.items():
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        schema = node.define_schema()
        assert page.startswith(f"# {schema.display_name}\n")
        if name != "PrefGen_LoadPreferenceHistory":  # its one input is a folder, drawn as a tree
            assert all(entry.id in page for entry in schema.inputs), name


def outline(page: str) -> list[tuple[str, int]]:
    """A help page's paragraphs by their kind: headings, lists, and tables with their number of rows."""
    parts = []
    for part in page.strip().split("\n\n"):
        kind = part[0] if part[0] in "#|`" else "1" if part[0].isdigit() else "text"
        parts.append((kind, part.count("\n")))
    return parts


LANGUAGES = [folder.name for folder in (ROOT / "locales").iterdir() if folder.name != "en"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_help_page_is_there_in_another_language_paragraph_by_paragraph(nodes, language):
    own = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for name in nodes:
        english = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        page = (ROOT / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {own[name]['display_name']}\n"), name
        assert outline(page) == outline(english), name
        # What an artist types or looks for stays as it is.
        assert set(re.findall(r"`([^`\n]+)`", page)) == set(re.findall(r"`([^`\n]+)`", english)), name
        inputs = [entry.id for entry in nodes[name].define_schema().inputs]
        assert all(entry in page for entry in inputs if entry in english), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_another_language_has_every_text_and_leaves_names_of_sockets_alone(language):
    translated = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert list(translated) == list(LOCALE)
    for name, entry in LOCALE.items():
        own = translated[name]
        assert own["display_name"] != entry["display_name"] and own["description"] != entry["description"], name
        for side in ("inputs", "outputs"):
            assert own.get(side, {}).keys() == entry.get(side, {}).keys(), name
            for key, text in entry.get(side, {}).items():
                assert own[side][key]["name"] == text["name"] and own[side][key]["tooltip"], (name, key)
                # What an artist types or chooses stays as it is: paths, options, examples.
                assert own[side][key]["tooltip"] != text["tooltip"], (name, key)


def test_a_comfyui_that_takes_search_words_gets_them_and_an_older_one_none(pack, monkeypatch):
    sockets = pack("nodes.sockets")
    for names, expected in ((["node_id"], {}), (["node_id", "search_aliases"], {"search_aliases": ["taste", "style"]})):
        schema = dataclasses.make_dataclass("Schema", names)
        monkeypatch.setattr(sockets, "io", SimpleNamespace(Schema=schema))
        assert sockets.searched("taste", "style") == expected
