"""A base's folder whose files are incomplete or something else: a sentence that names the file and what helps."""

import builtins
import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny_bases import write_base, write_config
from training.common import base_files
from training.common.base import BaseError
from training.common.bases import load_base, load_pipeline
from training.common.config.command import load

WEIGHTS = {name: "diffusion_pytorch_model.safetensors" for name in ("unet", "vae")} | {
    "text_encoder": "model.safetensors"
}


@pytest.fixture(scope="module", params=["sd15", "flux"])
def whole(request, tmp_path_factory):
    """(family, its tiny folder)."""
    return request.param, write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture
def damaged(whole, tmp_path):
    """damaged(change): the sentence that a base is refused with after change(folder)."""
    family, source = whole

    def refused(change):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder)
        config = load(write_config(tmp_path / "run.yaml", family, folder, tmp_path))
        with pytest.raises(BaseError) as raised:
            load_base(config)
        said = str(raised.value)
        assert str(folder) in said and said.count(".\n") == 0 and "\n" not in said
        return said

    return refused


def rewrite(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_weights_that_a_file_lacks_are_not_drawn_at_random(damaged, part):
    def change(folder):
        rewrite(folder / part / WEIGHTS[part], lambda weights: weights.pop(max(weights)))

    said = damaged(change)
    assert f"base/{part} lacks " in said and "would be random" in said


def test_of_the_denoiser_as_well(damaged, whole):
    part = "transformer" if whole[0] == "flux" else "unet"

    def change(folder):
        rewrite(folder / part / WEIGHTS["unet"], lambda weights: [weights.pop(key) for key in sorted(weights)[-2:]])

    assert "and 1 more weights, which would be random" in damaged(change)


def write(file, content):
    (file.write_bytes if isinstance(content, bytes) else file.write_text)(content)


FAULTS = {
    "a Git LFS pointer": (
        lambda vae: write(vae / WEIGHTS["vae"], "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "run `git lfs pull`",
    ),
    "a web page": (lambda vae: write(vae / WEIGHTS["vae"], "<!DOCTYPE html><html>"), "the page's own download button"),
    "nothing": (lambda vae: write(vae / WEIGHTS["vae"], b""), "is damaged or cut off"),
    "a part": (
        lambda vae: write(vae / WEIGHTS["vae"], (vae / WEIGHTS["vae"]).read_bytes()[:-50]),
        "download that file again",
    ),
    "a broken config": (lambda vae: write(vae / "config.json", "{"), "config.json is damaged"),
    "no config": (lambda vae: (vae / "config.json").unlink(), "has no config.json: download that file"),
    "no weights": (lambda vae: (vae / WEIGHTS["vae"]).unlink(), "has no weights: put its .safetensors files there"),
    "a pickle": (
        lambda vae: (vae / WEIGHTS["vae"]).rename(vae / "diffusion_pytorch_model.bin"),
        "only pickled weights, which PrefGen never opens",
    ),
    "a download that isn't finished": (
        lambda vae: (vae / WEIGHTS["vae"]).rename(vae / f"{WEIGHTS['vae']}.part"),
        "let the download finish",
    ),
    "a link to nowhere": (
        lambda vae: [(vae / WEIGHTS["vae"]).unlink(), (vae / WEIGHTS["vae"]).symlink_to("gone")],
        "is a link to a file that isn't there",
    ),
    "no folder": (shutil.rmtree, "has no folder vae: take the whole diffusers folder"),
    "another model's config": (
        lambda vae: write(vae / "config.json", (vae / "config.json").read_text().replace("8,", "16,")),
        "take config.json and all weights from one release",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stands_in_place_of_a_file_is_named_with_what_helps(damaged, fault):
    change, expected = FAULTS[fault]
    said = damaged(lambda folder: change(folder / "vae"))
    assert expected in said


def test_a_class_that_the_installed_library_lacks_is_told(damaged):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderOfTomorrow"]}))

    assert "the installed diffusers lacks: update it" in damaged(change)


@pytest.mark.parametrize("gone", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_tokenizer_without_words_is_refused(damaged, gone):
    """transformers would make one to which every prompt is the same."""

    def change(folder):
        shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()

    assert "tokenizer has no words of a tokenizer" in damaged(change)


def test_a_scheduler_that_is_missing_is_no_matter_of_weights(damaged):
    said = damaged(lambda folder: shutil.rmtree(folder / "scheduler"))
    assert "its tokenizers or its scheduler are missing or damaged" in said


def test_a_file_that_may_not_be_read_is_told(damaged, monkeypatch):
    def refuse(file, where):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(base_files.foreign, "damage", refuse)
    assert "give your user the right" in damaged(lambda folder: write(folder / "vae" / WEIGHTS["vae"], b""))


def test_memory_that_ran_out_is_not_blamed_on_the_files(damaged, monkeypatch):
    """Nor is a package that isn't installed."""

    def raising(error):
        def from_pretrained(*_, **__):
            raise error

        monkeypatch.setattr(base_files, "_model_classes", lambda folder: {"vae": Kind, "unet": Kind})
        Kind.from_pretrained = from_pretrained

    class Kind(torch.nn.Module):
        pass

    raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    said = damaged(lambda folder: None)
    assert said.startswith("Memory ran out while ") and "download" not in said
    raising(builtins.ImportError("sentencepiece isn't there: `pip install sentencepiece`\n"))
    said = damaged(lambda folder: None)
    assert "pip install sentencepiece" in said and "download" not in said


def test_half_precision_files_alone_are_taken(whole, tmp_path):
    """As a repository's fp16 variant is downloaded."""
    family, source = whole
    folder = tmp_path / "half"
    shutil.copytree(source, folder)
    for file in folder.glob("*/*.safetensors"):
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    config = load(write_config(tmp_path / "run.yaml", family, folder, tmp_path))
    pipeline = load_pipeline(config)
    expected = load_file(folder / "vae/diffusion_pytorch_model.fp16.safetensors")["decoder.conv_in.weight"]
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, expected.float())
