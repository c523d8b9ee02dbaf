"""CLIP outside ComfyUI, from transformers' folders and from open_clip's alike: the image encoder of e_img, and the text
towers that e_sem is aligned to.

Which library a folder is for is known by what lies in it: `config.json` is transformers', `open_clip_config.json` alone
is open_clip's. The same weights give the same embeddings in both (tests/prefgen/test_clip.py). Of open_clip, which
ComfyUI doesn't bring, the plain architecture alone is read: ViT-H-14, ViT-bigG-14, ViT-L-14 and their kin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from .compat import absent, from_safetensors, has_vocabulary
from .errors import MendableError
from .files import read_text, visible_files
from .image_encoder import described, fixed_picture, rounded

PICTURES_AT_ONCE = 16
TEXTS_AT_ONCE = 256
# What transformers, open_clip and safetensors raise for a broken folder. Not TypeError: that would be a call of ours.
BROKEN_FOLDER = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)
# Of CLIP's training pictures (arXiv 2103.00020).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
# How open_clip names its image side, and parts of it in a tower of another library that its configuration may name.
VISUAL = "visual."
FOREIGN_TOWERS = ("timm_model_name", "hf_model_name")


class ClipError(MendableError):
    """A CLIP that can't be used: one sentence."""


class ClipVision:
    """A CLIP's image side with its projection. Gives image embeddings, float32 [B, I], not normalised.

    path: a folder of transformers or of open_clip, or a safetensors file of open_clip's with the name of its built-in
    `architecture`. about: what `image_encoder.described` tells of it and its `fixed_picture` embedding; width: I; side:
    of its input, in pixels. ClipError for one that isn't a CLIP, or not whole.
    """

    def __init__(self, path: Path, device: str = "cpu", architecture: str | None = None):
        self._embed: Callable[[torch.Tensor], torch.Tensor]
        if is_open_clip(path):
            opened = load_open_clip(path, architecture)
            self.model = opened.model.visual.to(device)
            self._embed = self.model
            self.side = opened.side
            self.width = opened.width
            self._mean = opened.mean
            self._std = opened.std
            self.about = {"architecture": "CLIP", "hidden_size": self.model.conv1.weight.shape[0]}
        else:
            _refuse_architecture(path, architecture)
            self.model = _transformers_tower("CLIPVisionModelWithProjection", path).to(device)
            self._embed = lambda pixels: self.model(pixel_values=pixels).image_embeds
            self.side = self.model.config.image_size
            self.width = self.model.config.projection_dim
            self._mean = MEAN
            self._std = STD
            self.about = described(self.model.state_dict())
        self.about["fixed_picture"] = self._of_fixed_picture()

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        starts = range(0, len(pictures), PICTURES_AT_ONCE)
        return torch.cat([self.embed(pictures[start : start + PICTURES_AT_ONCE]) for start in starts])

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Those that go through the encoder together."""
        pixels = clip_pixels(pictures, self.side, self._mean, self._std)
        return self._embed(pixels.to(next(self.model.parameters()))).float().cpu()

    def _of_fixed_picture(self) -> list[float]:
        pixels = fixed_picture(self.side).mul(255).round().byte().numpy()
        return rounded(self([Image.fromarray(pixels)])[0])


class ClipText:
    """A CLIP's text side with its projection. Gives unit text embeddings, float32 [B, C] on the CPU; a text is cut
    after the tower's tokens. path, architecture: as of ClipVision, a transformers folder with its tokenizer."""

    def __init__(self, path: Path, device: str = "cpu", architecture: str | None = None):
        self.device = device
        self._embed: Callable[[list[str]], torch.Tensor]
        if is_open_clip(path):
            opened = load_open_clip(path, architecture)
            self.model = opened.model.to(device)
            self.model.visual = None
            self._embed = lambda texts: self.model.encode_text(opened.tokens(texts).to(device))
            return
        _refuse_architecture(path, architecture)
        self.model = _transformers_tower("CLIPTextModelWithProjection", path).to(device)
        self._tokenizer = load_tokenizer(path)
        self._embed = self._transformers_embed

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            rows.append(self._embed(list(texts[start : start + TEXTS_AT_ONCE])).float().cpu())
        return F.normalize(torch.cat(rows), dim=1)

    def _transformers_embed(self, texts: list[str]) -> torch.Tensor:
        limit = self.model.config.max_position_embeddings
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return self.model(**inputs.to(self.device)).text_embeds


def clip_pixels(
    pictures: Sequence[Image.Image], side: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> torch.Tensor:
    """[B, 3, side, side] as CLIP wants them: shorter side resized (bicubic), middle cut out, normalised."""
    from transformers import CLIPImageProcessor

    crop = {"height": side, "width": side}
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size=crop, image_mean=list(mean), image_std=list(std)
    )
    return processor(images=list(pictures), return_tensors="pt").pixel_values


# open_clip


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model, fp32 on the CPU, and what its configuration says of pictures. tokens: texts -> ids [B, T]."""

    model: torch.nn.Module
    width: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: Callable[[list[str]], torch.Tensor]


def is_open_clip(path: Path) -> bool:
    """Whether a path is open_clip's: a file of weights, or a folder with its configuration and not transformers'."""
    path = Path(path)
    return path.is_file() or ((path / OPEN_CLIP_CONFIG).is_file() and not (path / "config.json").is_file())


def load_open_clip(path: Path, architecture: str | None = None) -> OpenClip:
    """An open_clip folder, or a safetensors file and its built-in architecture. Nothing is downloaded. ClipError."""
    path = Path(path)
    try:
        import open_clip
    except ImportError as error:
        raise ClipError(f'{path} is for open_clip, which isn\'t installed: pip install -e ".[train]".') from error
    about = _open_clip_config(path, architecture)
    config = about["model_cfg"]
    file = path if path.is_file() else _open_clip_weights(path)
    try:
        model = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
        # A file that comes from the older layout has the text tower's mask among its weights.
        weights = {key: value for key, value in load_file(str(file)).items() if key != "attn_mask"}
        model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
        length = config["text_cfg"].get("context_length", 77)
        tokens = open_clip.SimpleTokenizer(context_length=length)
    except (*BROKEN_FOLDER, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ClipError(
            f"{file} doesn't hold the weights of its architecture ({reason}): download it whole."
        ) from error
    side = config["vision_cfg"]["image_size"]
    pictures = about.get("preprocess_cfg") or {}
    return OpenClip(
        model.eval().requires_grad_(False),
        config["embed_dim"],
        side if isinstance(side, int) else side[0],
        tuple(pictures.get("mean") or MEAN),
        tuple(pictures.get("std") or STD),
        tokens,
    )


def _open_clip_config(path: Path, architecture: str | None) -> Mapping:
    """{"model_cfg", "preprocess_cfg"} of a folder or of a built-in architecture. ClipError for one that isn't plain."""
    import open_clip

    if path.is_dir():
        _refuse_architecture(path, architecture)
        try:
            about = json.loads(read_text(path / OPEN_CLIP_CONFIG))
            config = about["model_cfg"]
            plain = isinstance(config["vision_cfg"], dict) and isinstance(config["text_cfg"], dict)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClipError(f"{path / OPEN_CLIP_CONFIG} is damaged: download it again.") from error
    else:
        config = open_clip.get_model_config(architecture) if architecture else None
        if config is None:
            raise ClipError(
                f"{path} is a file of weights, and {architecture or 'no architecture'} is none of open_clip's: name "
                "one, such as ViT-H-14."
            )
        about = {"model_cfg": config}
        plain = True
    towers = (config["vision_cfg"], config["text_cfg"])
    if not plain or any(tower.get(name) for tower in towers for name in FOREIGN_TOWERS):
        raise ClipError(f"{path} has a tower of another library: choose a plain CLIP, such as ViT-H-14.")
    return about


def _open_clip_weights(path: Path) -> Path:
    """The safetensors file of an open_clip folder. ClipError for none, or for several of which none has its name."""
    files = visible_files(path, "*.safetensors")
    named = [file for file in files if file.name == OPEN_CLIP_WEIGHTS] or files
    if len(named) != 1:
        raise ClipError(
            f"{path} has {len(files)} safetensors files: it needs its weights as {OPEN_CLIP_WEIGHTS}, pickles are not "
            "read."
        )
    return named[0]


def _refuse_architecture(path: Path, architecture: str | None) -> None:
    if architecture:
        raise ClipError(f"{path} is a folder and says itself what it is: leave the architecture {architecture} out.")


# transformers


def _transformers_tower(name: str, path: Path):
    """One tower of a transformers CLIP folder, by its class. ClipError for a folder that lacks it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
        if not config.model_type.startswith("clip"):
            raise ClipError(
                f"{path} is a {config.model_type} model and no CLIP with its projection. Choose one, such as CLIP "
                "ViT-H."
            )
        if isinstance(config, transformers.CLIPConfig):
            # Of a whole CLIP, where the towers' own entries may say another width.
            width = config.projection_dim
            config = config.vision_config if "Vision" in name else config.text_config
            config.projection_dim = width
        model, loading = from_safetensors(getattr(transformers, name), path, config=config)
    except BROKEN_FOLDER as error:
        raise ClipError(
            f"{path} is no CLIP folder of transformers or open_clip with safetensors weights: download it whole."
        ) from error
    # transformers draws at random what a folder lacks, such as all of a SigLIP or the projection of a bare tower.
    lacking = absent(loading)
    if lacking:
        raise ClipError(
            f"{path} lacks {lacking[0]}{' and more' if lacking[1:] else ''}: it is no CLIP model with its projection. "
            "Choose one that is, such as CLIP ViT-H."
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path):
    """The tokenizer of a transformers CLIP folder. ClipError with one sentence."""
    from transformers import CLIPTokenizerFast

    if not has_vocabulary(Path(path)):
        raise ClipError(f"{path} has no tokenizer of a CLIP (tokenizer.json, or vocab.json with merges.txt): add it.")
    try:
        return CLIPTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except BROKEN_FOLDER as error:
        raise ClipError(f"{path} has no tokenizer of a CLIP: download it whole.") from error
