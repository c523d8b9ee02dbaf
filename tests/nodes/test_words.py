"""What an artist reads on a node: locales/ says what the schemas say, and a help page names every input."""

import asyncio
import json
from pathlib import Path

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
