"""The second edition after its base models: PrefGen's stages, the teacher and the evaluation, on random weights."""

import json

import pytest

from tests.training import tiny_world

# Enough to run every line.
SMALL = {
    "train_mllm": "steps=2 batch=12 pictures=3",
    "extract": "histories=2 pictures=4",
    "probe_layers": "users=2 histories=2 pictures=2",
    "train_alignment": "steps=2 batch=8 bank=16",
    "train_user_attention": "steps=2 batch=4 users=2 warmup=1",
}


def stage(name, folder, *more):
    """A stage's line of `tiny_world.run`."""
    changes = [f"{name}.{change}" for change in SMALL[name].split()]
    changes += [f"data.path={folder / 'people'}", *more]
    words = " ".join(f"--set {change}" for change in changes)
    return f"{name} --config world --runs {folder / 'runs'} {words}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_world.run(folder, "atelier.world.tokenizers", "weights", "people", *(stage(name, folder) for name in SMALL))
    return folder


@pytest.mark.slow
def test_every_stage_runs_on_the_second_world_and_leaves_an_adapter_of_it(trained):
    from prefgen.adapter_file import load_adapter
    from prefgen.atelier.editions import SECOND

    header = load_adapter(trained / "weights/adapter.safetensors").header
    assert header.base_family == "atelier" and header.semantic_width == 2 * SECOND.clip_text["projection_dim"]
    assert header.training["distil"] == 0.5
    assert (trained / "runs/atelier.world.captioning/mllm/model.safetensors").exists()
    figures = json.loads((trained / "runs/train_user_attention/done").read_text())
    assert {"heldout_loss_user", "heldout_loss_no_user"} <= set(figures)
    index = json.loads((trained / "runs/extract/index.json").read_text())
    assert index["mllm"]["hidden_size"] == 192 and "examples" not in index["clip_vision"]
    log = [json.loads(line) for line in (trained / "runs/train_user_attention/log.jsonl").read_text().splitlines()]
    assert any("distil" in line for line in log)


@pytest.mark.slow
def test_arms_are_trained_anew_and_evaluated_beside_the_method_and_the_same_command_goes_on(trained):
    changes = [change for name in SMALL for change in stage(name, trained).split()[5:]]
    arms = f"evaluation.world.arms prefgen pooled_tokens blind_image blind --seeds 1 --runs {trained / 'runs'}"
    arms += f" --out {trained / 'arms'} {' '.join(changes)}"
    rows = "mismatched prefgen captioning reference blind"
    measure = f"evaluation.world --arms {trained / 'arms'} --runs {trained / 'painted'} --out {trained / 'evidence'}"
    measure += f" --users 4 --prompts 2 --each 1 --pictures 1 --choosing 2 --rows {rows} trait_oracle"
    tiny_world.run(trained, arms, measure)
    record = json.loads((trained / "arms/arms.json").read_text())
    assert (
        set(record["done"]) == {"prefgen", "pooled_tokens", "blind", "blind_image"}
        and "no_core seed 0" in record["missing"]
    )
    result = json.loads((trained / "evidence/world.json").read_text())
    assert result["left_out"] == ["captioning"]
    table = result["tables"]["1"]["rows"]
    # A random judge sees one scene in all pictures, so the figures say nothing; but the pictures are others.
    assert table["render_oracle"]["sharpness"] == 1.0 != table["prefgen"]["sharpness"]
    assert result["partners_overlap"] is not None and "render_back" in table["trait_oracle"]
    assert table["mismatched"]["versions"] == 3 and table["prefgen"]["versions"] == 1
    assert result["tuned"]["reference"]["reference"] in (0.1, 0.3, 1.0)
    assert "Not run**: captioning" in (trained / "evidence/world.md").read_text()
    painted = sorted((trained / "painted").rglob("*.json"))
    before = [path.stat().st_mtime_ns for path in painted]
    tiny_world.run(trained, measure)
    assert [path.stat().st_mtime_ns for path in painted] == before
