"""Every graph we ship: wired without loose ends and known to the real server. Those of the atelier are run by it; the
others, whose weights nobody downloads for a test, are queued with files under the names that they ask for, and stopped
before they load one: ComfyUI then checks every input of every node."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefgen.download.fetch import load_sets
from scripts import graph as graphs
from scripts import setup_env, templates
from scripts.comfy_server import ROOT, ComfyServer, GraphError

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OF_THE_ATELIER = ("prefgen_atelier", "two_tastes_one_canvas", "ideation_sheet")
RUN = [path for path in WORKFLOWS if path.stem in OF_THE_ATELIER]
VALIDATED = [path for path in WORKFLOWS if path.stem not in OF_THE_ATELIER]
# Loaders of core and the folder that each of their files is in.
LOADED = {
    "ckpt_name": "checkpoints",
    "clip_name": "clip_vision",
    "unet_name": "diffusion_models",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
}


def by_name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    for path in VALIDATED:
        for node in graphs.load(path)["nodes"]:
            for entry, name in named_files(node):
                stand_in = base / "models" / LOADED[entry] / name
                stand_in.parent.mkdir(parents=True, exist_ok=True)
                stand_in.touch()
    for name in ("ip-adapter-plus_sd15", "ip-adapter-plus_sdxl_vit-h", "flux-ip-adapter-v2"):
        stand_in = base / "models" / "ipadapter" / f"{name}.safetensors"
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.touch()
    (base / "input").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(base / "input" / "example.png")
    # Without its cache ComfyUI runs every node each time, so that "twice" means twice.
    comfyui = setup_env.find_comfyui()
    with ComfyServer(comfyui, base, threads=2, arguments=["--cache-none"]) as server, server.client() as connected:
        yield connected


def named_files(node) -> list[tuple[str, str]]:
    """[(widget, file)] of what a node of core loads."""
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    values = dict(zip(widgets, node.get("widgets_values", []), strict=False))
    return [(name, values[name]) for name in widgets if name in LOADED]


def test_each_template_is_there_with_a_square_picture():
    assert [path.stem for path in WORKFLOWS] == sorted(templates.TEMPLATES) and len(WORKFLOWS) >= 9
    for path in WORKFLOWS:
        width, height = Image.open(path.with_suffix(".jpg")).size
        assert width == height >= 256, path.stem


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_a_note_says_in_three_sentences_of_two_languages_what_to_do_and_which_files_to_fetch(path):
    said = templates.NOTES[path.stem]
    assert len(said["en"]) == len(said["zh"]) == 3 and said["title"]
    (note,) = (node for node in graphs.load(path)["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert all(sentence in text for sentence in (*said["en"], *said["zh"]))
    assert all(sentence.endswith(".") for sentence in said["en"])
    assert all(sentence.endswith("。") for sentence in said["zh"])
    if path in VALIDATED:
        named = [name for name in load_sets() if f"`python -m prefgen.download {name}`" in text]
        assert len(named) == 1
        files = {Path(file.to).name for file in load_sets()[named[0]].files}
        graph = json.dumps(graphs.load(path))
        for name in ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"):
            assert name not in graph or name in files or path.stem == "my_taste_sd15"


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_a_workflow_is_wired_without_loose_ends(path):
    workflow = graphs.load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) <= workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) <= workflow["last_link_id"]
    for number, origin, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        assert kind == nodes[origin]["outputs"][slot]["type"]
        assert nodes[target]["inputs"][entry]["type"] in (kind, "*")


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_results_stand_where_the_page_opens_and_no_node_lies_on_another(path):
    workflow = graphs.load(path)
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    view = workflow["extra"]["ds"]
    for node in workflow["nodes"]:
        if node["type"] in ("SaveImage", "MarkdownNote"):
            right, bottom = (
                (node["pos"][axis] + node["size"][axis] + view["offset"][axis]) * view["scale"] for axis in (0, 1)
            )
            assert right < 1280 and bottom < 720, node["type"]
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, other_width, other_height in boxes[:i]:
            is_clear = x >= left + other_width or left >= x + width or y >= top + other_height or top >= y + height
            assert is_clear, (path.stem, (x, y), (left, top))


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_a_workflows_sockets_and_widgets_are_those_of_the_server(path, client):
    info = client.object_info()
    for node in graphs.load(path)["nodes"]:
        if node["type"] in graphs.NOTES:
            continue
        schema = info[node["type"]]
        inputs = [name for group in ("required", "optional") for name in schema["input"].get(group, {})]
        assert [entry["name"] for entry in node["inputs"]] == inputs, node["type"]
        assert len(node["widgets_values"]) == len(graphs.widget_names(schema)), node["type"]
        outputs = [output["type"] for output in node["outputs"]]
        # Newer cores gave outputs to nodes that had none (Save Image passes its picture on).
        assert outputs == schema["output"][: len(outputs)], node["type"]
        assert outputs == schema["output"] or not node["type"].startswith("PrefGen_"), node["type"]


@pytest.mark.slow
def test_the_template_browser_lists_the_graphs(client):
    assert set(client.get("/api/workflow_templates")["prefgen"]) == set(templates.TEMPLATES)


@pytest.mark.slow
@pytest.mark.parametrize("path", VALIDATED, ids=by_name)
def test_a_workflow_that_needs_weights_is_accepted_by_the_server(path, client):
    """ComfyUI checks types, ranges and choices of all nodes before it runs one; the stand-ins are empty files."""
    graph = graphs.to_api(graphs.load(path), client.object_info())
    # A refusal is said here, and what is queued stops at the first loader.
    prompt_id = client.queue(graph)
    with pytest.raises(GraphError, match="Loader"):
        client.wait(prompt_id)


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=by_name)
def test_a_workflow_runs_twice_to_the_same_pictures(path, client, first_run):
    graph, first = first_run(path)
    second = rendered(client, graph)
    assert first.keys() == second.keys() and first
    assert all((first[title] == second[title]).all() for title in first)


@pytest.mark.slow
def test_the_template_paints_another_picture_with_a_preference_and_the_plain_one_at_weight_zero(client, first_run):
    graph, pictures = first_run(ROOT / "workflows" / "prefgen_atelier.json")
    plain, leaning = pictures["Save without preference"], pictures["Save with preference"]
    assert np.abs(plain.astype(int) - leaning).mean() > 1
    output = graphs.find(graph, "SaveImage", "Save with preference")
    weightless = graphs.only(graph, [output])
    weightless[graphs.find(weightless, "PrefGen_ApplyUserCrossAttention")]["inputs"]["weight"] = 0.0
    assert (rendered(client, weightless)["Save with preference"] == plain).all()


@pytest.mark.slow
def test_two_tastes_differ_from_each_other_in_each_half(client, first_run):
    graph, pictures = first_run(ROOT / "workflows" / "two_tastes_one_canvas.json")
    plain, both = (pictures[f"Save {title} preference"].astype(int) for title in ("without", "with"))
    halves = [np.abs(plain - both)[:, half].mean() for half in (slice(0, 64), slice(64, 128))]
    assert min(halves) > 1


@pytest.mark.slow
def test_the_sheet_has_a_row_a_taste_and_the_same_picture_where_its_strength_is_none(client, first_run):
    _, pictures = first_run(ROOT / "workflows" / "ideation_sheet.json")
    sheet = pictures["Save the sheet"].astype(int)
    left, top, step = sheet.shape[1] - 3 * 134, sheet.shape[0] - 3 * 134, 134
    cells = [[sheet[top + r * step :, left + c * step :][:128, :128] for c in range(3)] for r in range(3)]
    assert all((row[0] == cells[0][0]).all() for row in cells)
    tasted = [cell for row in cells for cell in row[1:]]
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(tasted) for b in tasted[:i])


@pytest.fixture(scope="module")
def first_run(client):
    """A function that gives a workflow's graph and its pictures, painted once for all tests."""

    @functools.cache
    def run(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
        graph = graphs.to_api(graphs.load(path), client.object_info())
        return graph, rendered(client, graph)

    return run


def rendered(client, graph: dict) -> dict[str, np.ndarray]:
    """Run a graph and return its saved pictures by the title of their node."""
    pictures = {}
    for node_id, entries in client.run(graph).items():
        if graph[node_id]["class_type"] == "SaveImage":
            data = client.picture(entries[0])
            pictures[graph[node_id]["_meta"]["title"]] = np.asarray(Image.open(io.BytesIO(data)))
    return pictures
