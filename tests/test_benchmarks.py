"""Every figure of docs/performance.md comes from a command: each runs at its smallest size, or says why it can't."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from prefgen.compat import has_nf4

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
PAGE = (ROOT / "docs/performance.md").read_text()
# Benchmark, its record, and where the record holds its rows: what of the page is written from it.
RECORDS = {
    "agents_scale": ("performance-data.json", "agents"),
    "branch_cost": ("performance-branch.json", ""),
    "branch_counts": ("performance-counts.json", ""),
    "branch_sums": ("performance-sums.json", ""),
    "flux_counts": ("performance-flux.json", ""),
    "full_size": ("performance-full-size.json", ""),
    "fuse_slider": ("performance-fuse.json", ""),
    "mllm_history": ("performance-mllm.json", "families"),
    "pickapic_scale": ("performance-pickapic.json", ""),
    "taste_listing": ("performance-tastes.json", ""),
    "user_attention_throughput": ("performance-training.json", ""),
}


def run(name, *options, **variables):
    line = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


def cells(text):
    """The rows of all tables of a page, without the lines under the heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if set("".join(row)) - {"-"}]


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_has_the_figures_of_the_record(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    if name == "pickapic_scale":
        pytest.importorskip("duckdb")
    record, key = RECORDS[name]
    content = json.loads((ROOT / "docs" / record).read_text())
    written = importlib.import_module(name).page(content[key] if key else content)
    assert f"benchmarks/{name}.py" in written
    published = cells(PAGE)
    missing = [row for row in cells(written) if row not in published]
    assert missing == []


def test_every_benchmark_that_the_page_prints_is_there():
    printed = set(re.findall(r"benchmarks/(\w+)\.py", PAGE))
    assert printed == {*RECORDS, "mllm_nf4"}


def published(ran, out, name):
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert f"benchmarks/{name}.py" in (out / "performance.md").read_text()
    record, key = RECORDS[name]
    content = json.loads((out / record).read_text())
    return content[key] if key else content


@pytest.mark.slow
def test_a_small_set_of_simulated_users_is_measured(tmp_path):
    (row,) = published(run("agents_scale", 0.0004, "--out", tmp_path), tmp_path, "agents_scale")
    assert (row["users"], row["pictures"]) == (20, 396)
    assert row["pictures_per_second"] > 0 and row["peak_memory_mb"] > 50 and row["check_seconds"] > 0


@pytest.mark.slow
def test_what_the_branch_adds_to_a_narrow_model_is_counted(tmp_path):
    """Of IPAdapter_plus too, where PREFGEN_NEIGHBOURS names a folder with it."""
    (row,) = published(run("branch_counts", "sd15", "--channels", 32, "--out", tmp_path), tmp_path, "branch_counts")
    first = row["tokens"]["4"]["first"]
    # Torch's attention, whose result is 64 x 64 tokens of 32 numbers beside one number a head and token, and a sum.
    result = 64 * 64 * 32 * 4
    assert first["ours"] == {"operators": 2, "bytes": 2 * result + 64 * 64 * 8 * 4, "reads": 0}
    assert first["both"] == {"operators": 2, "bytes": 2 * first["ours"]["bytes"], "reads": 0}
    if "theirs" in first:
        assert first["theirs"]["operators"] > 10 and first["theirs"]["bytes"] > 2 * first["ours"]["bytes"]


@pytest.mark.slow
def test_what_an_adapter_adds_to_a_narrow_flux_is_counted(tmp_path):
    """Of x-flux-comfyui too, where PREFGEN_NEIGHBOURS names a folder with it."""
    (row,) = published(run("flux_counts", "--heads", 2, "--side", 4, "--out", tmp_path), tmp_path, "flux_counts")
    few, many = row["tokens"]["4"], row["tokens"]["16"]
    # Nothing grows with the tokens of the adapter: K and V are there.
    assert few["ours"] == many["ours"] and few["ours"]["reads"] == 0 and few["ours"]["operators"] < 20
    if "theirs" in few:
        assert few["inside"]["operators"] > 6 and few["inside"]["bytes"] < many["inside"]["bytes"]


@pytest.mark.slow
def test_the_way_that_was_not_taken_is_right_in_fp32_alone(tmp_path):
    (row,) = published(run("branch_sums", "sdxl", "--rounds", 1, "--out", tmp_path), tmp_path, "branch_sums")
    for tokens in ("4", "16"):
        errors = {dtype: each[tokens] for dtype, each in row["precisions"].items()}
        assert errors["float32"]["error"] < 1e-5
        assert errors["bfloat16"]["error"] > 2 * errors["bfloat16"]["error_today"]


@pytest.mark.slow
def test_one_more_picture_is_measured_for_one_family(tmp_path):
    (row,) = published(run("mllm_history", "--family", "SmolVLM2", "--out", tmp_path), tmp_path, "mllm_history")
    assert row["added_seconds"] < row["whole_seconds"] and row["again_milliseconds"] < 1000 * row["added_seconds"]


@pytest.mark.slow
def test_a_slider_is_measured_with_a_narrow_adapter(tmp_path):
    (row,) = published(
        run("fuse_slider", "--times", 1, "--folder", tmp_path, "--out", tmp_path), tmp_path, "fuse_slider"
    )
    assert row["first_milliseconds"] > 0 and row["moved_milliseconds"]["median"] > 0


@pytest.mark.slow
def test_listing_a_small_taste_is_measured(tmp_path):
    (row,) = published(run("taste_listing", "--pictures", 12, "--out", tmp_path), tmp_path, "taste_listing")
    assert row["pictures"] == 12 and row["again_milliseconds"]["median"] > 0


@pytest.mark.slow
def test_cleaning_a_few_rows_is_measured_beside_pandas(tmp_path):
    if find_spec("pandas") is None:
        pytest.skip("the rules are written in pandas as well, which is not installed")
    row = published(run("pickapic_scale", "--rows", 3000, "--out", tmp_path), tmp_path, "pickapic_scale")["rows"]
    assert row["rows"] == 3000 and row["pandas_seconds"] > 0 and row["rules"]


@pytest.mark.slow
def test_cleaning_a_few_rows_with_pictures_is_measured(tmp_path):
    ran = run("pickapic_scale", "--pictures", 400, "--out", tmp_path)
    rows = published(ran, tmp_path, "pickapic_scale")["pictures"]
    assert [row["rows"] for row in rows] == [100, 400] and rows[1]["looked_at"] > rows[0]["looked_at"] > 0


@pytest.mark.slow
def test_a_round_of_training_is_measured_beside_the_port(tmp_path):
    options = ("--rounds", 1, "--pixels", 64, "--out", tmp_path)
    (row,) = published(run("user_attention_throughput", *options), tmp_path, "user_attention_throughput")
    assert row["ratio"]["median"] > 0 and row["seconds"]["plain"]["VAE"] > 0 and row["unet_gflop_a_step"] > 0


@pytest.mark.slow
def test_what_is_not_here_is_said_in_a_sentence(tmp_path):
    ran = run("branch_cost", "sd15", PREFGEN_NEIGHBOURS=str(tmp_path))
    assert ran.returncode == 1 and "checkout of ComfyUI_IPAdapter_plus" in ran.stderr and "Traceback" not in ran.stderr
    if not has_nf4():
        ran = run("mllm_nf4")
        assert ran.returncode == 1 and "bitsandbytes and accelerate" in ran.stderr and "Traceback" not in ran.stderr


# full_size has no small size: a checkpoint of SD1.5 in the published layout is 3 GB, and a step of it takes minutes.
