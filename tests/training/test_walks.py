"""The pages' walks, command by command as they are printed: ratings in, a file out that ComfyUI's pack and stock
diffusers load. On tiny random models, in one process; each stage is its own command's `main`.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from prefgen.adapter_file import load_adapter
from prefgen.pipeline import UserReader, put_on
from prefgen.tastes.taste import Taste
from tests.closeness import assert_far
from tests.prefgen import tiny_mllms
from tests.training import pickapic_tables, tiny_bases, tiny_clip
from tests.training.commands import ROOT
from training.common.config.command import FOLDER
from training.common.config.schema import STAGES
from training.data import engine
from training.data.schema import LIKED
from training.data.worlds import DataSetWorld

IMAGE = 16
MLLM = "models/mllm/SmolVLM2-2.2B-Instruct"
CLIP = "models/CLIP-ViT-H-14-laion2B-s32B-b79K"
BASE = "models/stable-diffusion-v1-5"
ADAPTER = "models/ipadapter/ip-adapter_sd15.safetensors"
# As little of every stage as can be run.
SHORT = {
    "train_mllm": {"users": 0, "steps": 2, "batch": 8, "accumulate": 1, "pictures": 3, "others": 0.25, "lr": 1e-4},
    "extract": {"pictures": 3, "batch": 8},
    "probe_layers": {"users": 2, "histories": 2, "pictures": 2},
    "train_alignment": {"steps": 2, "batch": 16, "bank": 16, "hidden": 24},
    "train_user_attention": {"steps": 2, "batch": 4, "accumulate": 1, "warmup": 1, "ema": 0.9, "users": 2},
}


def write_models(family="sd15", mllm="SmolVLM2"):
    """The files that the pages name, below the working folder."""
    tiny_bases.write_base(BASE, family)
    tiny_mllms.write_folder(mkdir(MLLM), mllm)
    torch.manual_seed(3)
    # Whole, since compare reads texts with it as well.
    tiny_clip.write(mkdir(CLIP), seed=4, projection=IMAGE)
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    text = unet.config.cross_attention_dim
    tensors = {"image_proj.proj.weight": torch.randn(4 * text, IMAGE), "image_proj.proj.bias": torch.zeros(4 * text)}
    tensors |= {"image_proj.norm.weight": torch.ones(text), "image_proj.norm.bias": torch.zeros(text)}
    for i, name in enumerate(names):
        for side in "kv":
            width = unet.get_submodule(name).to_k.out_features
            tensors[f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight"] = torch.randn(width, text) / text**0.5
    mkdir(os.path.dirname(ADAPTER))
    save_file(tensors, ADAPTER)


def mkdir(path):
    os.makedirs(path, exist_ok=True)
    return Path(path)


def picture(likes_red, number):
    """Red for those who like red, blue for the others; every one of its own."""
    pixels = np.random.default_rng(number).integers(0, 120, (80, 80, 3), np.uint8)
    pixels[..., 0 if likes_red else 2] += 130
    return Image.fromarray(pixels)


def shortened(content, name, **changes):
    """A configuration of a page or of ours, with its stages cut short and fp32 models."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    sections = {"base": {"pixels": tiny_bases.PIXELS, "precision": "fp32"}} | SHORT | changes
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    with open(name, "w") as file:
        yaml.safe_dump(content, file)
    return name


def blocks(page, language=""):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [block for of, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if of == language]


def walk(lines, names=()):
    """Run lines of `python -m MODULE WORDS` in this process; names: {a printed word: another}."""
    ran = []
    for line in lines:
        words = [dict(names).get(word, word) for word in shlex.split(line, comments=True)]
        if words[:2] != ["python", "-m"]:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[2:])
            # Workers would import everything anew.
            patch.setattr(engine, "cores", lambda: 1)
            try:
                runpy.run_module(words[2], run_name="__main__")
            except SystemExit as end:
                assert end.code in (0, None), (line, end.code)
        ran.append(words[2])
    return ran


def check_paints(adapter, mllm=None, lora=None):
    """The pack's own reader and stock diffusers load the file, and a user changes the picture."""
    reader = UserReader(adapter, CLIP, mllm, lora)
    liked = [picture(True, number) for number in range(3)]
    user = reader.read(liked, [picture(False, 9)])
    assert torch.isfinite(user.vector).all() and user.vector.any()
    pipeline = DiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    put_on(pipeline, adapter, weight=1.0)

    def paint(embeds):
        noise = torch.Generator().manual_seed(1)
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline("a sea", generator=noise, **size, ip_adapter_image_embeds=embeds).images

    nobody = [torch.zeros_like(each) for each in user.embeds(pipeline)]
    assert_far(paint(user.embeds(pipeline)), paint(nobody))
    return user.header


def test_one_artists_taste_becomes_an_adapter_by_the_pages_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models()
    folder = mkdir("ComfyUI/input/prefgen/sea")
    taste = Taste(folder)
    for number in range(24):
        path = tmp_path / "picture.png"
        picture(number % 2 == 0, number).save(path)
        taste.rate(path.read_bytes(), "liked" if number % 2 == 0 else "disliked", f"{number}.png", moment=1e9 + number)
    content = yaml.safe_load((FOLDER / "sd15_own.yaml").read_text())
    histories = {"extract": SHORT["extract"] | {"histories": 8}}
    config = shortened(content, "own.yaml", **histories)
    (page,) = blocks("own_adapter.md")
    ran = walk(page.splitlines(), {"sd15_own": config})
    assert ran == [
        "training.data",
        "training.data",
        "training.extract",
        "training.train_user_attention",
        "training.export",
    ]
    header = check_paints("sea.safetensors")
    assert (header.semantic_width, header.core_width, header.image_width, header.mllm) == (0, 0, IMAGE, None)
    assert header.clip_vision["fixed_picture"] and "| data | own, a set of kind ratings |" in open("sea.md").read()
    # What the page says of the other stages: they end at once.
    skipped = [
        f"python -m training.{stage} --config {config}" for stage in ("train_mllm", "probe_layers", "train_alignment")
    ]
    assert len(walk(skipped)) == 3 and not {"train_mllm", "probe_layers", "train_alignment"} & set(
        os.listdir("runs/own")
    )


def write_ratings(path, users=24, pictures=24):
    """ratings.csv: half of the people like red, half blue; scores on everybody's own scale."""
    mkdir("p")
    lines = ["user,image,score,prompt"]
    for user in range(users):
        for number in range(pictures):
            red = number % 2 == 0
            name = f"p/{user}-{number}.png"
            picture(red, 1000 * user + number).save(name)
            score = user % 3 + 2 * (red == (user % 2 == 0))
            lines.append(f"person {user},{name},{score},a sea {number // 2}")
    path.write_text("\n".join(lines))


WALKS = [
    ("sd15", "SmolVLM2"),
    pytest.param("sdxl", "Qwen3-VL", marks=pytest.mark.slow),
    pytest.param("sd15", "Idefics2", marks=pytest.mark.slow),
    pytest.param("sdxl", "Qwen2.5-VL", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("family, mllm", WALKS)
def test_a_labs_ratings_become_an_adapter_by_the_pages_commands(family, mllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(family, mllm)
    write_ratings(tmp_path / "ratings.csv")
    (text,) = blocks("lab.md", "yaml")
    content = yaml.safe_load(text)
    del content["mllm"]  # its own file of settings
    fp32 = {"path": MLLM, "precision": "fp32", "lora": {"rank": 2}}
    base = {"family": family, "pixels": tiny_bases.PIXELS, "precision": "fp32"}
    # Of random weights some say nothing of most people: then the prompts of the liked pictures are the target.
    target = "traits" if mllm == "SmolVLM2" else "prompts"
    alignment = SHORT["train_alignment"] | {"target": target}
    config = shortened(content, "people.yaml", mllm=fp32, base=base, train_alignment=alignment)
    (page,) = blocks("lab.md")
    lines = [
        line.replace("SmolVLM2-2.2B-Instruct", "SmolVLM2-2.2B-Instruct --dtype fp32 --pictures 2")
        for line in page.splitlines()
    ]
    ran = walk(lines, {"people.yaml": config})
    assert [name.removeprefix("training.") for name in ran if name.removeprefix("training.") in STAGES] == list(STAGES)
    # The planted users came out as what they are.
    world = DataSetWorld("data/people")
    index = world.index.to_pylist()
    names = dict(line.split(",") for line in open("data/people/source_users.csv").read().splitlines()[1:])
    for row, pixels in zip(index[:40], world.pictures(range(40)), strict=True):
        is_red = pixels[..., 0].mean() > pixels[..., 2].mean()
        likes_red = int(names[str(row["user"])].split()[1]) % 2 == 0
        assert (row["verdict"] == LIKED) == (is_red == likes_red)
    header = check_paints("people.safetensors", MLLM, "runs/people/train_mllm/lora")
    assert header.semantic_width and header.core_width and header.image_width == IMAGE
    assert load_adapter("people.safetensors").header.training["data"] == "people"
    # Whatever is done out of order or anew is refused by name: here a LoRA that was trained again.
    lora = tmp_path / "runs/people/train_mllm/lora/adapter_model.safetensors"
    lora.write_bytes(lora.read_bytes()[:-4] + b"\0\0\1\1")
    again = f"python -m training.export --config {config} --out again.safetensors"
    with pytest.raises(AssertionError, match="another LoRA"):
        walk([again])
    assert not (tmp_path / "again.safetensors").exists()


def test_the_first_real_runs_script_runs_on_tables_of_the_published_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models()
    tables = pickapic_tables.generate(2000, images=True)
    pickapic_tables.write(tables, tmp_path / "published", images=True)
    content = yaml.safe_load((FOLDER / "sd15_pickapic.yaml").read_text())
    del content["mllm"]
    config = shortened(content, "tiny.yaml", mllm={"precision": "fp32", "lora": {"rank": 2}})
    environment = os.environ | {"PYTHON": "echo python", "CONFIG": str(tmp_path / config), "SOURCE": "published"}
    environment |= {"COMPARE": "--users 2 --prompts 1 --seeds 1 --history 2 --steps 2 --device cpu"}
    line = ["sh", str(ROOT / "training/runs/sd15_pickapic.sh")]
    said = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    (checked,) = (row for row in said.splitlines() if row.startswith("python -c"))
    assert checked.split()[-5:] == ["published", BASE, ADAPTER, CLIP, MLLM]
    lines = [
        row.replace(f"--mllm {MLLM}", f"--mllm {MLLM} --dtype fp32 --pictures 2 --device cpu")
        for row in said.splitlines()
    ]
    ran = walk(lines)
    assert ran[-1] == "training.evaluation.compare" and len(ran) == 11
    check_paints("runs/sd15_pickapic/prefgen.safetensors", MLLM, "runs/sd15_pickapic/train_mllm/lora")
    result = json.loads((tmp_path / "runs/sd15_pickapic/compare/compare.json").read_text())
    assert {"prefgen", "plain"} & set(result["rows"]) and result["pictures"] == 2


def test_the_script_names_a_path_that_is_not_there_before_anything_else(tmp_path):
    # The script starts in the root, and takes PYTHON as words: a path that may have a space is given from there.
    python = os.path.relpath(sys.executable, ROOT)
    environment = os.environ | {"PYTHON": python, "SOURCE": str(tmp_path / "nowhere")}
    line = ["sh", str(ROOT / "training/runs/sd15_pickapic.sh")]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr.strip() == f"{tmp_path / 'nowhere'} is not there" and not ran.stdout
