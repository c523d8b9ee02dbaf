"""Every stage's own script, from nothing to an adapter, at a few steps; the result runs in the engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training import warm

ROOT = Path(__file__).resolve().parents[2]
# In the pipeline's order; enough steps to run every line, far too few to learn anything.
STAGES = {
    "atelier.pool": ["count=160", "processes=1"],
    "atelier.vae": ["steps=3", "batch=4"],
    "atelier.clip": ["steps=2", "batch=8"],
    "atelier.judge": ["steps=2", "batch=8", "heldout=8"],
    "atelier.unet": ["steps=2", "batch=4", "pictures=2"],
    "atelier.mllm_vision": ["steps=2", "batch=8"],
    "train_mllm": ["steps=2", "batch=8", "users=30"],
    "extract": ["users=60", "histories=2"],
    "probe_layers": ["users=4", "histories=2", "pictures=2"],
    "train_alignment": ["steps=3", "batch=32"],
    "train_user_attention": ["steps=2", "batch=4", "users=2"],
}


def changed(name, changes):
    """The options that make these changes in a stage's section."""
    return [word for change in changes for word in ("--set", f"{name}.{change}")]


def stage(name, folder, *options, weights=None):
    environment = os.environ | {"PREFGEN_ATELIER_WEIGHTS": str(weights or folder / "weights")}
    runs = [] if name == "atelier.tokenizers" else ["--runs", str(folder / "runs"), "--threads", "2"]
    return warm.run([sys.executable, "-m", f"training.{name}", *runs, *options], env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from nothing")
    for name, options in {"atelier.tokenizers": [], **STAGES}.items():
        result = stage(name, folder, *changed(name, options))
        assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"
    return folder


pytestmark = pytest.mark.slow


def test_every_stage_leaves_figures_a_log_and_its_configuration(trained):
    for name, changes in STAGES.items():
        folder = trained / "runs" / name
        assert json.loads((folder / "done").read_text()), name
        config = json.loads((folder / "config.json").read_text())
        for key, value in (change.split("=") for change in changes):
            assert config[key] == int(value)
        assert (folder / "log.jsonl").exists() == any(change.startswith("steps=") for change in changes), name
    figures = json.loads((trained / "runs/train_user_attention/done").read_text())
    assert {"none", "mismatched", "prefgen", "oracle"} <= set(figures)


def test_the_pipeline_writes_the_weights_that_the_atelier_loads(trained):
    from prefgen.adapter_file import load_adapter
    from prefgen.history import PreferenceHistory
    from prefgen.mllm.model import PreferenceMLLM

    weights = trained / "weights"
    assert {path.stem for path in weights.glob("*.safetensors")} == {"adapter", "clip", "judge", "unet", "vae"}
    mllm = PreferenceMLLM.load(weights / "mllm")
    adapter = load_adapter(weights / "adapter.safetensors")
    assert adapter.header.mllm["revision"] == mllm.fingerprint["revision"]
    assert adapter.header.mllm["num_layers"] == mllm.fingerprint["num_layers"]
    import torch

    hidden = mllm.encode(PreferenceHistory.from_images([torch.rand(128, 128, 3)]))
    assert torch.isfinite(adapter.semantic(hidden[None])).all()


def test_a_finished_stage_is_skipped_and_a_changed_one_refused(trained):
    before = (trained / "runs/atelier.vae/checkpoints/step-00000003.pt").stat().st_mtime_ns
    assert stage("atelier.vae", trained, *changed("atelier.vae", STAGES["atelier.vae"])).returncode == 0
    assert (trained / "runs/atelier.vae/checkpoints/step-00000003.pt").stat().st_mtime_ns == before
    other = stage("atelier.vae", trained, "--set", "atelier.vae.steps=9")
    assert other.returncode != 0 and "another configuration" in other.stderr


def test_a_stage_can_start_from_earlier_weights(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/atelier.pool").symlink_to(trained / "runs/atelier.pool")
    result = stage(
        "atelier.vae",
        tmp_path,
        *changed("atelier.vae", STAGES["atelier.vae"]),
        "--start-from",
        str(trained / "weights"),
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "starts from" in result.stdout and "(0 tensors are new)" in result.stdout


def without_users(changes) -> tuple[str, ...]:
    return tuple(change for change in changes if not change.startswith("users="))


def test_ablations_change_one_thing_and_share_the_rest(trained, tmp_path, monkeypatch):
    from training.evaluation import ablations

    weights = trained / "weights"
    monkeypatch.setattr(ablations, "WEIGHTS", weights)
    small = {
        name: replace(a, stages={s: (*STAGES[s], *without_users(changes)) for s, changes in a.stages.items()})
        for name, a in ablations.ABLATIONS.items()
    }
    monkeypatch.setattr(ablations, "ABLATIONS", small)
    monkeypatch.setattr(subprocess, "run", warm.run)
    words = ["--runs", str(trained / "runs"), "--out", str(tmp_path), "--steps", "2", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["ablations", *words])
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in (*weights.rglob("*"), *(trained / "runs").rglob("*"))}
    ablations.main()
    assert before == {path: path.stat().st_mtime_ns for path in before}, "the shipped ones and their runs stay"

    def part(name, key, folder=tmp_path):
        from safetensors.torch import load_file

        return load_file(str(folder / name / "weights/adapter.safetensors"))[key]

    shipped = part("", "prefgen.aligner.mlp.0.weight", trained)
    assert part("first_layers", "prefgen.aligner.mlp.0.weight").shape == shipped.shape
    assert not part("pointwise", "prefgen.aligner.mlp.0.weight").equal(shipped)
    from prefgen.adapter_file import load_adapter
    from prefgen.mllm.model import PreferenceMLLM

    headers = {name: load_adapter(tmp_path / name / "weights/adapter.safetensors").header for name in small}
    image = headers["image_only"]
    assert image.training["parts"] == ["image"] and image.user_width == image.image_width and image.mllm is None
    blind = headers["blind_image"]
    runs = tmp_path / "blind_image/runs"
    config = json.loads((runs / "train_user_attention/config.json").read_text())
    assert blind.training["parts"] == ["image"] and config["distil"] == 0
    assert not (runs / "extract").is_symlink() and (runs / "atelier.pool").is_symlink()
    assert (
        headers["first_layers"].mllm["sem_layers"] == [0, 1, 2, 3] and headers["first_layers"].mllm["core_layer"] == 1
    )
    untuned = PreferenceMLLM.load(tmp_path / "untuned/weights/mllm").fingerprint["revision"]
    assert untuned == headers["untuned"].mllm["revision"] != headers["pointwise"].mllm["revision"]


def test_a_stage_without_its_pool_says_what_to_run_first(tmp_path):
    result = stage("atelier.vae", tmp_path)
    assert result.returncode != 0 and "training.atelier.pool" in result.stderr
    assert "Traceback" not in result.stderr


def demo_report(prefgen: float) -> dict:
    """A report as the demo leaves it, with this alignment under the user's own preference."""
    means = {"none": 0.0, "mismatched": -0.01, "prefgen": prefgen, "oracle": 0.6}
    entries = {name: {"mean": mean, "ci95": [mean - 0.05, mean + 0.05], "n": 72} for name, mean in means.items()}
    return {
        "command": "make demo",
        "users": 18,
        "prompts": 4,
        "seconds": 131.0,
        "alignment": entries,
        "differences": {"mismatched - none": {"mean": -0.01, "ci95": [-0.04, 0.02], "n": 72}},
        "gain_share": prefgen / 0.6,
        "subject_accuracy": {name: {"mean": 0.9, "ci95": [0.85, 0.95], "n": 72} for name in means},
    }


def report(trained, folder, runs=None):
    paths = {"runs": runs or trained / "runs", "out": folder / "evidence"}
    paths |= {name: folder / f"{name}.json" for name in ("demo", "wide")}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "training.evaluation.atelier_report", *options]
    return warm.run(command)


def test_the_evidence_page_says_of_each_bar_whether_it_is_reached(trained, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(demo_report(0.4321)))
    (tmp_path / "wide.json").write_text(json.dumps(demo_report(0.2345)))
    result = report(trained, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    page = (tmp_path / "evidence/atelier.md").read_text()
    bars = [line for line in page.splitlines() if "share of that gain" in line]
    assert "0.72" in bars[0] and "yes" in bars[0] and "0.39" in bars[1] and "**no**" in bars[1]
    assert "0.432" in page and "0.234" in page
    vae = json.loads((trained / "runs/atelier.vae/done").read_text())
    assert f"mean absolute error {vae['l1']:.3f}" in page
    record = json.loads((tmp_path / "evidence/atelier.json").read_text())
    assert record["atelier.vae"] == vae and record["demo"]["gain_share"] == pytest.approx(0.4321 / 0.6)

    # Runs on a base and an MLLM that were kept: what is known of them stays.
    (tmp_path / "runs").mkdir()
    for name in STAGES:
        if not name.startswith("atelier.") and name != "train_mllm":
            (tmp_path / "runs" / name).symlink_to(trained / "runs" / name)
    again = report(trained, tmp_path, tmp_path / "runs")
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "evidence/atelier.json").read_text()) == record


def test_no_evidence_page_without_the_demo(trained, tmp_path):
    result = report(trained, tmp_path)
    assert result.returncode != 0 and "demo.json is missing" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "evidence").exists()
