"""prefgen.pipeline and its page: a user from pictures, painted by stock diffusers."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.clip import ClipVision
from prefgen.errors import AdapterError
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.pipeline import UserReader, put_on, take_off
from tests.closeness import assert_far
from tests.prefgen import ip_adapter_files, tiny_mllms
from tests.prefgen.adapters import random_adapter
from tests.prefgen.test_mllm_lora import write_lora
from tests.training import tiny_bases, tiny_clip

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/diffusers.md").read_text(encoding="utf-8")
PROJECTION = 16


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """The files that the page names, tiny and random."""
    folder = tmp_path_factory.mktemp("diffusers")
    tiny_bases.write_base(folder / "models/sd15", "sd15")
    tiny_mllms.write_folder(folder / "models/smolvlm2", "SmolVLM2")
    write_lora(folder / "models/lora", PreferenceMLLM.load(folder / "models/smolvlm2").model)
    torch.manual_seed(3)
    sides = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": PROJECTION}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sides)).save_pretrained(
        folder / "models/clip-vit-h"
    )
    for side, numbers in (("liked", range(3)), ("disliked", range(3, 5))):
        (folder / "sea" / side).mkdir(parents=True)
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "sea" / side / f"{number}.png")
    save_adapter(adapter_of(folder), folder / "taste.safetensors")
    return folder


def adapter_of(folder, **changes):
    mllm = PreferenceMLLM.load(folder / "models/smolvlm2", lora=folder / "models/lora")
    vision = ClipVision(folder / "models/clip-vit-h")
    unet = UNet2DConditionModel.from_pretrained(folder / "models/sd15", subfolder="unet")
    names = [n.removesuffix(".processor") for n in unet.attn_processors if n.endswith("attn2.processor")]
    widths = [unet.get_submodule(name).to_k.out_features for name in names]
    torch.manual_seed(5)
    entries = {
        "base_family": "sd15",
        "mllm": mllm.fingerprint | {"sem_layers": [2, 3], "core_layer": 1},
        "clip_vision": {"name": "clip-vit-h", "width": PROJECTION} | vision.about,
    } | changes
    adapter = random_adapter(widths, 768, (8, tiny_mllms.WIDTH, PROJECTION), aligner_hidden=16, **entries)
    for linear in (*adapter.to_k_ip, *adapter.to_v_ip):
        torch.nn.init.normal_(linear.weight, std=1.0)
    return adapter


@pytest.fixture(scope="module")
def reader(studio):
    models = studio / "models"
    return UserReader(studio / "taste.safetensors", models / "clip-vit-h", models / "smolvlm2", models / "lora")


def pictures_of(studio):
    return [sorted((studio / "sea" / side).iterdir()) for side in ("liked", "disliked")]


def test_the_pages_example_paints_in_fifteen_lines(studio):
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len([line for line in text.splitlines() if line]) <= 15
    line = [sys.executable, "-c", text]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    ran = subprocess.run(line, cwd=studio, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with Image.open(studio / "lighthouse.png") as picture:
        assert picture.size[0] >= 64


def test_the_vector_is_the_one_that_the_nodes_make(studio, reader):
    liked, disliked = pictures_of(studio)
    user = reader.read(liked, disliked, liked_prompts=["a sea", "", ""], semantic=0.5)
    opened = [[Image.open(path) for path in side] for side in (liked, disliked)]
    again = reader.read(*opened, liked_prompts=["a sea", "", ""], semantic=0.5)
    assert torch.equal(user.vector, again.vector)
    tensors = [[torch.from_numpy(np.array(image)).float() / 255 for image in side] for side in opened]
    encoded = reader.encode(PreferenceHistory.from_images(*tensors, ["a sea", "", ""]))
    assert torch.equal(user.vector, fuse_user_vector(reader.adapter, encoded, semantic=0.5))
    assert_far(user.vector, reader.read(disliked, liked).vector)
    assert user.vector.shape == (user.header.user_width,)


def test_a_user_changes_the_picture_and_weight_0_and_taking_it_off_do_not(studio, reader):
    pipeline = DiffusionPipeline.from_pretrained(studio / "models/sd15")
    pipeline.set_progress_bar_config(disable=True)

    def paint(**options):
        noise = torch.Generator().manual_seed(1)
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline("a lighthouse", generator=noise, **size, **options).images

    user = reader.read(*pictures_of(studio))
    plain = paint()
    put_on(pipeline, studio / "taste.safetensors", weight=0.8)
    assert_far(paint(ip_adapter_image_embeds=user.embeds(pipeline)), plain)
    assert_far(paint(ip_adapter_image_embeds=user.embeds(pipeline, guidance=False), guidance_scale=1.0), plain)
    put_on(pipeline, studio / "taste.safetensors", weight=0.0)
    assert torch.equal(paint(ip_adapter_image_embeds=user.embeds(pipeline)), plain)
    take_off(pipeline)
    assert torch.equal(paint(), plain)
    assert [e.shape for e in user.embeds(pipeline, 3)] == [(6, 1, user.header.user_width)]
    with pytest.raises(AdapterError, match="is for SD1.5; the model you connected is"):
        pipeline.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            cross_attention_dim=2048,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=2,
        )
        put_on(pipeline, studio / "taste.safetensors")


def test_what_does_not_fit_is_one_sentence(studio, reader, tmp_path):
    liked, _ = pictures_of(studio)
    models = studio / "models"
    alone = UserReader(studio / "taste.safetensors", models / "clip-vit-h")
    with pytest.raises(AdapterError, match="give UserReader its folder as mllm, or read with semantic=0 and core=0"):
        alone.read(liked)
    image_part = alone.read(liked, semantic=0, core=0).vector
    assert image_part[-PROJECTION:].norm() > 0.9 and not image_part[:-PROJECTION].any()
    blind = UserReader(studio / "taste.safetensors", mllm=models / "smolvlm2", lora=models / "lora")
    with pytest.raises(AdapterError, match="give UserReader its folder as clip_vision, or read with image=0"):
        blind.read(liked)
    torch.manual_seed(9)
    sides = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": PROJECTION}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sides)).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="embeds the same picture otherwise"):
        UserReader(studio / "taste.safetensors", tmp_path / "other").read(liked, semantic=0, core=0)
    with pytest.raises(AdapterError, match="was trained with the MLLM"):
        UserReader(studio / "taste.safetensors", models / "clip-vit-h", models / "smolvlm2").read(liked)
    assert load_adapter(studio / "taste.safetensors").header.clip_vision["fixed_picture"]


def test_an_ip_adapter_is_left_to_diffusers(studio, tmp_path):
    file = ip_adapter_files.write(tmp_path, "ip-adapter_sd15")
    with pytest.raises(AdapterError, match="is an IP-Adapter: give diffusers its pictures as ip_adapter_image"):
        UserReader(file, studio / "models/clip-vit-h")
