"""The alignment and the branch of real bases: the real scripts on tiny SD1.5 folders, killed and resumed, exported."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.adapter_file import load_adapter
from tests.closeness import assert_close, assert_learnt_alike
from tests.prefgen import ip_adapter_files
from tests.training import warm
from tests.training.commands import FSDP, start, until
from tests.training.tiny_bases import LAYERS, MLLM, world, write_config
from training import export, train_alignment, train_user_attention
from training.common.base import Base, BaseError, Text, cut
from training.common.bases import load_base
from training.common.cache import cached
from training.common.checkpoints import last_state
from training.common.config.command import load
from training.common.errors import exit_with_message
from training.common.user_branch import own_projections
from training.data.picture_shapes import nearest, shapes_of

STEPS = 3


def finished(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-2000:]
    return out


def done_at_once(stage, *words):
    ran = warm.run([sys.executable, "-m", f"training.{stage}", *words])
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world whose alignment and branch were trained by the two scripts, each in one go."""
    world_ = world(tmp_path_factory.mktemp("sd15"), "sd15")
    world_.options = ["--config", world_.config, "--runs", world_.runs, "--set", f"train_user_attention.steps={STEPS}"]
    done_at_once("train_alignment", *world_.options)
    looked = ["--set", "train_user_attention.pictures_every=2", "--set", "train_user_attention.heldout_every=2"]
    done_at_once("train_user_attention", *world_.options, *looked)
    return world_


def command(monkeypatch, module, *words):
    """A stage's `main` in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    with exit_with_message():
        module.main()


def alike(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            alike(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def test_a_run_killed_in_its_caches_and_stopped_between_steps_ends_where_a_straight_one_does(trained, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(trained.runs, runs)
    for path in [*runs.glob("latents*"), *runs.glob("sizes*"), *runs.glob("text*")]:
        path.unlink()
    shutil.rmtree(runs / "train_user_attention")
    options = [*trained.options[:2], "--runs", runs, *trained.options[4:]]  # without pictures: they change nothing

    process = start("train_user_attention", *options)
    until(process, (runs / "latents.json").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = json.loads((runs / "latents.json").read_text())["done"]
    assert 0 < done and not (runs / "text_states.npy").exists()

    process = start("train_user_attention", *options)
    until(process, (runs / "train_user_attention/log.jsonl").exists)
    process.terminate()
    process.communicate(timeout=900)
    assert process.returncode == 143 and last_state(runs / "train_user_attention")["step"] < STEPS

    finished(start("train_user_attention", *options))
    for name in ("latents.npy", "sizes.npy", "text_states.npy", "train_user_attention/adapter.safetensors"):
        assert (runs / name).read_bytes() == (trained.runs / name).read_bytes(), name
    alike(last_state(runs / "train_user_attention"), last_state(trained.runs / "train_user_attention"))


def test_a_run_leaves_the_split_of_its_time_and_pictures(trained):
    folder = trained.runs / "train_user_attention"
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert {"data", "teacher", "forward", "backward", "optimiser", "step"} <= line["seconds"].keys()
    assert line["grad"].keys() == {"projection", "to_k_ip", "to_v_ip"} and all(line["grad"].values())
    (samples,) = (folder / "samples").glob("users-*.png")
    assert Image.open(samples).size == (8 * 66 + 2, 66 + 2), "four users without and with, of 64 px and 2 px apart"
    figures = json.loads((folder / "done").read_text())
    assert figures["users"] == 2 and figures["heldout_loss_user"] != figures["heldout_loss_other_user"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (heldout,) = (line for line in lines if "heldout_loss_user" in line)
    assert heldout["step"] == 1 and heldout["heldout_loss_user"] != figures["heldout_loss_user"]


def test_an_export_is_the_averaged_branch_around_the_trained_aligner(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "taste.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", *map(str, trained.options), "--out", str(out)])
    with pytest.raises(SystemExit, match="another configuration than this command: pictures_every"):
        export.main()
    words = ("--set", "train_user_attention.pictures_every=2", "--out", out, "--dtype", "fp32")
    command(monkeypatch, export, *trained.options, *words)
    assert f"step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert out.read_bytes() == (trained.runs / "train_user_attention/adapter.safetensors").read_bytes()
    adapter, state = load_adapter(out), last_state(trained.runs / "train_user_attention")
    header = adapter.header
    assert (header.base_family, header.core_width, header.semantic_width) == ("sd15", MLLM["hidden_size"], 768)
    assert header.mllm == MLLM | {"sem_layers": [2, 3, 4, 5], "core_layer": 3}
    assert header.training["base"] == "sd15" and header.training["step"] == STEPS
    assert torch.equal(adapter.to_v_ip[7].weight, state["ema"]["to_v_ip.7.weight"])
    assert not torch.equal(adapter.to_v_ip[7].weight, state["model"]["to_v_ip.7.weight"])
    base = load_base(load(trained.config), without=("vae",))
    assert not torch.equal(adapter.to_v_ip[7].weight, own_projections(base.unet)[7][1]), "the average moves"
    aligner = last_state(trained.runs / "train_alignment")["model"]
    assert torch.equal(adapter.aligner.mlp[0].weight, aligner["mlp.0.weight"])


def test_an_unfinished_run_is_exported_only_when_asked(trained, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    shutil.copytree(trained.runs, runs)
    note = runs / "train_user_attention/config.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"steps": 90}))
    options = [*trained.options[:2], "--runs", runs, "--set", "train_user_attention.steps=90"]
    options += ["--set", "train_user_attention.pictures_every=2", "--out", tmp_path / "taste.safetensors"]
    with pytest.raises(SystemExit, match=f"is at step {STEPS} of 90: .* --unfinished"):
        command(monkeypatch, export, *options)
    assert not (tmp_path / "taste.safetensors").exists()
    command(monkeypatch, export, *options, "--unfinished")
    assert load_adapter(tmp_path / "taste.safetensors").header.training["step"] == STEPS


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["train_alignment", "train_user_attention"])
def test_two_processes_learn_as_one(trained, tmp_path, stage, environment):
    """The kernel sees the features of both; noise and what is dropped are those of the whole batch."""
    runs = tmp_path / "runs"
    shutil.copytree(trained.runs, runs)
    shutil.rmtree(runs / stage)
    options = [*trained.options[:2], "--runs", runs, *trained.options[4:]]
    finished(start(stage, *options, processes=2, environment=environment))
    one, two = (last_state(folder / stage)["model"] for folder in (trained.runs, runs))
    assert_learnt_alike(one, two, rate=getattr(load(trained.config), stage).lr)
    logs = [(folder / stage / "log.jsonl").read_text().splitlines()[0] for folder in (trained.runs, runs)]
    one, two = ([json.loads(line)[key] for key in ("loss", "grad_norm")] for line in logs)
    assert two == pytest.approx(one, 1e-4)


@pytest.fixture
def small(trained, tmp_path):
    """A function that makes a configuration with changes and a runs folder of its own that has the upstream."""

    def make(**changes):
        runs = tmp_path / "runs"
        shutil.copytree(trained.runs, runs, ignore=shutil.ignore_patterns("train_user_attention"))
        config = write_config(tmp_path / "run.yaml", "sd15", trained.base, trained.data, **changes)
        return runs, ["--config", config, "--runs", runs]

    return make


def refused(monkeypatch, module, options) -> str:
    with pytest.raises(SystemExit) as raised:
        command(monkeypatch, module, *options)
    said = str(raised.value)
    assert "\n" not in said and said.endswith((".", "`.")), said
    return said


def test_a_public_ip_adapter_is_where_the_branch_starts(small, tmp_path, monkeypatch):
    path = ip_adapter_files.write(tmp_path, "ip-adapter_sd15")
    stage = {"steps": 0, "distil": 0.0, "cache_text": False}
    runs, options = small(base={"ip_adapter": str(path)}, train_user_attention=stage)
    command(monkeypatch, train_user_attention, *options)
    ours, theirs = load_adapter(runs / "train_user_attention/adapter.safetensors"), load_adapter(path)
    for side in ("to_k_ip", "to_v_ip"):
        pairs = zip(getattr(ours, side), getattr(theirs, side), strict=True)
        assert all(torch.equal(layer.weight, other) for layer, other in pairs), side
    assert ours.header.training["ip_adapter"] == path.name


def test_what_does_not_belong_together_is_one_sentence(small, trained, tmp_path, monkeypatch):
    other = ip_adapter_files.write(tmp_path, "ip-adapter_sdxl")
    runs, options = small(base={"ip_adapter": str(other)})
    said = refused(monkeypatch, train_user_attention, options)
    assert said.startswith("base.ip_adapter: ") and "SDXL" in said and "SD1.5" in said

    layers = runs / "probe_layers/layers.json"
    layers.write_text(json.dumps({"sem_layers": [0, 1], "core_layer": LAYERS}))
    assert f"an MLLM of {LAYERS} layers" in refused(monkeypatch, train_alignment_anew(runs), options)
    index = runs / "extract/index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"world": "elsewhere"}))
    assert "are those of elsewhere" in refused(monkeypatch, train_user_attention, options)


def train_alignment_anew(runs):
    shutil.rmtree(runs / "train_alignment")
    return train_alignment


def test_a_batch_that_cannot_be_filled_and_half_precision_without_a_scaler_are_told(small, monkeypatch):
    runs, options = small(train_user_attention={"batch": 4000})
    assert "can't fill a batch of 4000" in refused(monkeypatch, train_user_attention, options)
    shutil.rmtree(runs / "train_user_attention")
    options += ["--set", "base.precision=fp16"]
    assert "loss scaler" in refused(monkeypatch, train_user_attention, options)


def test_users_whose_taste_nobody_can_say_are_not_aligned(small, monkeypatch):
    runs, options = small()
    monkeypatch.setattr("training.data.worlds.DataSetWorld.texts", lambda self, user: [])
    assert "only 0 have a taste in words" in refused(monkeypatch, train_alignment_anew(runs), options)


def test_a_base_of_another_family_or_of_none_is_told_before_it_is_loaded(trained, tmp_path):
    def refusal(**base):
        config = load(write_config(tmp_path / "run.yaml", "sd15", trained.base, trained.data, base=base))
        with pytest.raises(BaseError) as raised:
            load_base(config)
        return str(raised.value)

    assert refusal(family="sdxl") == f"base.path {trained.base} holds an SD1.5 model, base.family says sdxl."
    assert "is no diffusers folder" in refusal(path=str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(trained.base, damaged)
    (damaged / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "is damaged or cut off" in refusal(path=str(damaged))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    assert "save_pretrained" in refusal(path=str(tmp_path / "model.safetensors"))


def test_shapes_keep_the_area_and_the_proportions():
    shapes = shapes_of(1024)
    assert (1024, 1024) in shapes and (832, 1216) in shapes and (1216, 832) in shapes
    for height, width in shapes:
        assert height % 64 == width % 64 == 0 and 0.9 * 1024**2 < height * width <= 1024**2
        assert max(height / width, width / height) <= 2
    assert nearest(600, 900, shapes) == (832, 1216) and nearest(500, 500, shapes) == (1024, 1024)
    assert nearest(100, 5000, shapes) == (768, 1344), "the widest"


def test_pictures_that_are_not_square_keep_their_proportions(small, monkeypatch):
    """Every fourth picture is made twice as wide: batches are of one shape, and both are trained on."""
    from training.data.worlds import DataSetWorld

    decoded, seen = DataSetWorld.decoded, []

    def wide(self, numbers, long_side=None):
        pictures = decoded(self, numbers, long_side)
        return {n: np.concatenate([p, p], 1) if n % 4 == 0 else p for n, p in pictures.items()}

    predict = Base.predict

    def watched(self, noisy, *rest):
        seen.append(tuple(noisy.shape[2:]))
        return predict(self, noisy, *rest)

    monkeypatch.setattr(DataSetWorld, "decoded", wide)
    monkeypatch.setattr(Base, "predict", watched)
    monkeypatch.setattr(train_user_attention, "painted_smaller", lambda *_: None)
    runs, options = small(base={"aspects": True, "pixels": 192}, train_user_attention={"steps": 2})
    command(monkeypatch, train_user_attention, *options)
    latents = {path.stem: np.load(path, mmap_mode="r").shape for path in runs.glob("latents_*.npy")}
    assert latents.keys() == {"latents_128x256", "latents_192x192"}
    assert latents["latents_128x256"][1:] == (4, 16, 32) and latents["latents_192x192"][1:] == (4, 24, 24)
    assert seen[:4] in ([(16, 32)] * 2 + [(24, 24)] * 2, [(24, 24)] * 2 + [(16, 32)] * 2), "one shape a step"
    assert json.loads((runs / "train_user_attention/done").read_text())["heldout_loss_user"] > 0


def test_sdxl_is_told_the_shape_that_it_paints():
    from types import SimpleNamespace

    base = SimpleNamespace(family="sdxl", pixels=1024, device=torch.device("cpu"), dtype=torch.float32)
    text, sizes = Text(torch.zeros(1, 2, 4), torch.zeros(1, 6)), torch.tensor([[1301, 1013, 3, 5]])
    for shape, size in ((None, [1024, 1024]), ((832, 1216), [832, 1216])):
        added = Base.added_conditions(base, text, sizes, shape)
        assert added["time_ids"].tolist() == [[1301, 1013, 3, 5, *size]]


def test_min_snr_weighs_both_predictions_alike_in_terms_of_x0(trained):
    base = load_base(load(trained.config))
    assert not base.scheduler.config.clip_sample, "latents aren't bound to -1 to 1, whatever a base's file says"
    t = torch.tensor([0, 300, 999])
    snr = base.schedule.alphas[t] / (1 - base.schedule.alphas[t])
    assert_close(base.schedule.min_snr_weights(t, 5.0) * snr, snr.clamp(max=5.0), ulps=16)
    base.schedule.prediction = "v_prediction"
    assert_close(base.schedule.min_snr_weights(t, 5.0) * (snr + 1), snr.clamp(max=5.0), ulps=16)
    assert torch.equal(base.schedule.min_snr_weights(t, None), torch.ones(3))


def test_a_picture_is_cropped_to_its_middle_and_its_size_is_kept():
    picture = np.zeros((90, 180, 3), np.uint8)
    picture[:, 60:120] = 255
    cropped, sizes = cut(picture, 45, 45)
    assert cropped.shape == (45, 45, 3) and sizes == (90, 180, 0, 22) and cropped[:, 10:35].min() > 250


def test_a_cache_is_of_what_it_was_made_of_and_needs_room(tmp_path, monkeypatch):
    def fill(start, stop):
        return {"rows": np.arange(start, stop)[:, None]}

    def make(count, **key):
        return cached(tmp_path, "rows", count, {"rows": ((1,), np.int64)}, key, fill, 4)["rows"]

    assert make(10, base="a")[:, 0].tolist() == list(range(10))
    (tmp_path / "rows.npy").unlink()
    assert make(10, base="a")[:, 0].tolist() == list(range(10)), "a file that is gone is made again"
    with pytest.raises(SystemExit, match=r"rows.json was made for another base .* delete rows.\* there"):
        make(10, base="b")
    (tmp_path / "rows.json").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 8})())
    with pytest.raises(SystemExit, match="make room"):
        make(10, base="b")
